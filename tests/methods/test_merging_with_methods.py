"""Both merging functions with other methods: numbers, files, further merging, adapters without statistics, errors."""

from __future__ import annotations

import itertools
import json
import shutil
import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils.merge_utils import dare_ties, ties
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from peft_many import MAnyConfig, merge_adapter_files, merge_adapter_sequence
from peft_many.algebra.lpm import LowRankDelta
from peft_many.files.errors import UnmergeableAdapterError
from peft_many.files.statistics import AdapterStatistics
from peft_many.merging.prepare import prepare_merge
from peft_many.methods import METHODS, DareTies, LayerTask, MergeMethod, TaskArithmetic, Ties
from peft_many.records import MergeOptions
from peft_many.tuner.projector import ProjectorMixture
from tests.adapters import (
    PROJECTOR,
    STATISTICS,
    WEIGHTS,
    Made,
    base,
    but_operations,
    distance,
    files,
    logits,
    make,
    merged_deltas,
    scatter,
    state_digest,
)
from tests.files.test_processes import in_processes
from tests.methods.layers import dense

DATA_FREE = [name for name, method in METHODS.items() if not method.needs_covariances]
RECIPES = {
    "a": ("llava", {"task_name": "a", "r": 3}),
    "b": ("llava", {"task_name": "b", "r": 2, "lora_alpha": 5, "use_rslora": True}),
    "lora": (
        "llava",
        {
            "kind": LoraConfig,
            "target_modules": r".*language_model.*(q|v|down)_proj",
            "modules_to_save": ["multi_modal_projector"],
        },
    ),
    "no projector": ("llava", {"task_name": "no projector", "projector_modules": []}),
    "llama a": ("llama", {"task_name": "llama a", "target_modules": "all-linear"}),
    "llama b": ("llama", {"task_name": "llama b", "target_modules": "all-linear", "r": 2}),
    "llama c": ("llama", {"task_name": "llama c", "target_modules": "all-linear", "r": 6, "energy": 0.999}),
}
LLAMAS = ("llama a", "llama b", "llama c")


@pytest.fixture(scope="module")
def shelf(tmp_path_factory) -> Callable[[str], Made]:
    """Makes adapters on request, once each; a name with a `?` gives the same without statistics."""
    root = tmp_path_factory.mktemp("shelf")
    made: dict[str, Made] = {}

    def get(name: str) -> Made:
        if name not in made and name.endswith("?"):
            known = get(name.removesuffix("?"))
            folder = root / "unmeasured" / known.folder.name
            shutil.copytree(known.folder, folder, ignore=shutil.ignore_patterns(STATISTICS))
            made[name] = Made(folder, known.deltas, known.inputs)
        elif name not in made:
            family, options = RECIPES[name]
            made[name] = make(root / name, family, seed=list(RECIPES).index(name), **options)
        return made[name]

    return get


def merge(output: Path, tasks: Sequence[Made | Path], **options) -> Path:
    folders = [task if isinstance(task, Path) else task.folder for task in tasks]
    return merge_adapter_files(folders, output, progress=False, **options)


def stored_delta(task: Made, layer: str) -> LowRankDelta:
    """The layer's factors as the file has them, the scaling (the ratio to the true delta) on `A`."""
    tensors = load_file(task.folder / WEIGHTS)
    A, B = (tensors[f"base_model.model.{layer}.lora_{half}.weight"] for half in "AB")
    scaling = (task.deltas[layer] * (B @ A)).sum() / (B @ A).square().sum()
    return LowRankDelta(A=scaling.float() * A, B=B)


def nearest(matrix: Tensor, rank: int) -> Tensor:
    U, S, Vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    return (U[:, :rank] * S[:rank]) @ Vh[:rank]


# ------------------------------------------------------------------------------------------------------ the numbers


@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [0.3, 2.0, 1.0]])
@pytest.mark.parametrize("name", METHODS)
def test_each_layer_is_what_the_method_makes_of_the_tasks(shelf, tmp_path, name, weights):
    method, tasks = METHODS[name](), [shelf(task) for task in LLAMAS]
    found = merged_deltas(merge(tmp_path / "merged", tasks, method=name, weights=weights))
    assert set(found) == set(tasks[0].deltas)
    for layer, delta in found.items():
        covariances = [AdapterStatistics.load(t.folder / STATISTICS).tasks[0].covariance_of(layer) for t in tasks]
        layer_tasks = [
            LayerTask(stored_delta(task, layer), weight, covariance)
            for task, weight, covariance in zip(tasks, weights, covariances, strict=True)
        ]
        rank = method.rank_of([4, 2, 6])
        assert distance(delta, nearest(dense(method.merge(layer_tasks, layer)), rank)) < 1e-4, layer


def test_the_average_is_that_of_the_true_deltas(shelf, tmp_path):
    tasks = [shelf(name) for name in LLAMAS]
    folder = merge(tmp_path / "merged", tasks, method="average", weights=[1.0, 2.0, 0.0])
    for layer, delta in merged_deltas(folder).items():
        assert distance(delta, (tasks[0].deltas[layer] + 2 * tasks[1].deltas[layer]) / 3) < 1e-5, layer


def test_a_layer_that_some_tasks_did_not_train_counts_as_zero(shelf, tmp_path):
    a, lora = shelf("a"), shelf("lora")
    for layer, delta in merged_deltas(merge(tmp_path / "merged", [a, lora], method="average")).items():
        assert distance(delta, (a.deltas[layer] + lora.deltas.get(layer, 0)) / 2) < 1e-5, layer


def test_regmean_is_that_of_the_true_inputs(shelf, tmp_path):
    tasks = [shelf("llama a"), shelf("llama b")]  # whose covariances are whole
    for layer, delta in merged_deltas(merge(tmp_path / "merged", tasks, method="regmean")).items():
        moments, scatter_sum = 0, 0
        for task in tasks:
            C = task.inputs[layer].T @ task.inputs[layer] / len(task.inputs[layer])
            gram = 0.9 * C + 0.1 * torch.diag(C.diagonal())
            moments, scatter_sum = moments + task.deltas[layer] @ gram, scatter_sum + gram
        assert distance(delta, torch.linalg.solve(scatter_sum, moments.T).T) < 1e-5, layer


@pytest.mark.parametrize("rank", [3, 8])
def test_ties_and_dare_are_the_nearest_of_their_rank_to_what_peft_gives(shelf, tmp_path, rank):
    tasks = [shelf(name) for name in LLAMAS]
    layer = "model.layers.0.self_attn.q_proj"
    deltas = [task.deltas[layer].float() for task in tasks]
    weights = torch.ones(3)
    found = merged_deltas(merge(tmp_path / "ties", tasks, method=Ties(density=0.3), rank=rank))
    assert distance(found[layer], nearest(ties(deltas, weights, 0.3), rank)) < 1e-4
    seed = zlib.crc32(f"5 {layer}".encode())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        expected = dare_ties(deltas, weights, 0.5)
    found = merged_deltas(merge(tmp_path / "dare", tasks, method=DareTies(density=0.5, seed=5), rank=rank))
    assert distance(found[layer], nearest(expected, rank)) < 1e-4


@pytest.mark.parametrize("name", METHODS)
def test_a_smaller_rank_is_the_nearest_to_the_whole(shelf, tmp_path, name):
    tasks = [shelf(name) for name in LLAMAS]
    whole = merged_deltas(merge(tmp_path / "whole", tasks, method=name))
    small = merge(tmp_path / "small", tasks, method=name, rank=3)
    assert {len(t) for key, t in load_file(small / WEIGHTS).items() if ".lora_A." in key} == {3}
    for layer, delta in merged_deltas(small).items():
        assert distance(delta, nearest(whole[layer], 3)) < 1e-3, layer


def test_robust_merge_needs_no_more_than_the_largest_rank(shelf, tmp_path):
    folder = merge(tmp_path / "merged", [shelf(name) for name in LLAMAS], method="robust_merge")
    assert MAnyConfig.from_pretrained(folder).r == 6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_on_disk(shelf, tmp_path, dtype):
    tasks = [shelf(name) for name in LLAMAS]
    for name in ("average", "knots", "ties"):
        whole = merged_deltas(merge(tmp_path / name, tasks, method=name))
        half = merge(tmp_path / f"half {name}", tasks, method=name, dtype=dtype)
        assert {tensor.dtype for tensor in load_file(half / WEIGHTS).values()} == {dtype}
        for layer, delta in merged_deltas(half).items():
            assert distance(delta, whole[layer]) < 2e-2, layer
        further = merge(tmp_path / f"further {name}", [half], method=name)
        assert files(further)[WEIGHTS] == files(tmp_path / name)[WEIGHTS]


# ----------------------------------------------------------------------------------------------------- using a merge


@pytest.mark.parametrize("name", METHODS)
def test_files_and_sequence_give_the_same_merge(shelf, tmp_path, name):
    names = ["a", "lora", "b"]
    folder = merge(tmp_path / "merged", [shelf(task) for task in names], method=name)
    loaded = PeftModel.from_pretrained(base("llava"), folder)
    folders = [shelf(task).folder for task in names]
    model = merge_adapter_sequence(base("llava"), folders, method=name, progress=False)
    state, expected = model.state_dict(), loaded.state_dict()
    assert set(state) == set(expected)
    assert all(torch.equal(state[key], expected[key]) for key in expected)
    assert torch.equal(logits(model, "llava"), logits(loaded, "llava"))
    assert distance(logits(model, "llava"), logits(base("llava"), "llava")) > 1e-3
    model.save_pretrained(tmp_path / "saved")
    assert {**files(tmp_path / "saved"), "README.md": b""}.keys() == files(folder).keys()
    for file in (WEIGHTS, STATISTICS):
        assert files(tmp_path / "saved")[file] == files(folder)[file]


@pytest.mark.parametrize("name", METHODS)
def test_order_changes_no_byte(shelf, tmp_path, name):
    weights = {"a": 0.3, "lora": 1.7, "b": 1.0}
    outcomes = []
    for i, order in enumerate(itertools.permutations(weights)):
        tasks, chosen = [shelf(task) for task in order], [weights[task] for task in order]
        outcomes.append(files(merge(tmp_path / str(i), tasks, weights=chosen, method=name)))
    assert all(outcome == outcomes[0] for outcome in outcomes)


@pytest.mark.parametrize("second", ["lpm", "average", "ties"])
@pytest.mark.parametrize("first", METHODS)
def test_merging_further_starts_from_the_tasks_own_deltas_whatever_made_the_merge(shelf, tmp_path, first, second):
    a, b, c = (shelf(name) for name in LLAMAS)
    at_once = merge(tmp_path / "at once", [a, b, c], method=second)
    merged = merge(tmp_path / "merged", [a, b], method=first)
    assert but_operations(merge(tmp_path / "further", [c, merged], method=second)) == but_operations(at_once)
    PeftModel.from_pretrained(base("llama"), merged).save_pretrained(tmp_path / "loaded")
    again = files(merge(tmp_path / "again", [tmp_path / "loaded", c], method=second))
    assert again[WEIGHTS] == files(at_once)[WEIGHTS]


def test_a_trained_merge_is_noticed(shelf, tmp_path):
    merged = merge(tmp_path / "merged", [shelf("llama a"), shelf("llama b")], method="ties")
    model = PeftModel.from_pretrained(base("llama"), merged, is_trainable=True)
    scatter(model, 3)
    model.save_pretrained(tmp_path / "trained")
    with pytest.raises(UnmergeableAdapterError, match="trained further after merging"):
        merge(tmp_path / "further", [tmp_path / "trained"], method="average")


def test_the_method_is_written_down(shelf, tmp_path):
    tasks = [shelf("llama a"), shelf("llama b")]
    folder = merge(tmp_path / "merged", tasks, method=Ties(density=0.3))
    expected = {
        "name": "ties",
        "source": Ties.source,
        "density": 0.3,
        "scaling": 1.0,
        "majority_sign_method": "total",
    }
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["merge"]["options"]["method"] == expected
    assert MAnyConfig.from_pretrained(folder).merge.options.method == Ties(density=0.3)
    assert "ridge" not in config["merge"]["options"]
    card = (folder / "README.md").read_text()
    assert "`ties(density=0.3, scaling=1.0, majority_sign_method='total')`" in card
    assert "2306.01708" in card
    assert "least squares" not in card
    model = merge_adapter_sequence(base("llama"), [folder], method=Ties(density=0.3), progress=False)
    assert model.peft_config["default"].merge.options.method == Ties(density=0.3)
    for options in ({}, {"method": "lpm"}):
        lpm = merge(tmp_path / str(len(options)), [folder], **options)
        assert MAnyConfig.from_pretrained(lpm).merge.options.method == "lpm"
        assert "least squares" in (lpm / "README.md").read_text()


def test_a_method_of_one_s_own(shelf, tmp_path):
    class Last(MergeMethod):
        name = "last"
        source = "nobody"

        def merge(self, tasks: Sequence[LayerTask], layer: str = "") -> LowRankDelta:
            return tasks[-1].delta

    folder = merge(tmp_path / "merged", [shelf("llama a"), shelf("llama b")], method=Last())
    for layer, delta in merged_deltas(folder).items():
        assert distance(delta, shelf("llama b").deltas[layer]) < 1e-6
    method = MAnyConfig.from_pretrained(folder).merge.options.method
    assert method.describe() == {"name": "last", "source": "nobody"}


# -------------------------------------------------------------------------------------- adapters without statistics


@pytest.mark.parametrize("name", DATA_FREE)
@pytest.mark.parametrize("unmeasured", [("llama a?", "llama b?"), ("llama a", "llama b?")])
def test_adapters_without_statistics_merge_as_those_with(shelf, tmp_path, name, unmeasured):
    expected = merge(tmp_path / "measured", [shelf("llama a"), shelf("llama b")], method=name)
    found = merge(tmp_path / "unmeasured", [shelf(task) for task in unmeasured], method=name)
    assert files(found)[WEIGHTS] == files(expected)[WEIGHTS]
    folders = [shelf(task).folder for task in unmeasured]
    model = merge_adapter_sequence(base("llama"), folders, method=name, progress=False)
    assert torch.equal(logits(model, "llama"), logits(PeftModel.from_pretrained(base("llama"), expected), "llama"))
    further = merge(tmp_path / "further", [found, shelf("llama c?")], method="ties")
    at_once = merge(tmp_path / "at once", [shelf(task) for task in (*unmeasured, "llama c?")], method="ties")
    assert but_operations(further) == but_operations(at_once)


@pytest.mark.parametrize("method", ["lpm", "regmean"])
@pytest.mark.parametrize("merged_first", [False, True])
def test_methods_that_need_statistics_say_which_do_not(shelf, tmp_path, method, merged_first):
    adapter = shelf("llama b?").folder
    if merged_first:
        adapter = merge(tmp_path / "first", [adapter], method="average")
    message = rf"{adapter.name}.* has no statistics\. .*collect_statistics.* Or merge by .*average.*ties.*knots"
    with pytest.raises(UnmergeableAdapterError, match=message) as caught:
        merge(tmp_path / "merged", [shelf("llama a"), adapter], method=method)
    assert "regmean" not in str(caught.value)


def test_a_plain_lora_adapter_as_peft_saves_it(tmp_path):
    folders, deltas = [], []
    for seed in range(2):
        model = get_peft_model(base("llama"), LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
        scatter(model, seed)
        model.save_pretrained(tmp_path / f"plain {seed}")
        folders.append(tmp_path / f"plain {seed}")
        layer = model.get_submodule("base_model.model.model.layers.1.mlp.down_proj")
        deltas.append(layer.get_delta_weight("default").detach())
    merged = merge_adapter_sequence(base("llama"), folders, method=TaskArithmetic(scaling=1.0), progress=False)
    found = merged.get_submodule("base_model.model.model.layers.1.mlp.down_proj").get_delta_weight("default")
    assert distance(found, deltas[0] + deltas[1]) < 1e-5
    plain = merged.merge_and_unload()
    assert not any(isinstance(module, LoraLayer) for module in plain.modules())


def test_a_merge_without_its_statistics_is_no_adapter_that_was_not_measured(shelf, tmp_path):
    folder = merge(tmp_path / "merged", [shelf("llama a"), shelf("llama b")], method="average")
    (folder / STATISTICS).unlink()
    with pytest.raises(UnmergeableAdapterError, match="is a merge and has no statistics"):
        merge(tmp_path / "further", [folder], method="average")


def test_stale_statistics_are_stale_for_every_method(shelf, tmp_path):
    """They travel on in the merge."""
    model = PeftModel.from_pretrained(base("llama"), shelf("llama a").folder, is_trainable=True)
    scatter(model, 9)
    model.save_pretrained(tmp_path / "trained")
    with pytest.raises(UnmergeableAdapterError, match="trained further after its statistics"):
        merge(tmp_path / "merged", [tmp_path / "trained"], method="average")


# --------------------------------------------------------------------------------------------------- mean projectors


def projector_weights(task: Made) -> dict[str, Tensor]:
    prefix = f"base_model.model.{PROJECTOR}."
    return {k.removeprefix(prefix): t for k, t in load_file(task.folder / WEIGHTS).items() if k.startswith(prefix)}


def projector_of(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.get_submodule(PROJECTOR).state_dict())


@pytest.mark.parametrize(
    ("method", "names"),
    [(method, ("a", "b", "lora")) for method in ("lpm", "average", "ties")]
    + [(method, ("a", "b?", "lora?", "no projector")) for method in ("average", "ties")],
)
def test_mean_projectors_are_plain_weighted_means(shelf, tmp_path, method, names):
    """Over the tasks that trained one."""
    tasks, weights = [shelf(name) for name in names], [1.0, 0.5, 2.5, 3.0][: len(names)]
    folder = merge(tmp_path / "merged", tasks, weights=weights, method=method, projectors="mean")
    config = MAnyConfig.from_pretrained(folder)
    assert config.merge.routing == {}
    assert config.merge.averaged_projectors == {PROJECTOR: ["a", "b", "lora"]}
    assert "projectors averaged" in (folder / "README.md").read_text()
    models = [
        PeftModel.from_pretrained(base("llava"), folder),
        merge_adapter_sequence(
            base("llava"),
            [task.folder for task in tasks],
            weights=weights,
            method=method,
            projectors="mean",
            progress=False,
        ),
    ]
    outputs = []
    for model in models:
        assert not any(isinstance(module, ProjectorMixture) for module in model.modules())
        outputs.append(logits(model, "llava"))
        plain = model.merge_and_unload()
        assert type(plain.get_submodule(PROJECTOR)) is type(base("llava").get_submodule(PROJECTOR))
        for key, found in projector_of(plain).items():
            parts = [weight * projector_weights(task)[key].double() for weight, task in zip(weights[:3], tasks[:3])]
            assert distance(found, sum(parts) / sum(weights[:3])) < 1e-6
    assert torch.equal(*outputs)
    plain.save_pretrained(tmp_path / "plain")
    again = type(plain).from_pretrained(tmp_path / "plain")
    assert distance(logits(again, "llava"), outputs[1]) < 1e-4


def test_unload_gives_the_base_model_back(shelf):
    folders = [shelf("a").folder, shelf("b").folder]
    model = merge_adapter_sequence(base("llava"), folders, projectors="mean", progress=False)
    expected = logits(base("llava"), "llava")
    assert distance(logits(model, "llava"), expected) > 1e-2
    assert torch.equal(logits(model.unload(), "llava"), expected)


def test_a_mean_of_one_is_its_projector(shelf, tmp_path):
    expected = logits(PeftModel.from_pretrained(base("llava"), shelf("b").folder), "llava")
    folder = merge(tmp_path / "merged", [shelf("b")], method="average", projectors="mean")
    assert distance(logits(PeftModel.from_pretrained(base("llava"), folder), "llava"), expected) < 1e-5


def test_a_mean_is_averaged_further(shelf, tmp_path):
    a, b, c = shelf("a"), shelf("b"), shelf("lora")
    options = {"method": "average", "projectors": "mean"}
    first = merge(tmp_path / "first", [a, b], weights=[2.0, 0.5], **options)
    further = merge(tmp_path / "further", [first, c], weights=[0.5, 3.0], **options)
    at_once = merge(tmp_path / "at once", [a, b, c], weights=[1.0, 0.25, 3.0], **options)
    one, other = load_file(further / WEIGHTS), load_file(at_once / WEIGHTS)
    assert one.keys() == other.keys()
    for key, tensor in one.items():
        assert distance(tensor, other[key]) < 1e-6, key
    assert files(further)[STATISTICS] == files(at_once)[STATISTICS]
    assert MAnyConfig.from_pretrained(further).merge.averaged_projectors == {PROJECTOR: ["a", "b", "lora"]}
    with pytest.raises(UnmergeableAdapterError, match=r"is the mean .* `projectors='mean'`"):
        merge(tmp_path / "routed", [first, c])


def test_a_routed_merge_is_averaged_further_from_its_experts(shelf, tmp_path):
    first = merge(tmp_path / "first", [shelf("a"), shelf("b")])
    found = merge(tmp_path / "found", [first], projectors="mean")
    assert but_operations(found) == but_operations(
        merge(tmp_path / "expected", [shelf("a"), shelf("b")], projectors="mean")
    )


def test_projectors_without_prototypes_cannot_be_routed(shelf, tmp_path):
    for names in (("a?",), ("a", "b?"), ("a", "no projector?"), ("lora?", "a")):
        with pytest.raises(UnmergeableAdapterError, match=r"has no statistics.*projectors='mean'"):
            merge(tmp_path / "merged", [shelf(name) for name in names], method="average")
    blind = make(tmp_path / "blind", images=False)
    with pytest.raises(UnmergeableAdapterError, match=r"no visual prototype.*`projectors='mean'`"):
        merge(tmp_path / "merged", [blind])
    merge(tmp_path / "merged", [blind, shelf("a")], projectors="mean")


def test_a_module_trained_whole_that_is_no_projector_is_still_refused(tmp_path):
    model = get_peft_model(base("llava"), LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    model.save_pretrained(tmp_path / "head")
    with pytest.raises(UnmergeableAdapterError, match=r"lm_head.*is no projector"):
        merge(tmp_path / "merged", [tmp_path / "head"], method="average", projectors="mean")


def test_projectors_of_other_shapes_have_no_mean(shelf, tmp_path):
    other = Made(Path(shutil.copytree(shelf("b").folder, tmp_path / "other")), {}, {})
    tensors = load_file(other.folder / WEIGHTS)
    key = f"base_model.model.{PROJECTOR}.linear_2.bias"
    save_file({**tensors, key: tensors[key][1:].clone()}, other.folder / WEIGHTS)
    with pytest.raises(UnmergeableAdapterError, match=r"linear_2.bias.*was of shape \(32,\) when it was measured"):
        merge(tmp_path / "merged", [shelf("a"), other], method="average", projectors="mean")
    measured = AdapterStatistics.load(other.folder / STATISTICS).tasks[0]
    AdapterStatistics((replace(measured, projector_shapes={}),)).save(other.folder)
    with pytest.raises(UnmergeableAdapterError, match=r"linear_2.bias.*different base models"):
        merge(tmp_path / "merged", [shelf("a"), other], method="average", projectors="mean")


def test_a_mean_that_does_not_fit_the_model_is_refused(shelf, tmp_path):
    folder = merge(tmp_path / "merged", [shelf("a")], method="average", projectors="mean")
    key = f"base_model.model.{PROJECTOR}.linear_2.bias"
    tensors = load_file(folder / WEIGHTS)
    save_file({**tensors, key: tensors[key][1:].clone()}, folder / WEIGHTS)
    model = base("llava")
    before = state_digest(model)
    with pytest.raises(UnmergeableAdapterError, match=r"linear_2.bias"):
        merge_adapter_sequence(model, [folder], method="average", projectors="mean", progress=False)
    assert state_digest(model) == before


# ----------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "tyes"}, r"unknown method 'tyes'; known: lpm, average"),
        ({"method": "ties", "ridge": 1e-3}, r"`ridge` is an option of the method 'lpm', not of 'ties'"),
        ({"projectors": "median"}, r"`projectors` must be one of 'routed', 'mean', but it is 'median'"),
        ({"projectors": "mean", "temperature": 0.1}, r"is an option of routed projectors"),
        ({"projectors": "mean", "top_k": 1}, r"is an option of routed projectors"),
    ],
)
def test_options_that_make_no_sense_are_refused(shelf, tmp_path, options, message):
    model = base("llama")
    before = state_digest(model)
    with pytest.raises(ValueError, match=message):
        merge(tmp_path / "merged", [shelf("llama a")], **options)
    with pytest.raises(ValueError, match=message):
        merge_adapter_sequence(model, [shelf("llama a").folder], progress=False, **options)
    assert list(tmp_path.iterdir()) == []
    assert state_digest(model) == before


@pytest.mark.parametrize("name", METHODS)
def test_a_task_of_weight_zero_has_no_say(shelf, tmp_path, name):
    a, b, c = (shelf(task) for task in LLAMAS)
    options = {"method": name, "rank": 6}  # which counts the task of weight zero, too
    with_zero = merged_deltas(merge(tmp_path / "zero", [a, b, c], weights=[1.0, 0.0, 2.0], **options))
    without = merged_deltas(merge(tmp_path / "without", [a, c], weights=[1.0, 2.0], **options))
    for layer, delta in with_zero.items():
        assert distance(delta, without[layer]) < 1e-5, layer


@pytest.mark.parametrize("name", METHODS)
def test_a_layer_whose_only_task_has_weight_zero_is_zero(shelf, tmp_path, name):
    tasks = [shelf("a"), shelf("lora")]  # which trained q, v and down only
    found = merged_deltas(merge(tmp_path / "merged", tasks, weights=[0.0, 1.0], method=name))
    assert {bool(delta.any()) for layer, delta in found.items() if layer in tasks[1].deltas} == {True}
    assert not any(delta.any() for layer, delta in found.items() if layer not in tasks[1].deltas)


# ------------------------------------------------------------------------------------------------ several processes


def test_the_layers_are_shared_out_over_processes(shelf):
    """Also where nobody was measured, so that the covariances' ranks do not say what a layer costs."""
    plan = prepare_merge([shelf("llama a?").folder], MergeOptions(method="average"), hub={}, progress=False)
    shares = in_processes(2, lambda processes: processes.share(plan.groups, plan.cost_of))
    assert sorted(shares[0] + shares[1]) == sorted(plan.groups)
    costs = [sum(map(plan.cost_of, share)) for share in shares]
    assert min(costs) > 0.7 * max(costs)
