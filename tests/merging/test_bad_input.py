"""What cannot be merged: one clear line that names the file and the tensor, nothing written, nothing touched."""

from __future__ import annotations

import json
import math
import os
import pickle
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import peft_many.merging.merge
from peft_many import MAnyConfig, collect_statistics, merge_adapter_files, merge_adapter_sequence, plan_merge
from peft_many.files.errors import StatisticsError, UnmergeableAdapterError
from peft_many.hub.sources import AdapterNotFoundError
from tests import new_process, tiny
from tests.adapters import PROJECTOR, STATISTICS, WEIGHTS, base, batches, files, make, scatter, state_digest

CONFIG = "adapter_config.json"
LAYER = "model.language_model.layers.0.self_attn.q_proj"
SHARED = LAYER.replace("q_proj", "k_proj")  # has the same input as q and v, and stands for all three
TENSOR = f"base_model.model.{LAYER}.lora_A.weight"


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> dict[str, Path]:
    """Adapters with nothing wrong, which must stay so."""
    root = tmp_path_factory.mktemp("good")
    qv = r".*language_model.*(q|v)_proj"
    made = {
        "a": make(root / "a", seed=0, task_name="a").folder,
        "b": make(root / "b", seed=1, task_name="b").folder,
        "llama": make(root / "llama", "llama", seed=2).folder,
        "lora": make(root / "lora", seed=3, kind=LoraConfig, target_modules=qv).folder,
    }
    made["merge"] = merge_adapter_files([made["a"], made["b"]], root / "merge", progress=False)
    before = {name: files(folder) for name, folder in made.items()}
    yield made
    assert {name: files(folder) for name, folder in made.items()} == before
    assert sorted(path.name for path in root.iterdir()) == sorted(made)


@pytest.fixture
def bad(good, tmp_path) -> Path:
    """A copy of adapter a to damage."""
    return Path(shutil.copytree(good["a"], tmp_path / "inputs" / "bad"))


def assert_refused(
    tmp_path: Path,
    adapters: Sequence[Any],
    *words: str,
    error: type[Exception] = UnmergeableAdapterError,
    family: str = "llava",
    **options: Any,
) -> None:
    """Merging fails for both functions, with one line that holds all the words, and leaves no trace."""
    outputs = tmp_path / "outputs"
    outputs.mkdir(exist_ok=True)
    inputs = {str(entry): files(Path(entry)) for entry in adapters if Path(entry).is_dir()}
    model = base(family)
    before = state_digest(model)
    calls: list[Callable[[], Any]] = [
        lambda: merge_adapter_files(adapters, outputs / "merged", progress=False, **options),
        lambda: merge_adapter_sequence(model, adapters, progress=False, **options),
    ]
    for call in calls:
        with pytest.raises(error) as caught:
            call()
        message = str(caught.value)
        assert "\n" not in message
        for word in words:
            assert word in message, f"{word!r} not in: {message}"
    assert list(outputs.iterdir()) == []
    assert state_digest(model) == before
    assert {name: files(Path(name)) for name in inputs} == inputs


def edit(folder: Path, file: str, change: Callable[[dict[str, Tensor]], Any]) -> None:
    """Rewrite a safetensors file with changed tensors."""
    with safe_open(folder / file, framework="pt") as opened:
        metadata = opened.metadata()
    tensors = {key: tensor.clone() for key, tensor in load_file(folder / file).items()}
    change(tensors)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / file, metadata)


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_header(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / STATISTICS
    with safe_open(path, framework="pt") as opened:
        header = json.loads(opened.metadata()["peft_many"])
    change(header)
    save_file(load_file(path), path, {"peft_many": json.dumps(header)})


# ------------------------------------------------------------------------------------------------ missing and broken


def test_missing_weights(good, bad, tmp_path):
    (bad / WEIGHTS).unlink()
    assert_refused(tmp_path, [good["b"], bad], str(bad), f"has no {WEIGHTS}")


@pytest.mark.parametrize("kept", [0, 7, 200, 0.5, 0.999])
def test_truncated_weights(good, bad, tmp_path, kept):
    content = (bad / WEIGHTS).read_bytes()
    (bad / WEIGHTS).write_bytes(content[: kept if isinstance(kept, int) else int(kept * len(content))])
    assert_refused(tmp_path, [good["b"], bad], str(bad / WEIGHTS), "damaged or truncated")


@pytest.mark.parametrize("kept", [0, 7, 200, 0.5, 0.999])
def test_truncated_statistics(good, bad, tmp_path, kept):
    content = (bad / STATISTICS).read_bytes()
    (bad / STATISTICS).write_bytes(content[: kept if isinstance(kept, int) else int(kept * len(content))])
    assert_refused(tmp_path, [good["b"], bad], str(bad / STATISTICS), "damaged or truncated", error=StatisticsError)


def test_no_statistics(good, bad, tmp_path):
    (bad / STATISTICS).unlink()
    assert_refused(tmp_path, [good["b"], bad], str(bad), "has no statistics", "collect_statistics")


class Trap:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_a_pickle_is_never_opened(good, bad, tmp_path):
    sprung = tmp_path / "sprung"
    trap = bad / "adapter_model.bin"
    trap.write_bytes(pickle.dumps(Trap(sprung)))
    pickle.loads(trap.read_bytes())
    assert sprung.exists(), "the trap works"
    sprung.unlink()
    merge_adapter_files([bad, good["b"]], tmp_path / "fine", progress=False)  # beside a safetensors file: ignored
    (bad / WEIGHTS).unlink()
    assert_refused(tmp_path, [good["b"], bad], str(bad), "adapter_model.bin is a pickle, which is never opened")
    (bad / STATISTICS).unlink()
    assert_refused(tmp_path, [good["b"], bad], str(bad), "adapter_model.bin is a pickle, which is never opened")
    assert not sprung.exists()


def test_a_pickle_under_a_safe_name_is_never_opened(good, bad, tmp_path):
    sprung = tmp_path / "sprung"
    for name, error in ((STATISTICS, StatisticsError), (WEIGHTS, UnmergeableAdapterError)):
        (bad / name).write_bytes(pickle.dumps(Trap(sprung)))
        if error is UnmergeableAdapterError:
            shutil.copy(good["a"] / STATISTICS, bad)
        assert_refused(tmp_path, [bad], str(bad / name), "damaged", error=error)
    assert not sprung.exists()


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "3", '{"peft_type": "MANY", "r": "four"}', '{"peft_type": "NEVER_HEARD"}', "{}"]
)
def test_a_broken_config(good, bad, tmp_path, content):
    (bad / CONFIG).write_text(content)
    assert_refused(tmp_path, [good["b"], bad], str(bad))


def test_a_missing_config(good, bad, tmp_path):
    (bad / CONFIG).unlink()
    assert_refused(tmp_path, [good["b"], bad], str(bad), f"has no {CONFIG}")


def test_a_config_of_a_newer_format(good, bad, tmp_path):
    edit_config(bad, format_version=3)
    assert_refused(tmp_path, [bad], str(bad), "format version 3", "reads 2")


def test_no_such_folder(good, tmp_path):
    missing = tmp_path / "nowhere"
    assert_refused(tmp_path, [good["a"], missing], str(missing), "no folder", error=AdapterNotFoundError)
    (tmp_path / "file").write_text("")
    assert_refused(tmp_path, [tmp_path / "file"], "file", "no folder", error=AdapterNotFoundError)
    assert_refused(tmp_path, ["clever"], "no folder 'clever'", error=AdapterNotFoundError)  # offline: see conftest


# ------------------------------------------------------------------------------------------------------------ numbers


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "key",
    [TENSOR, TENSOR.replace("lora_A", "lora_B"), f"base_model.model.{PROJECTOR}.linear_1.weight"],
    ids=["lora_A", "lora_B", "projector"],
)
def test_weights_that_are_not_finite(good, bad, tmp_path, key, value):
    edit(bad, WEIGHTS, lambda tensors: tensors[key].view(-1)[3:4].fill_(value))
    assert_refused(tmp_path, [good["b"], bad], str(bad / WEIGHTS), f"tensor '{key}' holds NaN or Inf")


@pytest.mark.parametrize("half", ["lora_A", "lora_B"])
def test_an_empty_lora(good, bad, tmp_path, half):
    """As sharded training leaves it, where only the first process has the numbers."""
    key = TENSOR.replace("lora_A", half)
    edit(
        bad,
        WEIGHTS,
        lambda tensors: tensors.update({key: tensors[key][:, :0] if half == "lora_A" else tensors[key][:0]}),
    )
    assert_refused(tmp_path, [good["b"], bad], str(bad), "has an empty LoRA")


def test_experts_of_a_merge_that_are_not_finite(good, tmp_path):
    bad = Path(shutil.copytree(good["merge"], tmp_path / "bad"))
    key = f"base_model.model.{PROJECTOR}.experts.task_1.linear_2.bias"
    edit(bad, WEIGHTS, lambda tensors: tensors[key][0].fill_(math.nan))
    assert_refused(tmp_path, [bad], str(bad / WEIGHTS), f"tensor '{key}' holds NaN or Inf")


def first_covariance(tensors: dict[str, Tensor]) -> Tensor:
    return tensors[f"0.covariance.{LAYER}.matrix"]


def asymmetric(tensors: dict[str, Tensor]) -> None:
    first_covariance(tensors)[0, 1] += 1.0


def negative(tensors: dict[str, Tensor]) -> None:
    first_covariance(tensors).neg_()


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda tensors: first_covariance(tensors)[1, 1].fill_(math.nan), "NaN or Inf"),
        (lambda tensors: first_covariance(tensors)[1, 1].fill_(math.inf), "NaN or Inf"),
        (asymmetric, "not symmetric"),
        (negative, "negative"),
    ],
    ids=["nan", "inf", "asymmetric", "negative"],
)
def test_statistics_that_are_no_covariance(good, bad, tmp_path, damage, reason):
    edit(bad, STATISTICS, damage)
    assert_refused(
        tmp_path, [good["b"], bad], str(bad), f"the covariance of '{SHARED}'", reason, error=StatisticsError
    )


def test_prototypes_that_are_not_finite(good, bad, tmp_path):
    edit(bad, STATISTICS, lambda tensors: tensors[f"0.prototype.{PROJECTOR}"][0].fill_(math.nan))
    words = (str(bad / STATISTICS), f"'0.prototype.{PROJECTOR}'", "NaN or Inf")
    assert_refused(tmp_path, [good["b"], bad], *words, error=StatisticsError)


def test_a_merges_own_tensors_that_are_not_finite(good, tmp_path):
    bad = Path(shutil.copytree(good["merge"], tmp_path / "bad"))
    edit(bad, STATISTICS, lambda tensors: tensors[f"1.lora_A.{LAYER}"][0, 0].fill_(math.nan))
    assert_refused(tmp_path, [bad], str(bad), f"lora_A of '{LAYER}'", "'b'", "NaN or Inf")


def test_a_covariance_of_another_width(good, bad, tmp_path):
    edit(bad, STATISTICS, lambda tensors: tensors.update({f"0.covariance.{LAYER}.matrix": torch.eye(31).double()}))
    assert_refused(tmp_path, [good["b"], bad], str(bad), SHARED, "width 31", "32")


def test_a_missing_covariance(good, bad, tmp_path):
    edit_header(bad, lambda header: header["tasks"][0]["input_of"].pop(LAYER))
    assert_refused(tmp_path, [good["b"], bad], str(bad), LAYER, "no covariance")


def test_statistics_of_another_training_run(good, bad, tmp_path):
    key = TENSOR.replace("lora_A", "lora_B")
    edit(bad, WEIGHTS, lambda tensors: tensors[key].mul_(1.01))
    assert_refused(tmp_path, [good["b"], bad], str(bad), LAYER, "trained further", "collect_statistics")


def test_a_scaling_that_is_no_number(good, bad, tmp_path):
    edit_config(bad, lora_alpha=math.nan)
    assert_refused(tmp_path, [good["b"], bad], str(bad), "`lora_alpha` cannot be nan")


@pytest.mark.parametrize("half", ["lora_A", "lora_B"])
def test_a_little_training_after_measuring_is_noticed(good, bad, tmp_path, half):
    key = TENSOR.replace("lora_A", half)
    generator = torch.Generator().manual_seed(0)

    def train(tensors):
        step = torch.randn(tensors[key].shape, generator=generator)
        tensors[key] += 0.02 * tensors[key].norm() / step.norm() * step

    edit(bad, WEIGHTS, train)
    assert_refused(tmp_path, [good["b"], bad], str(bad), LAYER, "trained further", "collect_statistics")


def test_a_cast_to_bfloat16_is_no_training(good, tmp_path):
    cast = Path(shutil.copytree(good["a"], tmp_path / "cast"))
    edit(cast, WEIGHTS, lambda tensors: tensors.update({k: v.bfloat16() for k, v in tensors.items()}))
    merge_adapter_files([cast, good["b"]], tmp_path / "fine", progress=False)


@pytest.mark.parametrize("half", ["lora_A", "lora_B"])
def test_a_merge_that_was_trained_further(good, tmp_path, half):
    bad = Path(shutil.copytree(good["merge"], tmp_path / "further"))
    edit(bad, WEIGHTS, lambda tensors: tensors[TENSOR.replace("lora_A", half)][0].mul_(1.5))
    assert_refused(tmp_path, [bad], str(bad), LAYER, "trained further after merging")


def test_statistics_of_another_number_of_tasks(good, tmp_path):
    bad = Path(shutil.copytree(good["a"], tmp_path / "1"))
    shutil.copy(good["merge"] / STATISTICS, bad)
    assert_refused(tmp_path, [bad], str(bad), "2 tasks")
    bad = Path(shutil.copytree(good["merge"], tmp_path / "2"))
    shutil.copy(good["a"] / STATISTICS, bad)
    assert_refused(tmp_path, [bad], str(bad), "names 2 tasks", "hold 1")


@pytest.mark.parametrize("change", ["rows", "layer", "width"])
def test_a_merge_whose_statistics_disagree_with_its_weights(good, tmp_path, change):
    bad = Path(shutil.copytree(good["merge"], tmp_path / "bad"))
    key = f"1.lora_A.{LAYER}"
    if change == "rows":
        edit(bad, STATISTICS, lambda tensors: tensors.update({key: tensors[key][:-1]}))
    elif change == "width":
        edit(bad, STATISTICS, lambda tensors: tensors.update({key: tensors[key][:, :-1]}))
    else:
        edit_header(bad, lambda header: header["tasks"][1]["lora_A"].remove(LAYER))
    assert_refused(tmp_path, [bad], str(bad), f"disagree on the ranks of '{LAYER}'")


# ------------------------------------------------------------------------------------------- other models and shapes


def rename(tensors: dict[str, Tensor], old: str, new: str) -> None:
    for key in list(tensors):
        if old in key:
            tensors[key.replace(old, new)] = tensors.pop(key)


def test_a_key_without_the_prefix(good, bad, tmp_path):
    edit(bad, WEIGHTS, lambda tensors: rename(tensors, TENSOR, f"somewhere.{LAYER}.lora_A.weight"))
    assert_refused(tmp_path, [good["b"], bad], str(bad), f"'somewhere.{LAYER}.lora_A.weight'")


def test_half_a_pair(good, bad, tmp_path):
    edit(bad, WEIGHTS, lambda tensors: tensors.pop(TENSOR))
    assert_refused(tmp_path, [good["b"], bad], str(bad), LAYER, "lora_A")


def test_a_key_that_is_no_lora_weight(good, bad, tmp_path):
    key = f"base_model.model.{LAYER}.lora_magnitude_vector"
    edit(bad, WEIGHTS, lambda tensors: tensors.update({key: torch.ones(32)}))
    assert_refused(tmp_path, [good["b"], bad], str(bad), key.removeprefix("base_model.model."))


def test_a_module_trained_whole(good, bad, tmp_path):
    edit(bad, WEIGHTS, lambda tensors: tensors.update({"base_model.model.lm_head.weight": torch.ones(128, 32)}))
    edit_config(bad, modules_to_save=[PROJECTOR, "lm_head"])
    assert_refused(tmp_path, [good["b"], bad], str(bad), "'lm_head.weight'", "whole")


@pytest.mark.parametrize("half", ["lora_A", "lora_B"])
def test_lora_weights_of_a_sharded_run(good, bad, tmp_path, half):
    """FSDP leaves flat pieces, and ZeRO-3 nothing at all."""
    key = TENSOR.replace("lora_A", half)
    for size in (0, 10):
        edit(bad, WEIGHTS, lambda tensors, size=size: tensors.update({key: torch.zeros(size)}))
        assert_refused(tmp_path, [good["b"], bad], str(bad), LAYER, f"({size},)", "sharded over processes")


def test_a_projector_of_a_sharded_run(good, tmp_path):
    """All adapters of such a run are alike, so that none of them looks strange beside the others."""
    folders = [Path(shutil.copytree(good[name], tmp_path / name)) for name in "ab"]
    for folder in folders:
        edit(folder, WEIGHTS, lambda tensors: tensors.update({k: torch.zeros(0) for k in tensors if PROJECTOR in k}))
        (problem,) = plan_merge([folder], progress=False).problems
        assert PROJECTOR in problem
    assert_refused(tmp_path, folders, str(folders[0]), f"{PROJECTOR}.linear_1.bias", "empty", "sharded over processes")


@pytest.mark.parametrize("damage", [torch.flatten, torch.sum])
@pytest.mark.parametrize("part", [f"{PROJECTOR}.linear_1.weight", PROJECTOR])
def test_a_projector_of_flat_weights(good, tmp_path, damage, part):
    """As FSDP1 leaves them, in all adapters alike."""
    folders = [Path(shutil.copytree(good[name], tmp_path / name)) for name in "ab"]
    for folder in folders:
        damaged = {key: damage(tensor) for key, tensor in load_file(folder / WEIGHTS).items() if part in key}
        edit(folder, WEIGHTS, lambda tensors, damaged=damaged: tensors.update(damaged))
        (problem,) = plan_merge([folder], progress=False).problems
        assert PROJECTOR in problem
    assert_refused(tmp_path, folders, str(folders[0]), f"{PROJECTOR}.linear_", "impossible shape", "sharded")


@pytest.mark.parametrize("damage", [lambda tensor: None, lambda tensor: tensor[:-1].clone()])
@pytest.mark.parametrize("part", ["linear_1.bias", "linear_1", "linear_2.weight"])
def test_a_projector_that_is_not_as_it_was_measured(good, tmp_path, damage, part):
    """In all adapters alike, and each consistent in itself: only loading the merge would tell."""
    folders = [Path(shutil.copytree(good[name], tmp_path / name)) for name in "ab"]

    def spoil(tensors):
        for key in [key for key in tensors if f"{PROJECTOR}.{part}" in key]:
            if (left := damage(tensors.pop(key))) is not None:
                tensors[key] = left

    for folder in folders:
        edit(folder, WEIGHTS, spoil)
        (problem,) = plan_merge([folder], progress=False).problems
        assert PROJECTOR in problem
    assert_refused(tmp_path, folders, str(folders[0]), f"{PROJECTOR}.{part}", "when it was measured")


@pytest.mark.parametrize("projectors", ["routed", "mean"])
def test_a_projector_in_a_merge_that_is_not_as_it_was_measured(good, tmp_path, projectors):
    merged = merge_adapter_files([good["a"], good["b"]], tmp_path / "m", projectors=projectors, progress=False)
    whole = (merged / WEIGHTS).read_bytes()
    for part, word in (("linear_1.bias", "linear_1.bias"), ("", "lacks the tensors of its projector")):
        (merged / WEIGHTS).write_bytes(whole)

        def spoil(tensors, part=part):
            for key in [key for key in tensors if PROJECTOR in key and "prototypes" not in key and part in key]:
                del tensors[key]

        edit(merged, WEIGHTS, spoil)
        assert_refused(tmp_path, [merged], str(merged), "task 'a'", PROJECTOR, word)


@pytest.mark.parametrize("key", [TENSOR, f"base_model.model.{PROJECTOR}.linear_1.weight"])
def test_weights_that_are_whole_numbers(good, bad, tmp_path, key):
    edit(bad, WEIGHTS, lambda tensors: tensors.update({key: tensors[key].to(torch.int8)}))
    assert_refused(tmp_path, [good["b"], bad], str(bad), key, "int8")


def test_a_part_of_the_projector(good, bad, tmp_path):
    """Merged as it is, the rest of that task's projector would be made up."""
    bad = Path(shutil.copytree(good["lora"], tmp_path / "part"))
    key = f"base_model.model.{PROJECTOR}.linear_1.weight"
    edit(bad, WEIGHTS, lambda tensors: tensors.update({key: load_file(good["a"] / WEIGHTS)[key]}))
    edit_config(bad, modules_to_save=["linear_1"])
    assert_refused(tmp_path, [good["b"], bad], str(bad), f"{PROJECTOR}.linear_1.weight", "whole")


def test_lora_inside_a_projector_that_others_trained_whole(good, tmp_path):
    targets = r".*(language_model.*q_proj|linear_1)"
    model = get_peft_model(base("llava"), LoraConfig(r=2, target_modules=targets))
    scatter(model, 5)
    collect_statistics(model, batches(model, "llava", 5), progress=False)
    model.save_pretrained(tmp_path / "inside")
    alone = merge_adapter_files([tmp_path / "inside"], tmp_path / "alone", progress=False)
    assert f"base_model.model.{PROJECTOR}.linear_1.lora_A.weight" in load_file(alone / WEIGHTS)
    assert_refused(
        tmp_path, [good["a"], tmp_path / "inside"], str(tmp_path / "inside"), f"{PROJECTOR}.linear_1", PROJECTOR
    )


def test_a_rank_that_the_config_does_not_say(good, bad, tmp_path):
    edit_config(bad, r=5)
    assert_refused(tmp_path, [good["b"], bad], str(bad), "rank 5", "(4, ")


def test_a_layer_that_is_not_linear(good, bad, tmp_path):
    edit(bad, WEIGHTS, lambda tensors: tensors.update({TENSOR: tensors[TENSOR][..., None, None]}))
    assert_refused(tmp_path, [good["b"], bad], str(bad), LAYER, "no linear layer")


@pytest.mark.parametrize("targets", [["embed_tokens"], ["embed_tokens", "q_proj"]])
def test_an_adapter_on_the_embedding(good, tmp_path, targets):
    get_peft_model(base("llama"), LoraConfig(r=2, target_modules=targets)).save_pretrained(tmp_path / "embedding")
    words = str(tmp_path / "embedding"), "embed_tokens.lora_embedding_A", "only linear layers"
    assert_refused(tmp_path, [good["llama"], tmp_path / "embedding"], *words, family="llama")


def test_other_shapes_than_the_other_adapters(good, tmp_path):
    wide = tiny.build("llava")
    wide = type(wide)(wide.config.__class__.from_dict({**wide.config.to_dict(), **WIDER}))
    adapter(tmp_path / "wide", wide)
    assert_refused(
        tmp_path, [good["a"], tmp_path / "wide"], str(tmp_path / "wide"), str(good["a"]), "down_proj", "base models"
    )


WIDER = {"text_config": {**tiny.build("llava").config.text_config.to_dict(), "intermediate_size": 56}}


def adapter(folder: Path, model: Any, seed: int = 7) -> None:
    """An adapter of a model that is none of `base`."""
    wrapped = get_peft_model(model, MAnyConfig(r=2, task_name=folder.name))
    scatter(wrapped, seed)
    collect_statistics(wrapped, batches(model, "llava", seed), progress=False)
    wrapped.save_pretrained(folder)


def assert_base_refused(adapters: Sequence[Path], model: Any, *words: str) -> None:
    before = state_digest(model)
    with pytest.raises(UnmergeableAdapterError) as caught:
        merge_adapter_sequence(model, adapters, progress=False)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value), f"{word!r} not in: {caught.value}"
    assert state_digest(model) == before


def changed_llava(**text: Any) -> Any:
    config = tiny.build("llava").config.to_dict()
    config["text_config"].update(text)
    return type(tiny.build("llava"))(tiny.build("llava").config.__class__.from_dict(config))


def test_a_base_model_of_another_size(good):
    model = changed_llava(intermediate_size=56)
    assert_base_refused([good["a"], good["b"]], model, "Llava", "mlp.", "56", "48")


def test_a_base_model_with_fewer_or_more_layers(good):
    assert_base_refused([good["a"]], changed_llava(num_hidden_layers=1), "layers.1.", "matches no module")
    assert_base_refused([good["a"]], changed_llava(num_hidden_layers=3), "layers.2.", "no tensor")


def test_a_base_model_of_another_family(good):
    assert_base_refused(
        [good["a"]], base("llama"), "language_model.layers.0.", "matches no module of LlamaForCausalLM"
    )
    assert_base_refused([good["llama"]], base("llava"), "matches no module of Llava")


def test_a_base_model_with_another_projector(good):
    model = base("llava")
    model.model.multi_modal_projector.linear_2 = torch.nn.Linear(32, 32, bias=False)
    assert_base_refused([good["a"]], model, f"{PROJECTOR}.linear_2.bias", "no such tensor")
    model.model.multi_modal_projector.linear_2 = torch.nn.Sequential(torch.nn.Linear(32, 32))
    assert_base_refused([good["a"]], model, f"{PROJECTOR}.linear_2.", "Llava")
    model = base("llava")
    model.model.multi_modal_projector.linear_3 = torch.nn.Linear(32, 32)
    assert_base_refused([good["a"]], model, f"{PROJECTOR}.linear_3.bias", "missing")


def test_a_base_model_whose_layer_is_no_linear_one(good):
    model = base("llava")
    model.get_submodule(LAYER.rpartition(".")[0]).q_proj = torch.nn.Embedding(32, 32)
    assert_base_refused([good["a"]], model, LAYER, "Embedding")


def test_a_base_model_with_adapters(good):
    wrapped = get_peft_model(base("llava"), MAnyConfig())
    injected = base("llava")
    injected.add_adapter(LoraConfig(target_modules=["q_proj"]))
    for model in (wrapped, wrapped.base_model, injected):
        before = state_digest(model)
        with pytest.raises(ValueError, match="already has adapters"):
            merge_adapter_sequence(model, [good["a"]], progress=False)
        assert state_digest(model) == before


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError("CUDA out of memory")])
@pytest.mark.parametrize("step", ["get_peft_model", "set_peft_model_state_dict"])
def test_a_failure_while_the_base_model_is_wrapped(good, monkeypatch, step, error):
    """Half wrapped or wrapped without weights, the model would give wrong answers to whoever retries."""
    real = getattr(peft_many.merging.merge, step)

    def fails_late(*args: Any, **kwargs: Any) -> Any:
        real(*args, **kwargs)
        raise error

    monkeypatch.setattr(peft_many.merging.merge, step, fails_late)
    model = base("llava")
    before = state_digest(model)
    with pytest.raises(BaseException, match="memory" if isinstance(error, RuntimeError) else None):
        merge_adapter_sequence(model, [good["a"], good["b"]], progress=False)
    assert state_digest(model) == before
    monkeypatch.undo()
    assert merge_adapter_sequence(model, [good["a"], good["b"]], progress=False).active_adapters == ["default"]


# ------------------------------------------------------------------------------------------------- kinds of adapters


OPTIONS = [
    {"use_dora": True},
    {"bias": "lora_only"},
    {"lora_bias": True},
    {"trainable_token_indices": [5]},
    {"layer_replication": [[0, 2], [1, 2]]},
    {"target_parameters": ["q_proj.weight"]},
    {"alora_invocation_tokens": [5, 6]},
    {"use_qalora": True},
    {"init_lora_weights": "pissa"},
    {"init_lora_weights": "pissa_niter_4"},
    {"init_lora_weights": "olora"},
    {"init_lora_weights": "corda"},
    {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}},
]


@pytest.mark.parametrize("option", OPTIONS, ids=str)
@pytest.mark.parametrize("name", ["a", "lora"])
def test_options_whose_effect_is_no_low_rank_delta(good, tmp_path, name, option):
    bad = Path(shutil.copytree(good[name], tmp_path / "bad"))
    edit_config(bad, **option)
    module = [] if {"bias", "alora_invocation_tokens"} & {*option} else ["_proj"]
    assert_refused(tmp_path, [good["b"], bad], str(bad), f"`{next(iter(option))}", *module)


def test_a_dora_adapter_whose_config_hides_it(good, tmp_path):
    model = get_peft_model(base("llava"), MAnyConfig(r=2, use_dora=True, task_name="dora"))
    scatter(model, 4)
    collect_statistics(model, batches(model, "llava", 4), progress=False)
    model.save_pretrained(tmp_path / "dora")
    edit_config(tmp_path / "dora", use_dora=False)
    assert_refused(tmp_path, [good["b"], tmp_path / "dora"], str(tmp_path / "dora"), "lora_magnitude_vector", "_proj")


def test_an_adapter_of_another_type(good, tmp_path):
    model = get_peft_model(base("llava"), IA3Config(target_modules=["q_proj"], feedforward_modules=[]))
    model.save_pretrained(tmp_path / "ia3")
    assert_refused(
        tmp_path, [good["b"], tmp_path / "ia3"], str(tmp_path / "ia3"), "IA3", "multiplies weights or activations"
    )


def test_an_adapter_that_was_not_measured(good, tmp_path):
    for name, config in (("many", MAnyConfig(r=2)), ("lora", LoraConfig(r=2, target_modules=["q_proj"]))):
        get_peft_model(base("llava"), config).save_pretrained(tmp_path / name)
        assert_refused(tmp_path, [good["b"], tmp_path / name], str(tmp_path / name), "no statistics")


def test_a_projector_that_saw_no_image(good, tmp_path):
    made = make(tmp_path / "blind", images=False)
    assert_refused(tmp_path, [good["b"], made.folder], str(made.folder), PROJECTOR, "image")


# ------------------------------------------------------------------------------------------------------ the list


def test_an_empty_list(tmp_path):
    assert_refused(tmp_path, [], "at least one", error=ValueError)


def test_a_string_for_a_list(good, tmp_path):
    for one in (str(good["a"]), good["a"]):
        with pytest.raises(ValueError, match="list"):
            merge_adapter_files(one, tmp_path / "merged", progress=False)
        with pytest.raises(ValueError, match="list"):
            merge_adapter_sequence(base("llava"), one, progress=False)
    assert list(tmp_path.iterdir()) == []


def test_the_same_adapter_twice(good, tmp_path):
    a, b, merge = good["a"], good["b"], good["merge"]
    copied = Path(shutil.copytree(a, tmp_path / "another name"))
    edit_config(copied, task_name="another name")
    assert_refused(tmp_path, [a, b, a], "twice", str(a))
    assert_refused(tmp_path, [a, Path(f"{a}/../a")], "twice", str(a))
    assert_refused(tmp_path, [a, copied], "twice", str(a), str(copied))
    assert_refused(tmp_path, [merge, a], "twice", str(a), f"{merge}, task 'a'")
    assert_refused(tmp_path, [copied, merge], "twice", str(copied), f"{merge}, task 'a'")
    assert_refused(tmp_path, [merge, merge], "twice", str(merge))
    again = merge_adapter_files([merge], tmp_path / "again", progress=False)
    assert_refused(tmp_path, [again, merge], "twice", str(merge), str(again))


def test_task_names_that_clash(good, tmp_path):
    other = Path(shutil.copytree(good["b"], tmp_path / "other"))
    edit_config(other, task_name="a")
    assert_refused(tmp_path, [good["a"], other], "'a'", str(good["a"]), str(other), "`task_names`")
    assert_refused(tmp_path, [good["a"], good["b"]], "'x'", task_names=["x", "x"])
    assert_refused(tmp_path, [good["a"], good["b"]], "'b'", task_names=["b", None])
    merge_adapter_files([good["a"], other], tmp_path / "fine", task_names=[None, "c"], progress=False)


def test_one_name_for_a_merge(good, tmp_path):
    assert_refused(tmp_path, [good["merge"]], str(good["merge"]), "'x'", error=ValueError, task_names=["x"])


@pytest.mark.parametrize(
    "changes",
    [
        {"tasks": [{}, {}]},
        {"tasks": 5},
        {"tasks": [{"name": name, "weight": 1.0, "origin": {"sha256": "0"}} for name in (1, 2)]},
        {"tasks": [{"name": name, "weight": "heavy", "origin": {"sha256": "0"}} for name in "ab"]},
        {"tasks": [{"name": name, "weight": 1.0, "origin": {"sha256": None}} for name in "ab"]},
        {"routing": {"model.multi_modal_projector": {}}},
    ],
)
def test_a_merge_whose_config_holds_nonsense(good, tmp_path, changes):
    bad = Path(shutil.copytree(good["merge"], tmp_path / "nonsense"))
    record = json.loads((bad / CONFIG).read_text())["merge"]
    edit_config(bad, merge={**record, **changes})
    assert_refused(tmp_path, [bad], str(bad), "`merge` cannot be used")


def test_a_rank_pattern_that_is_none(good, tmp_path):
    bad = Path(shutil.copytree(good["merge"], tmp_path / "nonsense"))
    edit_config(bad, rank_pattern=[1])
    assert_refused(tmp_path, [bad], str(bad))


@pytest.mark.parametrize(
    "weights", [[1.0], [1.0, 1.0, 1.0], [-1.0, 1.0], [math.nan, 1.0], [math.inf, 1.0], [0.0, 0.0]]
)
def test_weights_that_make_no_sense(good, tmp_path, weights):
    assert_refused(tmp_path, [good["a"], good["b"]], "weight", error=ValueError, weights=weights)


@pytest.mark.parametrize(("option", "value"), [("ridge", -1e-3), ("temperature", 0.0), ("temperature", -1.0)])
def test_numbers_that_make_no_sense(good, tmp_path, option, value):
    assert_refused(tmp_path, [good["a"], good["b"]], f"`{option}`", error=ValueError, **{option: value})


def test_a_wrong_number_of_task_names(good, tmp_path):
    assert_refused(tmp_path, [good["a"], good["b"]], "`task_names` has 1", error=ValueError, task_names=["x"])


# -------------------------------------------------------------------------------------------------------- the output


def assert_not_written(good: dict[str, Path], output: Path, error: type[BaseException], *words: str) -> None:
    """Merging fails, and everything around the output stays as it is."""
    around = next(parent for parent in output.parents if parent.is_dir())
    before, listing = files(around), sorted(path.name for path in around.iterdir())
    with pytest.raises(error) as caught:
        merge_adapter_files([good["a"], good["b"]], output, progress=False)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value), f"{word!r} not in: {caught.value}"
    assert files(around) == before
    assert sorted(path.name for path in around.iterdir()) == listing


def test_an_output_folder_that_exists(good, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    assert_not_written(good, tmp_path / "full", FileExistsError, str(tmp_path / "full"), "not empty")
    (tmp_path / "file").write_text("mine")
    assert_not_written(good, tmp_path / "file", FileExistsError, str(tmp_path / "file"))
    (tmp_path / "link").symlink_to(tmp_path / "full", target_is_directory=True)
    assert_not_written(good, tmp_path / "link", FileExistsError, str(tmp_path / "full"))


def test_an_output_folder_below_a_file(good, tmp_path):
    (tmp_path / "file").write_text("mine")
    for output in (tmp_path / "file" / "merged", tmp_path / "file" / "deep" / "merged"):
        assert_not_written(good, output, OSError, str(output), str(tmp_path / "file"))


def test_an_output_folder_that_is_the_input(good, tmp_path):
    with pytest.raises(FileExistsError):
        merge_adapter_files([good["a"], good["b"]], good["a"], progress=False)


READ_ONLY = """
import os, sys
from pathlib import Path
from peft_many.files.atomic import new_folder
if os.geteuid() == 0:
    os.setuid(65534)  # root may write everywhere
try:
    with new_folder(Path(sys.argv[1])):
        print("it began")
except PermissionError as error:
    print(error)
"""


def test_a_read_only_folder(good, tmp_path, monkeypatch):
    """In a process of another user: the tests may run as root."""
    with tempfile.TemporaryDirectory() as locked:
        os.chmod(locked, 0o555)
        output = Path(locked, "new", "merged")
        done = new_process.run(READ_ONLY, output)
        assert done.returncode == 0, done.stderr
        assert done.stdout == f"The output folder '{output}' cannot be created: '{locked}': Permission denied.\n"
        assert os.listdir(locked) == []

    def denied(*args: Any, **kwargs: Any) -> str:
        raise PermissionError(13, "Permission denied", "/some/.temporary.name")

    monkeypatch.setattr("peft_many.files.atomic.Path.mkdir", denied)
    assert_not_written(good, tmp_path / "merged", PermissionError, str(tmp_path / "merged"), "Permission denied")
