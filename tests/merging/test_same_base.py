"""One base model under many names, and several models: told apart by their weights, not by what they are called."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from peft import PeftConfig, PeftModel, get_peft_model
from peft.utils import PeftWarning
from safetensors.torch import load_file, save_file

from peft_many import (
    MAnyConfig,
    add_task,
    collect_statistics,
    merge_adapter_files,
    merge_adapter_sequence,
    plan_merge,
    pool_adapters,
    read_recipe,
)
from peft_many.files.errors import UnmergeableAdapterError
from tests.adapters import base, batches, files, make

MODEL = "model.safetensors"


@pytest.fixture(scope="module")
def shelf(tmp_path_factory) -> Path:
    """Two adapters, and a folder with their base model."""
    root = tmp_path_factory.mktemp("shelf")
    base("llama").save_pretrained(root / "base")
    for seed, name in enumerate("ab"):
        make(root / name, "llama", seed, task_name=name, target_modules=["q_proj", "up_proj"])
    return root


@pytest.fixture
def place(shelf, tmp_path, monkeypatch) -> Path:
    """A folder of one's own with copies of these, to work in."""
    shutil.copytree(shelf, tmp_path / "place")
    monkeypatch.chdir(tmp_path / "place")
    monkeypatch.setenv("HOME", str(tmp_path / "place"))
    return tmp_path / "place"


def trained_on(*names: Any) -> list[str]:
    """The adapters a and b, with these names of their base models, and revisions."""
    for adapter, named in zip("ab", names):
        name, revision = named if isinstance(named, tuple) else (named, None)
        path = Path(adapter, "adapter_config.json")
        config = json.loads(path.read_text()) | {"base_model_name_or_path": name, "revision": revision}
        path.write_text(json.dumps(config))
    return ["a", "b"]


def merged(*names: Any, **options: Any) -> PeftConfig:
    """Merge adapters of base models of these names, without a warning; the merge's config."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", PeftWarning)
        merge_adapter_files(trained_on(*names), "merged", progress=False, **options)
    return PeftConfig.from_pretrained("merged")


def edit_model(folder: str, change: Callable[[dict[str, Any]], Any]) -> None:
    tensors = load_file(Path(folder, MODEL))
    change(tensors)
    save_file({key: tensor.clone() for key, tensor in tensors.items()}, Path(folder, MODEL), {"format": "pt"})


def edit_config(folder: str, **changes: Any) -> None:
    path = Path(folder, "config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("name", ["base/", "./base", "b/../base", "~/base", "link", "{}", "copy", "resaved", None, ""])
def test_other_names_of_one_folder(place, name):
    os.symlink("base", "link")
    shutil.copytree("base", "copy")
    edit_config("copy", _name_or_path="elsewhere", transformers_version="4.1", architectures=["Llama"], new_default=1)
    base("llama").save_pretrained("resaved", max_shard_size="50KB")
    assert len(list(Path("resaved").glob("*.safetensors"))) > 1
    here = str(place / "base")
    recorded = merged(here, name and name.format(f"{place}//base")).base_model_name_or_path
    assert os.path.isabs(recorded)
    assert os.path.samefile(recorded, here)


def test_the_hub_knows_no_case_and_has_one_main_branch(place):
    config = merged("Me/Base", ("me/base", "main"))
    assert (config.base_model_name_or_path, config.revision) == ("me/base", "main")
    shutil.rmtree("merged")
    config = merged(("me/base", "v1"), ("me/base", "v1"))
    assert (config.base_model_name_or_path, config.revision) == ("me/base", "v1")


@pytest.mark.parametrize(
    "other", ["me/renamed", ("me/base", "v2"), "base", "/nowhere/base", "gone", "without weights", "old names", "half"]
)
def test_what_may_be_another_model_is_a_warning_that_says_how_to_say_so(place, other):
    shutil.copytree("base", "half")
    edit_model("half", lambda tensors: tensors.update({key: value.half() for key, value in tensors.items()}))
    shutil.copytree("base", "old names")
    edit_model("old names", lambda tensors: tensors.update({f"old.{key}": tensors.pop(key) for key in [*tensors]}))
    os.mkdir("without weights")
    one = "base" if other in ("without weights", "old names", "half") else "me/base"
    adapters = trained_on(one, other)
    with pytest.warns(PeftWarning, match=r"(a|b) on '.*' and (a|b) on '.*'.*`same_base=True`.*--same-base") as told:
        merge_adapter_files(adapters, "told", progress=False)
    assert len([one for one in told if "base model" in str(one.message)]) == 1
    config = merged(one, other, same_base=True)
    assert files(Path("merged")) == files(Path("told"))
    assert config.base_model_name_or_path in ("me/base", one)
    with warnings.catch_warnings():
        warnings.simplefilter("error", PeftWarning)
        model = merge_adapter_sequence(base("llama"), adapters, progress=False)  # its modules decide
    model.save_pretrained("by sequence")
    assert PeftModel.from_pretrained(base("llama"), "by sequence")


@pytest.mark.parametrize("names", [("me/base", None), (None, None), ("", "me/base")])
def test_no_name_and_no_layer_in_common_is_a_doubt(place, names):
    """Nothing would tell that they are of one model; where layers are shared, their shapes do."""
    trained_on(*names)
    make(Path("c"), "llama", 7, task_name="c", target_modules=["o_proj"])  # which names none
    with pytest.warns(PeftWarning, match=r"[ac] names none, and has no layer in common.*`same_base=True`"):
        merge_adapter_files(["a", "c"], "told", progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error", PeftWarning)
        merge_adapter_files(["a", "c"], "said", same_base=True, progress=False)
        merge_adapter_files(["c"], "alone", progress=False)
        merge_adapter_sequence(base("llama"), ["a", "c"], progress=False)
        merge_adapter_files(["a", "b"], "shared", progress=False)
    assert files(Path("said")) == files(Path("told"))


def test_a_config_that_says_something_else_of_the_same_weights_is_a_doubt(place):
    shutil.copytree("base", "longer")
    edit_config("longer", rope_parameters={"rope_theta": 5e5, "rope_type": "default"})
    with pytest.warns(PeftWarning, match=r"weights are alike, but `rope_parameters.rope_theta` in config.json is not"):
        merge_adapter_files(trained_on("base", "longer"), "merged", progress=False)


CHANGES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "another weight": lambda tensors: tensors["model.layers.1.mlp.up_proj.weight"].add_(0.01),
    "another vocabulary": lambda tensors: tensors.update(
        {"model.embed_tokens.weight": tensors["model.embed_tokens.weight"][:-1]}
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_another_model_is_refused_until_one_insists(place, change):
    shutil.copytree("base", "other")
    edit_model("other", CHANGES[change])
    adapters = trained_on("base", str(place / "other"))
    tensor = "up_proj.weight' differs" if change == "another weight" else r"embed_tokens.weight' has shape .* and"
    with pytest.raises(UnmergeableAdapterError, match=rf"different base models: a on 'base' and b on .*{tensor}"):
        merge_adapter_files(adapters, "merged", progress=False)
    assert not Path("merged").exists()
    (problem,) = plan_merge(adapters, progress=False).problems
    assert "different base models" in problem
    assert plan_merge(adapters, same_base=True, progress=False).problems == []
    assert merged("base", str(place / "other"), same_base=True).base_model_name_or_path == str(place / "other")
    with pytest.warns(PeftWarning, match="different base models"):  # with the model at hand its modules decide
        assert merge_adapter_sequence(base("llama"), adapters, progress=False).active_adapters == ["default"]


def test_layers_of_other_shapes_are_refused_whatever_one_says(place):
    config = json.loads(Path("base/config.json").read_text())
    wider = type(base("llama").config)(**{**config, "intermediate_size": 2 * config["intermediate_size"]})
    model = type(base("llama"))(wider)
    trained = get_peft_model(model, MAnyConfig(r=2, task_name="wide", target_modules=["up_proj"]))
    collect_statistics(trained, batches(trained, "llama", 3), progress=False)
    trained.save_pretrained("wide")
    with pytest.raises(UnmergeableAdapterError, match="shape of"):
        merge_adapter_files(["a", "wide"], "merged", same_base=True, progress=False)


def test_a_repository_in_the_hubs_cache_is_compared(place):
    cache = place / "cache"
    for repo, folder in (("base", "base"), ("renamed", "base"), ("other", "other")):
        if not Path(folder).exists():
            shutil.copytree("base", folder)
            edit_model(folder, CHANGES["another weight"])
        holder = cache / f"models--me--{repo}"
        shutil.copytree(folder, holder / "snapshots" / ("0" * 40))
        (holder / "refs").mkdir()
        (holder / "refs" / "main").write_text("0" * 40)
    snapshot = str(cache / "models--me--renamed" / "snapshots" / ("0" * 40))
    for names in (("me/base", "me/renamed"), ("base", "me/renamed"), (snapshot, "me/renamed")):
        assert merged(*names, cache_dir=cache).base_model_name_or_path.startswith("me/")
        shutil.rmtree("merged")
    with pytest.raises(UnmergeableAdapterError, match=r"'me/base' and b on 'me/other'.*differs"):
        merge_adapter_files(trained_on("me/base", "me/other"), "merged", cache_dir=cache, progress=False)


def test_a_recipe_may_say_so(place):
    trained_on("me/base", "me/renamed")
    Path("tasks.yaml").write_text("{adapters: [a, b], options: {same_base: true}}")
    with warnings.catch_warnings():
        warnings.simplefilter("error", PeftWarning)
        merge_adapter_files(**read_recipe("tasks.yaml"), output_dir="by recipe", progress=False)
    Path("tasks.yaml").write_text("{adapters: [a, b], options: {same_base: yeah}}")
    with pytest.raises(ValueError, match="`same_base` must be true or false"):
        read_recipe("tasks.yaml")


def test_add_task_and_pool_adapters_take_it(place):
    merge_adapter_files(trained_on("me/base", "me/renamed")[:1], "merged", progress=False)
    for call in (
        lambda **said: add_task("merged", "b", f"added {len(said)}", progress=False, **said),
        lambda **said: pool_adapters(["a", "b"], f"pooled {len(said)}", progress=False, **said),
    ):
        with pytest.warns(PeftWarning, match="--same-base"):
            call()
        with warnings.catch_warnings():
            warnings.simplefilter("error", PeftWarning)
            call(same_base=True)
