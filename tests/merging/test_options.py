"""What merging can be told, and half precision on disk: the numbers against references of their own."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from peft_many import MAnyConfig, collect_statistics, merge_adapter_files, merge_adapter_sequence
from peft_many.files.errors import UnmergeableAdapterError
from peft_many.files.fingerprints import same_weights, weight_fingerprint
from peft_many.files.statistics import AdapterStatistics
from peft_many.tuner.projector import ProjectorMixture
from tests.adapters import (
    PROJECTOR,
    STATISTICS,
    WEIGHTS,
    Made,
    base,
    batches,
    but_operations,
    covariances,
    distance,
    effective_deltas,
    files,
    logits,
    make,
    merged_deltas,
    recorded,
    reference,
    state_digest,
)

PREFIX = "base_model.model."
RIDGE = 1e-4
HALVES = (torch.bfloat16, torch.float16)
# What rounding both factors of a delta to a dtype may do to it.
ROUNDING = {torch.bfloat16: 1e-2, torch.float16: 1e-3}

RECIPES: dict[str, tuple[str, dict[str, Any]]] = {
    "a": ("llama", {"task_name": "a", "target_modules": "all-linear"}),
    "b": ("llama", {"task_name": "b", "target_modules": "all-linear", "r": 2}),
    "c": ("llama", {"task_name": "c", "target_modules": "all-linear", "r": 6, "rank_pattern": {"q_proj": 3}}),
    "a few": ("llama", {"task_name": "a few", "rows": 1}),
    "b few": ("llama", {"task_name": "b few", "rows": 1}),
    "large": ("llama", {"task_name": "large", "r": 12, "lora_alpha": 24, "rows": 1}),
    "large too": ("llama", {"task_name": "large too", "r": 12, "lora_alpha": 24}),
    "truncated a": ("llama", {"task_name": "truncated a", "energy": 0.999, "lora_alpha": 7}),
    "truncated b": ("llama", {"task_name": "truncated b", "energy": 0.9, "lora_alpha": 5}),
    "truncated few": ("llama", {"task_name": "truncated few", "energy": 0.999, "rows": 1}),
    "image a": ("llava", {"task_name": "image a"}),
    "image b": ("llava", {"task_name": "image b"}),
}


@pytest.fixture(scope="module")
def shelf(tmp_path_factory) -> Callable[[str], Made]:
    """Makes adapters on request, once each."""
    root = tmp_path_factory.mktemp("shelf")
    made: dict[str, Made] = {}

    def get(name: str) -> Made:
        if name not in made:
            family, options = RECIPES[name]
            made[name] = make(root / name, family, seed=list(RECIPES).index(name), **options)
        return made[name]

    return get


@pytest.fixture(scope="module")
def fresh(tmp_path_factory) -> Callable[[], Path]:
    """A folder that does not exist yet; hypothesis runs a test many times."""
    root = tmp_path_factory.mktemp("merges")
    return lambda: Path(tempfile.mkdtemp(dir=root)) / "merged"


def merge(output: Path, tasks: Sequence[Made | Path], **options: Any) -> Path:
    folders = [task.folder if isinstance(task, Made) else task for task in tasks]
    return merge_adapter_files(folders, output, progress=False, **options)


def second_moments(tasks: Sequence[Made], layer: str, ridge: float) -> list[Tensor]:
    """`C_t` with the ridge inside, dense and in float64."""
    found = []
    for task in tasks:
        x = task.inputs[layer]
        moment = x.T @ x / len(x)
        found.append(moment + ridge * moment.diagonal().mean() * torch.eye(len(moment), dtype=torch.float64))
    return found


def of_rank(tasks: Sequence[Made], layer: str, rank: int, ridge: float, weights: Sequence[float]) -> Tensor:
    """Truncate `ΔW* R^½` by SVD and map it back: reduced-rank regression as textbooks have it."""
    best = reference(tasks, layer, ridge, weights)
    moments = second_moments(tasks, layer, ridge)
    values, vectors = torch.linalg.eigh(sum(weight * moment for weight, moment in zip(weights, moments)))
    root, inverse = (vectors * values.sqrt()) @ vectors.T, (vectors / values.sqrt()) @ vectors.T
    return svd_of_rank(best @ root, rank) @ inverse


def svd_of_rank(matrix: Tensor, rank: int) -> Tensor:
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    return (U[:, :rank] * S[:rank]) @ Vh[:rank]


def objective(tasks: Sequence[Made], layer: str, merged: Tensor, ridge: float, weights: Sequence[float]) -> float:
    """`Σ_t w_t ‖(ΔW − ΔW_t) C_t^½‖²`."""
    gaps = [merged - task.deltas[layer] for task in tasks]
    moments = second_moments(tasks, layer, ridge)
    return sum((w * ((gap @ moment) * gap).sum()).item() for w, gap, moment in zip(weights, gaps, moments))


def ranks_of(folder: Path) -> dict[str, int]:
    found = {}
    for key, tensor in load_file(folder / WEIGHTS).items():
        if key.endswith(".lora_A.weight"):
            other = load_file(folder / WEIGHTS)[key.replace("lora_A", "lora_B")]
            assert len(tensor) == other.shape[1]
            found[key.removeprefix(PREFIX).removesuffix(".lora_A.weight")] = len(tensor)
    return found


def with_deltas(family: str, deltas: dict[str, Tensor]) -> nn.Module:
    """The base model with the deltas added to its weights."""
    model = base(family)
    with torch.no_grad():
        for layer, delta in deltas.items():
            weight = model.get_submodule(layer).weight
            weight.copy_(weight.double() + delta)
    return model


def stored_in_B(folder: Path) -> set[str]:
    """The layers whose tasks' `B_t` are kept in the statistics, as the merged `B` is not made of them."""
    with safe_open(folder / STATISTICS, "pt") as file:
        return {key.partition(".lora_B.")[2] for key in file.keys() if ".lora_B." in key}  # noqa: SIM118


# ---------------------------------------------------------------------------------------------------------- rank


@settings(max_examples=25)
@given(
    st.integers(1, 11),
    st.sampled_from([1e-2, 1e-4, 1e-6]),
    st.lists(st.sampled_from([0.3, 1.0, 2.0]), min_size=3, max_size=3),
)
def test_each_layer_gets_the_best_delta_of_the_rank(shelf, fresh, rank, ridge, weights):
    tasks = [shelf(name) for name in "abc"]
    folder = merge(fresh(), tasks, rank=rank, ridge=ridge, weights=weights)
    ranks = ranks_of(folder)
    for layer, found in merged_deltas(folder).items():
        whole = 4 + 2 + (3 if layer.endswith("q_proj") else 6)
        assert ranks[layer] == min(rank, whole)
        expected = of_rank(tasks, layer, rank, ridge, weights)
        assert distance(found, expected) < 1e-5, layer
        plain = svd_of_rank(reference(tasks, layer, ridge, weights), rank)
        losses = [objective(tasks, layer, delta, ridge, weights) for delta in (found, expected, plain)]
        assert losses[0] <= losses[1] * (1 + 1e-6), layer
        assert losses[0] <= losses[2] * (1 + 1e-6), layer


def test_plain_svd_is_clearly_worse(shelf, tmp_path):
    """So that the test above can fail."""
    tasks = [shelf(name) for name in "abc"]
    for layer, found in merged_deltas(merge(tmp_path / "merged", tasks, rank=3)).items():
        best = reference(tasks, layer, RIDGE, [1.0] * 3)
        assert distance(found, svd_of_rank(best, 3)) > 0.1
        losses = [objective(tasks, layer, W, RIDGE, [1.0] * 3) for W in (best, found, svd_of_rank(best, 3))]
        assert losses[0] < losses[1] < losses[2]


def tensors_of(folder):
    return {name: content for name, content in files(folder).items() if name in (WEIGHTS, STATISTICS)}


def test_enough_rank_changes_no_byte(shelf, tmp_path):
    tasks = [shelf(name) for name in "abc"]
    whole = tensors_of(merge(tmp_path / "whole", tasks))
    assert tensors_of(merge(tmp_path / "12", tasks, rank=12)) == whole
    assert tensors_of(merge(tmp_path / "1000", tasks, rank=1000)) == whole
    assert tensors_of(merge(tmp_path / "11", tasks, rank=11)) != whole
    assert stored_in_B(tmp_path / "12") == set()
    # Three tasks of q_proj have rank 9 together, and that layer is as it was.
    assert stored_in_B(tmp_path / "11") == {layer for layer in tasks[0].deltas if not layer.endswith("q_proj")}


@pytest.mark.parametrize("rank", [4, 16, 20, 23])
def test_a_layer_of_fewer_outputs_than_the_rank(shelf, tmp_path, rank):
    """v_proj has 16 outputs; the file says the same rank for all layers, and the delta has what it can have."""
    tasks = [shelf("large"), shelf("large too")]
    folder = merge(tmp_path / "merged", tasks, rank=rank)
    assert set(ranks_of(folder).values()) == {rank}
    for layer, found in merged_deltas(folder).items():
        assert distance(found, of_rank(tasks, layer, rank, RIDGE, [1.0, 1.0])) < 1e-5, layer
    loaded = PeftModel.from_pretrained(base("llama"), folder)
    assert distance(logits(loaded, "llama"), logits(with_deltas("llama", merged_deltas(folder)), "llama")) < 1e-5


@pytest.mark.parametrize("rank", [1, 5])
def test_a_merge_of_lower_rank_is_merged_further_as_if_it_were_none(shelf, tmp_path, rank):
    a, b, c = (shelf(name) for name in "abc")
    first = merge(tmp_path / "first", [a, b], rank=rank, weights=[1.0, 0.5])
    weights = {"weights": [1.0, 0.5, 2.0]}
    at_once = but_operations(merge(tmp_path / "at once", [a, b, c], **weights))
    assert but_operations(merge(tmp_path / "further", [first, c], weights=[1.0, 2.0])) == at_once
    limited = but_operations(merge(tmp_path / "limited at once", [a, b, c], rank=3, **weights))
    assert but_operations(merge(tmp_path / "limited", [c, first], rank=3, weights=[2.0, 1.0])) == limited
    again = merge(tmp_path / "again", [merge(tmp_path / "of one", [first], rank=2)])
    assert but_operations(again) == but_operations(merge(tmp_path / "a and b", [a, b], weights=[1.0, 0.5]))


def test_a_merge_of_lower_rank_is_saved_and_loaded(shelf, tmp_path):
    a, b, c = (shelf(name) for name in "abc")
    folder = merge(tmp_path / "files", [a, b], rank=3)
    sequence = merge_adapter_sequence(base("llama"), [b.folder, a.folder], rank=3, progress=False)
    sequence.save_pretrained(tmp_path / "sequence")
    loaded = PeftModel.from_pretrained(base("llama"), folder)
    loaded.save_pretrained(tmp_path / "loaded")
    expected = logits(with_deltas("llama", merged_deltas(folder)), "llama")
    for model in (loaded, sequence):
        assert distance(logits(model, "llama"), expected) < 1e-5
    assert distance(logits(loaded.merge_and_unload(), "llama"), expected) < 1e-5
    further = files(merge(tmp_path / "further", [folder, c]))
    for name in ("sequence", "loaded"):
        for file in (WEIGHTS, STATISTICS):
            assert files(tmp_path / name)[file] == files(folder)[file], file
            assert files(merge(tmp_path / f"{name}, further", [tmp_path / name, c]))[file] == further[file]
            (tmp_path / f"{name}, further").rename(tmp_path / f"{name}, {file}")


@pytest.mark.parametrize("half", "AB")
def test_training_a_merge_of_lower_rank_further_is_noticed(shelf, tmp_path, half):
    folder = merge(tmp_path / "first", [shelf("a"), shelf("b")], rank=3)
    tensors = load_file(folder / WEIGHTS)
    tensors[f"{PREFIX}model.layers.1.mlp.down_proj.lora_{half}.weight"][0] += 0.2
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    with pytest.raises(UnmergeableAdapterError, match=r"down_proj' has changed"):
        merge(tmp_path / "further", [folder, shelf("c")])


MISSING = "missing"


@pytest.mark.parametrize("damage", [MISSING, "another shape", "not finite"])
def test_a_merge_of_lower_rank_whose_statistics_are_damaged(shelf, tmp_path, damage):
    folder = merge(tmp_path / "first", [shelf("a"), shelf("b")], rank=3)
    layer = "model.layers.0.mlp.up_proj"

    def change(tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
        if damage == "missing":
            del tensors[f"0.lora_B.{layer}"]
            header["tasks"][0]["lora_B"].remove(layer)
        elif damage == "another shape":
            tensors[f"0.lora_B.{layer}"] = tensors[f"0.lora_B.{layer}"][:, :-1].contiguous()
        else:
            tensors[f"0.lora_B.{layer}"][0, 0] = torch.inf

    rewrite_statistics(folder, change)
    with pytest.raises(UnmergeableAdapterError, match=layer):
        merge(tmp_path / "further", [folder, shelf("c")])


def rewrite_statistics(folder: Path, change: Callable[[dict[str, Tensor], dict[str, Any]], None]) -> None:
    with safe_open(folder / STATISTICS, "pt") as file:
        header = json.loads(file.metadata()["peft_many"])
    tensors = load_file(folder / STATISTICS)
    change(tensors, header)
    save_file(tensors, folder / STATISTICS, {"peft_many": json.dumps(header)})


# --------------------------------------------------------------------------------------------------------- dtype


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("rank", [None, 3])
def test_a_merge_stored_in_half_precision(shelf, tmp_path, dtype, rank):
    tasks = [shelf("image a"), shelf("image b")]
    whole = merge(tmp_path / "whole", tasks, rank=rank)
    folder = merge(tmp_path / "half", tasks, rank=rank, dtype=dtype)
    tensors = load_file(folder / WEIGHTS)
    assert {tensor.dtype for key, tensor in tensors.items() if ".lora_" in key} == {dtype}
    for key, tensor in load_file(whole / WEIGHTS).items():
        kept = tensors[key]
        assert torch.equal(kept, tensor.to(dtype)) if ".lora_" in key else torch.equal(kept, tensor), key
    expected = merged_deltas(whole)
    for layer, found in merged_deltas(folder).items():
        assert 0 < distance(found, expected[layer]) < ROUNDING[dtype], layer
    loaded = PeftModel.from_pretrained(base("llava"), folder)
    assert distance(logits(loaded, "llava"), logits(PeftModel.from_pretrained(base("llava"), whole), "llava")) < 0.05


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("rank", [None, 3])
def test_a_merge_in_half_precision_can_be_merged_further(shelf, tmp_path, dtype, rank):
    tasks = [shelf("large"), shelf("large too")]
    first = merge(tmp_path / "first", tasks, rank=rank, dtype=dtype)
    folder = merge(tmp_path / "further", [first, shelf("a few")])
    for layer, found in merged_deltas(folder).items():
        error = distance(found, reference([*tasks, shelf("a few")], layer, RIDGE, [1.0] * 3))
        assert error < (1e-5 if rank else ROUNDING[dtype]), layer  # of lower rank, the statistics keep what was given
    assert {tensor.dtype for tensor in load_file(folder / WEIGHTS).values()} == {torch.float32}


@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision_loses_no_more_where_tasks_are_nearly_equal(shelf, tmp_path, dtype):
    tasks = [shelf("a few"), nudged(tmp_path / "nudged", shelf("a few"), 1e-2)]
    for layer, found in merged_deltas(merge(tmp_path / "merged", tasks, ridge=1e-8, dtype=dtype)).items():
        assert distance(found, reference(tasks, layer, 1e-8, [1.0, 1.0])) < ROUNDING[dtype], layer


def test_float16_holds_weights_of_any_size(shelf, tmp_path):
    folder = tmp_path / "grown"
    shutil.copytree(shelf("b few").folder, folder)
    tensors = load_file(folder / WEIGHTS)
    grown = {key: tensor * (1e5 if ".lora_A." in key else 1e-5) for key, tensor in tensors.items()}
    save_file(grown, folder / WEIGHTS, {"format": "pt"})
    rewrite_statistics(folder, without_fingerprints)
    tasks = [shelf("a few"), shelf("b few")]
    merged = merge(tmp_path / "merged", [tasks[0], folder], dtype=torch.float16)
    for layer, found in merged_deltas(merged).items():
        assert distance(found, reference(tasks, layer, RIDGE, [1.0, 1.0])) < ROUNDING[torch.float16], layer


def test_a_cast_of_many_layers_to_bfloat16_is_no_training():
    generator = torch.Generator().manual_seed(0)
    for layer in range(1000):
        A, B = torch.randn(8, 64, generator=generator), torch.randn(64, 8, generator=generator)
        cast = weight_fingerprint(A.bfloat16(), B.bfloat16())
        assert same_weights(weight_fingerprint(A, B), cast), layer


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, "bfloat16"])
def test_other_dtypes_are_refused(shelf, tmp_path, dtype):
    message = r"`dtype` must be one of torch\.float32, torch\.bfloat16, torch\.float16, but it is " + str(dtype)
    with pytest.raises(ValueError, match=message):
        merge(tmp_path / "merged", [shelf("a few")], dtype=dtype)
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------------ device and top_k


@pytest.mark.parametrize("device", [torch.device("cpu"), torch.device("cpu", 0)])
def test_the_device_may_be_a_name_or_a_device(shelf, tmp_path, device):
    tasks = [shelf("a few"), shelf("b few")]
    expected = files(merge(tmp_path / "name", tasks, device="cpu"))
    assert files(merge(tmp_path / "device", tasks, device=device)) == expected
    folders = [task.folder for task in tasks]
    model = merge_adapter_sequence(base("llama"), folders, device=device, progress=False)
    model.save_pretrained(tmp_path / "sequence")
    assert files(tmp_path / "sequence")[WEIGHTS] == expected[WEIGHTS]


def test_top_k_is_written_and_routes_and_a_merge_of_a_merge_inherits_it(shelf, tmp_path):
    tasks = [shelf("image a"), shelf("image b")]
    first = merge(tmp_path / "first", tasks, top_k=1)
    for i, (folder, expected) in enumerate(
        [
            (first, 1),
            (merge(tmp_path / "of a merge", [first]), 1),
            (merge(tmp_path / "given", [first], top_k=2), 2),
            (merge(tmp_path / "without", tasks), None),
        ]
    ):
        assert MAnyConfig.from_pretrained(folder).merge.options.top_k == expected
        loaded = PeftModel.from_pretrained(base("llava"), folder)
        mixtures = [module for module in loaded.modules() if isinstance(module, ProjectorMixture)]
        assert [mixture.top_k for mixture in mixtures] == [expected], i
    folders = [task.folder for task in tasks]
    model = merge_adapter_sequence(base("llava"), folders, top_k=1, progress=False)
    assert model.peft_config["default"].merge.options.top_k == 1
    assert torch.equal(logits(model, "llava"), logits(PeftModel.from_pretrained(base("llava"), first), "llava"))
    assert set(MAnyConfig.from_pretrained(first).merge.routing) == {PROJECTOR}


def test_merges_that_disagree_hand_down_the_default(shelf, tmp_path):
    one = merge(tmp_path / "1", [shelf("image a")], top_k=1, temperature=0.5, ridge=1e-2)
    two = merge(tmp_path / "2", [shelf("image b")], top_k=2, temperature=0.1, ridge=1e-3)
    config = MAnyConfig.from_pretrained(merge(tmp_path / "both", [one, two]))
    assert (config.merge.options.top_k, config.merge.options.temperature, config.merge.options.ridge) == (
        None,
        0.02,
        1e-4,
    )


def test_a_merge_without_ridge_is_merged_further_without(tmp_path):
    task = make(tmp_path / "a", "llama", rows=40, task_name="a")
    first = merge(tmp_path / "first", [task], ridge=0.0)
    assert MAnyConfig.from_pretrained(first).merge.options.ridge == 0.0
    assert MAnyConfig.from_pretrained(merge(tmp_path / "second", [first])).merge.options.ridge == 0.0


@pytest.mark.parametrize("option", ["rank", "top_k"])
@pytest.mark.parametrize("value", [0, -1])
def test_a_number_below_one_is_refused_by_name(shelf, tmp_path, option, value):
    model = base("llama")
    before = state_digest(model)
    message = f"^`{option}` must be at least 1, but it is {value}\\.$"
    with pytest.raises(ValueError, match=message):
        merge(tmp_path / "merged", [shelf("a few")], **{option: value})
    with pytest.raises(ValueError, match=message):
        merge_adapter_sequence(model, [shelf("a few").folder], progress=False, **{option: value})
    assert list(tmp_path.iterdir()) == []
    assert state_digest(model) == before


# -------------------------------------------------------------------------------------------- half precision on disk


def converted(folder: Path, made: Made, weights: torch.dtype, factors: torch.dtype) -> Path:
    """A copy whose LoRA weights and whose factors of covariances have other dtypes."""
    shutil.copytree(made.folder, folder)
    tensors = {key: tensor.to(weights) for key, tensor in load_file(folder / WEIGHTS).items()}
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})

    def change(tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
        for key in tensors:
            assert not key.endswith(".matrix"), "this is about factors"
            if key.endswith(".factor"):
                tensors[key] = tensors[key].to(factors)
        without_fingerprints(tensors, header)

    rewrite_statistics(folder, change)
    return folder


def without_fingerprints(tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
    header["tasks"][0]["fingerprints"] = {}  # which are those of the weights before


def stored_optimum(folders: Sequence[Path], layer: str, ridge: float) -> Tensor:
    """`(Σ_t ΔW_t C_t)(Σ_t C_t)⁻¹` of what the files hold, dense and in float64."""
    moments, scatter = 0, 0
    for folder in folders:
        config, tensors = MAnyConfig.from_pretrained(folder), load_file(folder / WEIGHTS)
        A, B = (tensors[f"{PREFIX}{layer}.lora_{half}.weight"].double() for half in "AB")
        C = AdapterStatistics.load(folder / STATISTICS).tasks[0].covariance_of(layer).dense()
        C = C + ridge * C.diagonal().mean() * torch.eye(len(C), dtype=torch.float64)
        moments, scatter = moments + config.lora_alpha / config.r * B @ A @ C, scatter + C
    return torch.linalg.solve(scatter, moments.T).T


@pytest.mark.parametrize("names", [("truncated a", "truncated b"), ("truncated few", "truncated b")])
@pytest.mark.parametrize("factors", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("weights", [*HALVES, torch.float32])
def test_the_optimum_is_that_of_what_the_files_hold(shelf, tmp_path, names, weights, factors):
    folders = [converted(tmp_path / name, shelf(name), weights, factors) for name in names]
    for ridge in (1e-2, 1e-4, 1e-6):
        for layer, found in merged_deltas(merge(tmp_path / f"{ridge}", folders, ridge=ridge)).items():
            assert distance(found, stored_optimum(folders, layer, ridge)) < 1e-4, layer


def test_the_factors_are_in_half_precision_and_fewer_than_inputs(shelf):
    """So that the test above is about that: it must reach the form in the factors' span, and the dense one."""
    rows = {}
    for name in ("truncated a", "truncated b", "truncated few"):
        found = covariances(AdapterStatistics.load(shelf(name).folder / STATISTICS).tasks[0]).values()
        assert {covariance.factor.dtype for covariance in found} == {torch.float16}
        rows[name] = max(len(covariance.factor) for covariance in found)
    assert rows["truncated few"] + rows["truncated b"] < 32
    assert rows["truncated few"] < 8


def test_statistics_in_half_precision_come_close_to_those_that_are_whole(shelf, tmp_path):
    """In the metric of the inputs; what truncation left out is the larger part of it."""
    names = ("truncated a", "truncated few")
    folder = merge(tmp_path / "merged", [shelf(name) for name in names])
    tasks = [shelf(name) for name in names]
    for layer, found in merged_deltas(folder).items():
        x = torch.cat([task.inputs[layer] for task in tasks])
        best = reference(tasks, layer, RIDGE, [1.0, 1.0])
        assert distance(found @ x.T, best @ x.T) < 0.1, layer


# ------------------------------------------------------------------------------------------------ nearly equal tasks


def nudged(folder: Path, made: Made, size: float, seed: int = 2) -> Made:
    """An adapter whose weights are nearly another's, measured on the same few tokens."""
    model = PeftModel.from_pretrained(base("llama"), made.folder, is_trainable=True)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if ".lora_" in name:
                parameter.mul_(1 + size * torch.randn(parameter.shape, generator=generator))
    model.peft_config["default"].task_name = folder.name
    deltas = effective_deltas(model, base("llama"))
    seed = list(RECIPES).index(made.folder.name)
    with recorded(model) as inputs:
        collect_statistics(model, batches(model, "llama", seed, rows=1), energy=1.0, progress=False)
    model.save_pretrained(folder)
    return Made(folder, deltas, {name: torch.cat(parts) for name, parts in inputs.items()})


@pytest.mark.parametrize("name", ["a few", "large"])
def test_blocks_that_would_cancel_are_stored_otherwise(shelf, tmp_path, name):
    """Nearly equal inputs and a tiny ridge tell nearly equal tasks apart by rows that are large and opposite."""
    ridge, tasks = 1e-8, [shelf(name), nudged(tmp_path / "nudged", shelf(name), 1e-3)]
    folder = merge(tmp_path / "merged", tasks, ridge=ridge)
    kept, tensors = stored_in_B(folder), load_file(folder / WEIGHTS)
    assert len(kept) >= 2
    for layer, found in merged_deltas(folder).items():
        assert distance(found, reference(tasks, layer, ridge, [1.0, 1.0])) < 1e-5, layer
        if layer in kept:
            B = tensors[f"{PREFIX}{layer}.lora_B.weight"].double()
            columns = min(B.shape)  # v_proj has fewer outputs than two tasks of rank 12 have columns
            identity = torch.zeros(B.shape[1], B.shape[1], dtype=torch.float64)
            identity[:columns, :columns] = torch.eye(columns)
            assert torch.allclose(B.T @ B, identity, atol=1e-5), layer
    loaded = PeftModel.from_pretrained(base("llama"), folder)
    assert distance(logits(loaded, "llama"), logits(with_deltas("llama", merged_deltas(folder)), "llama")) < 1e-5


@pytest.mark.parametrize("name", ["a few", "large"])
def test_what_is_stored_otherwise_is_merged_further(shelf, tmp_path, name):
    ridge, tasks = 1e-8, [shelf(name), nudged(tmp_path / "nudged", shelf(name), 1e-3), shelf("b few")]
    first = merge(tmp_path / "first", tasks[:2], ridge=ridge)
    assert stored_in_B(first)
    at_once = merge(tmp_path / "at once", tasks, ridge=ridge)
    assert but_operations(merge(tmp_path / "further", [first, tasks[2]])) == but_operations(at_once)
    for layer, found in merged_deltas(at_once).items():
        assert distance(found, reference(tasks, layer, ridge, [1.0] * 3)) < 1e-5, layer
    PeftModel.from_pretrained(base("llama"), first).save_pretrained(tmp_path / "loaded")
    assert files(tmp_path / "loaded")[STATISTICS] == files(first)[STATISTICS]
    again = files(merge(tmp_path / "loaded, further", [tmp_path / "loaded", tasks[2]]))
    assert again[WEIGHTS] == files(at_once)[WEIGHTS]


def test_tasks_that_differ_are_stored_side_by_side(shelf, tmp_path):
    assert stored_in_B(merge(tmp_path / "merged", [shelf(name) for name in "abc"])) == set()
