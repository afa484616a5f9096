"""Pools: one adapter of constant size in place of many, which merges as they would have."""

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from peft_many import merge_adapter_files, pool_adapters
from peft_many.files.errors import UnmergeableAdapterError
from peft_many.files.statistics import AdapterStatistics
from tests import adapters
from tests.adapters import PROJECTOR, STATISTICS, WEIGHTS, covariances, distance, merged_deltas

NAMES = "abcd"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("pools")
    return {name: adapters.make(root / name, seed=seed, task_name=name) for seed, name in enumerate(NAMES)}


@pytest.fixture
def folders(made):
    return {name: one.folder for name, one in made.items()}


def pool(folders, place, **options):
    return pool_adapters(folders, place, progress=False, **options)


def merge(folders, place, **options):
    return merge_adapter_files(folders, place, progress=False, **options)


def config(folder):
    return json.loads((folder / "adapter_config.json").read_text())


def gap(made, found, expected):
    """The largest difference of two merges by what it does to the tasks' inputs; a pool's factors are float16."""
    gaps = []
    for layer, delta in expected.items():
        inputs = torch.cat([task.inputs[layer] for task in made.values()])
        gaps.append((((found[layer] - delta) @ inputs.T).norm() / (delta @ inputs.T).norm()).item())
    return max(gaps)


@pytest.mark.parametrize("weights", [None, [0.5, 2.0, 1.0]])
def test_merging_from_a_pool_is_merging_its_tasks(made, folders, tmp_path, weights):
    first = pool([folders["a"], folders["b"]], tmp_path / "pool", weights=weights and weights[:2])
    found = merge([first, folders["c"]], tmp_path / "found", projectors="mean", weights=weights and [1.0, weights[2]])
    given = [folders[name] for name in "abc"]
    expected = merge(given, tmp_path / "expected", projectors="mean", weights=weights)
    tasks = {name: made[name] for name in "abc"}
    assert gap(tasks, merged_deltas(found), merged_deltas(expected)) < 2e-2  # the pool's covariances are float16
    tensors, others = load_file(found / WEIGHTS), load_file(expected / WEIGHTS)
    for key in others:
        if PROJECTOR in key:
            torch.testing.assert_close(tensors[key], others[key])


def test_pools_are_pooled_further_as_tasks_come(made, folders, tmp_path):
    state = folders["a"]
    for name in "bcd":
        state = pool([state, folders[name]], tmp_path / f"after {name}")
    at_once = pool(list(folders.values()), tmp_path / "at once")
    assert gap(made, merged_deltas(state), merged_deltas(at_once)) < 5e-3
    (one,), (two,) = (AdapterStatistics.load(folder / STATISTICS).tasks for folder in (state, at_once))
    assert one.weight == two.weight == 4.0
    assert one.images == two.images
    assert one.samples == two.samples
    torch.testing.assert_close(one.projectors[PROJECTOR].prototype, two.projectors[PROJECTOR].prototype)
    assert distance(one.projectors[PROJECTOR].spread.dense(), two.projectors[PROJECTOR].spread.dense()) < 1e-2
    for layer, covariance in covariances(two).items():
        assert distance(one.covariance_of(layer).dense(), covariance.dense()) < 1e-2


def test_images_of_all_tasks_count_alike(folders, tmp_path):
    """The prototype and spread are those of all images together."""
    tasks = [AdapterStatistics.load(folder / STATISTICS).tasks[0] for folder in folders.values()]
    (pooled,) = AdapterStatistics.load(pool(list(folders.values()), tmp_path / "pool") / STATISTICS).tasks
    images = sum(task.images for task in tasks)
    mean = sum(task.images * task.projectors[PROJECTOR].prototype.double() for task in tasks) / images
    second = torch.zeros(len(mean), len(mean), dtype=torch.float64)
    for task in tasks:
        own = task.projectors[PROJECTOR].prototype.double()
        second += task.images / images * (task.projectors[PROJECTOR].spread.dense() + torch.outer(own, own))
    assert pooled.images == images
    torch.testing.assert_close(pooled.projectors[PROJECTOR].prototype.double(), mean, rtol=1e-5, atol=1e-6)
    assert distance(pooled.projectors[PROJECTOR].spread.dense(), second - torch.outer(mean, mean)) < 2e-3


def test_the_size_does_not_grow_with_the_tasks(folders, tmp_path):
    few = pool([folders["a"], folders["b"]], tmp_path / "few", rank=6, statistics_rank=6)
    many = pool([few, folders["c"], folders["d"]], tmp_path / "many", rank=6, statistics_rank=6)
    for name in (WEIGHTS, STATISTICS):
        sizes = [{key: t.shape for key, t in load_file(folder / name).items()} for folder in (few, many)]
        assert sizes[0] == sizes[1]


def test_a_pool_of_one_is_that_adapter(folders, tmp_path):
    alone = pool([folders["a"]], tmp_path / "pool")
    one, two = (PeftModel.from_pretrained(adapters.base("llava"), place) for place in (folders["a"], alone))
    torch.testing.assert_close(
        adapters.logits(one.eval(), "llava"), adapters.logits(two.eval(), "llava"), rtol=1e-4, atol=1e-4
    )


def test_the_tasks_of_a_pool_are_named_for_good(folders, tmp_path):
    first = pool([folders["a"], folders["b"]], tmp_path / "p1", weights=[2.0, 1.0])
    assert config(first)["task_name"] == "a+b"
    assert [(task["name"], task["weight"]) for task in config(first)["pool"]["tasks"]] == [("a", 2.0), ("b", 1.0)]
    second = pool([first, folders["c"], folders["d"]], tmp_path / "p2")
    assert config(second)["task_name"] == "3 tasks" or config(second)["task_name"] == "a+b+c+d"
    assert [task["name"] for task in config(second)["pool"]["tasks"]] == list(NAMES)
    merged = merge([first, folders["c"]], tmp_path / "merged")
    again = merge([merged, folders["d"]], tmp_path / "again")
    entry = next(task for task in config(again)["merge"]["tasks"] if task["name"] == "a+b")
    assert [task["name"] for task in entry["origin"]["pooled"]] == ["a", "b"]
    assert entry["weight"] == 3.0


def test_pools_are_routed_like_tasks(folders, tmp_path):
    first = pool([folders["a"], folders["b"]], tmp_path / "pool")
    merged = merge([first, folders["c"]], tmp_path / "merged", router="gaussian")
    routed = config(merged)["merge"]["routing"][PROJECTOR]["tasks"]
    assert [task["name"] for task in routed] == ["a+b", "c"]
    model = PeftModel.from_pretrained(adapters.base("llava"), merged)
    assert adapters.logits(model, "llava").isfinite().all()


@pytest.mark.parametrize(("option", "value"), [("rank", 0), ("statistics_rank", 0)])
def test_ranks_must_be_positive(folders, tmp_path, option, value):
    with pytest.raises(ValueError, match=f"`{option}` must be at least 1"):
        pool([folders["a"]], tmp_path / "pool", **{option: value})
    assert not (tmp_path / "pool").exists()


def test_what_is_in_a_pool_already_is_not_given_again(folders, tmp_path):
    first = pool([folders["a"], folders["b"]], tmp_path / "first")
    second = pool([first, folders["c"]], tmp_path / "second")
    for given in ([first, folders["a"]], [folders["c"], second], [first, second]):
        with pytest.raises(UnmergeableAdapterError, match="The same adapter is given twice"):
            merge(given, tmp_path / "merged", projectors="mean")
        with pytest.raises(UnmergeableAdapterError, match="The same adapter is given twice"):
            pool(given, tmp_path / "pooled", task_name="all")


def test_merges_with_a_gate_can_be_pooled(made, folders, tmp_path):
    gated = merge([folders["a"], folders["b"]], tmp_path / "gated", gate_lora=True)
    found = pool([gated, folders["c"]], tmp_path / "found", task_name="all")
    expected = pool([folders[name] for name in "abc"], tmp_path / "expected", task_name="all")
    tasks = {name: made[name] for name in "abc"}
    assert gap(tasks, merged_deltas(found), merged_deltas(expected)) < 1e-4
