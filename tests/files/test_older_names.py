"""Adapters from before transformers v5, whose layers had other names: they merge and load like those of today."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoHaConfig, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from peft_many import collect_statistics, merge_adapter_files, merge_adapter_sequence
from peft_many.families.module_names import names_before_v5, names_on
from peft_many.files.errors import UnmergeableAdapterError
from peft_many.files.tensor_file import TensorFile
from tests.adapters import PROJECTOR, STATISTICS, WEIGHTS, base, batches, files, logits, make

LLAVA = {
    r"\bmodel\.language_model\.": "language_model.model.",
    r"\bmodel\.multi_modal_projector": "multi_modal_projector",
}
QWEN = {r"\bmodel\.language_model\.": "model.", r"\bmodel\.visual": "visual"}
CONFIG = "adapter_config.json"


def aged(folder: Path, into: Path, names: dict[str, str]) -> Path:
    """The adapter as it would have been saved before v5."""
    shutil.copytree(folder, into)

    def old(text: str) -> str:
        for pattern, before in names.items():
            text = re.sub(pattern, before, text)
        return text

    tensors = load_file(folder / WEIGHTS)
    prefix = "base_model.model."
    save_file({prefix + old(key.removeprefix(prefix)): tensor for key, tensor in tensors.items()}, into / WEIGHTS)
    if (folder / STATISTICS).exists():
        file = TensorFile(folder / STATISTICS)
        measured = {old(key): file[key].clone() for key in file}
        save_file(measured, into / STATISTICS, {"peft_many": old(file.metadata["peft_many"])})
    config = json.loads((into / CONFIG).read_text())
    for name in ("projector_modules", "modules_to_save", "merge"):
        if name in config:
            config[name] = json.loads(old(json.dumps(config[name])))
    (into / CONFIG).write_text(json.dumps(config))
    return into


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("layouts")
    new = {}
    for family, names in (("llava", LLAVA), ("qwen2_vl", QWEN)):
        for number, name in enumerate("ab"):
            new[family, name] = make(root / f"{family}-{name}", family, seed=number, task_name=name).folder
            new[family, f"old {name}"] = aged(new[family, name], root / f"old-{family}-{name}", names)
    return new


def outputs(merged, family):
    return logits(merged, family, seed=7)


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
@pytest.mark.parametrize("pair", [("old a", "b"), ("b", "old a"), ("old a", "old b")])
def test_old_and_new_merge_on_a_model(made, family, pair):
    expected = merge_adapter_sequence(base(family), [made[family, "a"], made[family, "b"]], progress=False)
    merged = merge_adapter_sequence(base(family), [made[family, name] for name in pair], progress=False)
    assert torch.equal(outputs(merged, family), outputs(expected, family))


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
@pytest.mark.parametrize("pair", [("old a", "b"), ("b", "old a")])
def test_old_and_new_merge_as_files(made, family, pair, tmp_path):
    expected = merge_adapter_files([made[family, "a"], made[family, "b"]], tmp_path / "new", progress=False)
    merged = merge_adapter_files([made[family, name] for name in pair], tmp_path / "merged", progress=False)
    found, wanted = load_file(merged / WEIGHTS), load_file(expected / WEIGHTS)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    loaded, as_wanted = (PeftModel.from_pretrained(base(family), folder).eval() for folder in (merged, expected))
    assert torch.equal(outputs(loaded, family), outputs(as_wanted, family))


def test_an_old_merge_is_merged_further(made, tmp_path):
    merged = merge_adapter_files([made["llava", "a"], made["llava", "b"]], tmp_path / "merged", progress=False)
    third = make(tmp_path / "c", seed=5, task_name="c").folder
    old = aged(merged, tmp_path / "old", LLAVA)
    expected = merge_adapter_sequence(base("llava"), [merged, third], progress=False)
    found = merge_adapter_sequence(base("llava"), [old, third], progress=False)
    assert torch.equal(outputs(found, "llava"), outputs(expected, "llava"))


def test_other_peft_methods(made, tmp_path):
    model = get_peft_model(
        base("llava"), LoHaConfig(r=2, target_modules=r".*language_model.*q_proj", init_weights=False)
    )
    model.eval()
    collect_statistics(model, batches(model, "llava", 3), energy=1.0, progress=False)
    model.save_pretrained(tmp_path / "new")
    old = aged(tmp_path / "new", tmp_path / "old", LLAVA)
    merged = merge_adapter_sequence(base("llava"), [old, made["llava", "b"]], progress=False)
    expected = merge_adapter_sequence(base("llava"), [tmp_path / "new", made["llava", "b"]], progress=False)
    assert torch.equal(outputs(merged, "llava"), outputs(expected, "llava"))


def test_an_old_adapter_without_a_projector_loads(tmp_path):
    make(tmp_path / "new", seed=2, projector_modules=[])
    aged(tmp_path / "new", tmp_path / "old", LLAVA)
    loaded = PeftModel.from_pretrained(base("llava"), tmp_path / "old").eval()
    expected = PeftModel.from_pretrained(base("llava"), tmp_path / "new").eval()
    assert torch.equal(outputs(loaded, "llava"), outputs(expected, "llava"))


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_an_old_adapter_with_a_projector_loads(made, family):
    expected = PeftModel.from_pretrained(base(family), made[family, "a"]).eval()
    loaded = PeftModel.from_pretrained(base(family), made[family, "old a"]).eval()
    assert torch.equal(outputs(loaded, family), outputs(expected, family))
    loaded.load_adapter(made[family, "old b"], "second")
    expected.load_adapter(made[family, "b"], "second")
    for model in (loaded, expected):
        model.set_adapter("second")
    assert torch.equal(outputs(loaded, family), outputs(expected, family))
    by_transformers = base(family)
    by_transformers.load_adapter(str(made[family, "old b"]))
    assert torch.equal(outputs(by_transformers.eval(), family), outputs(expected, family))


def test_an_old_merge_loads(made, tmp_path):
    merged = merge_adapter_files([made["llava", "a"], made["llava", "b"]], tmp_path / "merged", progress=False)
    old = aged(merged, tmp_path / "old", LLAVA)
    loaded, expected = (PeftModel.from_pretrained(base("llava"), folder).eval() for folder in (old, merged))
    assert torch.equal(outputs(loaded, "llava"), outputs(expected, "llava"))


def test_an_old_adapter_loads_by_a_key_mapping_too(made):
    mapping = {
        r"^language_model\.model\.": "model.language_model.",
        r"^multi_modal_projector\.": "model.multi_modal_projector.",
    }
    loaded = PeftModel.from_pretrained(base("llava"), made["llava", "old a"], key_mapping=mapping).eval()
    expected = PeftModel.from_pretrained(base("llava"), made["llava", "a"]).eval()
    assert torch.equal(outputs(loaded, "llava"), outputs(expected, "llava"))


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (
            {r"\.multi_modal_projector\.": ".bridge."},
            "trained the projector 'model.multi_modal_projector', but has no",
        ),
        ({r"\.q_proj\.": ".query."}, r"tensor '.*\.query\.lora_.*' matches no module"),
    ],
)
def test_loading_names_a_key_that_matches_nothing_and_the_argument_that_helps(made, tmp_path, names, words):
    strange = aged(made["llava", "a"], tmp_path / "strange", names)
    with pytest.raises(ValueError, match=f"(?s){words}.*key_mapping"):
        PeftModel.from_pretrained(base("llava"), strange)


def test_a_key_beside_layers_and_projectors_that_matches_nothing_is_an_error(made, tmp_path):
    folder = shutil.copytree(made["llava", "a"], tmp_path / "more")
    more = {"base_model.model.model.resampler.weight": torch.zeros(2, 2)}
    save_file(load_file(folder / WEIGHTS) | more, folder / WEIGHTS)
    with pytest.raises(ValueError, match=r"'base_model\.model\.model\.resampler\.weight' matches no module"):
        PeftModel.from_pretrained(base("llava"), folder)


def test_a_merge_of_one_renews_an_old_adapter(made, tmp_path):
    renewed = merge_adapter_files([made["llava", "old a"]], tmp_path / "renewed", progress=False)
    loaded = PeftModel.from_pretrained(base("llava"), renewed).eval()
    expected = PeftModel.from_pretrained(base("llava"), made["llava", "a"]).eval()
    torch.testing.assert_close(outputs(loaded, "llava"), outputs(expected, "llava"), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", [LoraConfig, LoHaConfig])
def test_a_key_that_matches_nothing_is_named(made, tmp_path, kind):
    model = get_peft_model(base("llava"), kind(r=2, target_modules=r".*language_model.*q_proj"))
    collect_statistics(model, batches(model, "llava", 3), progress=False)
    model.save_pretrained(tmp_path / "new")
    strange = aged(tmp_path / "new", tmp_path / "strange", {r"\blanguage_model\.": "speech_model."})
    before = files(strange)
    words = rf"{strange}: .*'base_model\.model\.model\.speech_model\..*' matches no module of Llava"
    with pytest.raises(UnmergeableAdapterError, match=words):
        merge_adapter_sequence(base("llava"), [made["llava", "b"], strange], progress=False)
    assert files(strange) == before


def test_names():
    llava, qwen = names_on(base("llava")), names_on(base("qwen2_vl"))
    q = "layers.0.self_attn.q_proj"
    assert llava(f"language_model.model.{q}") == llava(f"model.language_model.{q}") == f"model.language_model.{q}"
    assert llava("multi_modal_projector") == PROJECTOR == names_before_v5("multi_modal_projector")
    assert qwen(f"model.{q}") == f"model.language_model.{q}"
    assert qwen("visual.merger") == "model.visual.merger"
    assert names_on(base("llama"))(f"model.{q}") == f"model.{q}" == names_before_v5(f"model.{q}")
    assert llava("nothing.like.it") is None
