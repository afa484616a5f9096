"""The registry of methods, and what all of them must do alike."""

from __future__ import annotations

import itertools
import json
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

from peft_many.algebra.lpm import LowRankDelta
from peft_many.methods import METHODS, LayerTask, MergeMethod, Ties, as_method
from tests.methods.layers import dense, layer_tasks, relative_error


@pytest.fixture(params=METHODS)
def method(request) -> MergeMethod:
    return METHODS[request.param]()


def test_a_name_gives_the_method_with_its_defaults(method):
    assert as_method(method.name) == method
    assert as_method("lpm") is None
    assert as_method(Ties(density=0.3)) == Ties(density=0.3)


def test_the_documentation_knows_it(method):
    kind, docs = type(method), Path(__file__).parents[2] / "docs"
    assert f"::: {kind.__module__}.{kind.__name__}\n" in (docs / "reference.md").read_text(encoding="utf-8")
    assert f'`"{method.name}"`' in (docs / "how-to" / "other-methods.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("unknown", ["tyes", "", "LPM", None, 3, Ties])
def test_an_unknown_method_is_refused_with_the_known_ones(unknown):
    with pytest.raises(ValueError, match=r"unknown method .* known: lpm, average, .*ties.*regmean.*knots"):
        as_method(unknown)


def test_a_method_says_in_json_what_it_is(method):
    described = json.loads(json.dumps(method.describe()))
    assert described["name"] == method.name
    assert "arXiv" in described["source"]
    options = {name: value for name, value in described.items() if name not in ("name", "source")}
    assert type(method)(**options) == method


@pytest.mark.parametrize("value", [-0.1, 0.0, 1.5, float("nan"), float("inf")])
def test_options_are_validated(method, value):
    names = [field.name for field in fields(method)]
    for name in names:
        if name in ("density", "alpha") or (name == "scaling" and value != value):
            with pytest.raises(ValueError, match=f"`{name}`"):
                replace(method, **{name: value})
    if "majority_sign_method" in names:
        with pytest.raises(ValueError, match="`majority_sign_method`"):
            replace(method, majority_sign_method="loudest")
    if "seed" in names:
        with pytest.raises(ValueError, match="`seed`"):
            replace(method, seed=value)


@pytest.mark.parametrize("name", [name for name in METHODS if not name.startswith("dare")])
def test_the_order_of_the_tasks_does_not_matter(name):
    """DARE draws its masks in the order of the tasks, which merging sorts."""
    tasks = layer_tasks(seed=3)
    first = dense(METHODS[name]().merge(tasks, "layer"))
    for order in itertools.permutations(tasks):
        assert relative_error(dense(METHODS[name]().merge(order, "layer")), first) < 1e-6


def test_the_merge_has_at_most_the_rank_that_is_announced(method):
    ranks = [2, 0, 4, 3]
    merged = method.merge(layer_tasks(seed=4, ranks=ranks, out=20, width=30), "layer")
    if isinstance(merged, LowRankDelta):
        assert merged.A.shape == (merged.B.shape[1], 30)
        assert merged.B.shape == (20, merged.A.shape[0])
        assert merged.A.shape[0] <= method.rank_of(ranks)
    else:
        assert merged.shape == (20, 30)


def test_zero_deltas_merge_to_zero(method):
    """A fresh LoRA's `B` is zero."""
    tasks = [replace(task, delta=LowRankDelta(task.delta.A, 0 * task.delta.B)) for task in layer_tasks(seed=5)]
    merged = dense(method.merge(tasks, "layer"))
    assert torch.equal(merged, torch.zeros(11, 14, dtype=torch.float64))


def test_a_layer_of_fewer_outputs_or_inputs_than_ranks(method):
    for out, width in ((3, 30), (30, 3), (1, 1)):
        merged = dense(method.merge(layer_tasks(seed=6, out=out, width=width), "layer"))
        assert merged.shape == (out, width)
        assert merged.isfinite().all()


@pytest.mark.parametrize("name", ["average", "regmean", "core_space"])
def test_one_task_comes_back_as_it_was(name):
    for seed in range(5):
        (task,) = layer_tasks(seed, ranks=[4])
        merged = METHODS[name]().merge([replace(task, weight=1.0)], "layer")
        assert relative_error(dense(merged), task.delta.dense()) < 1e-10


@pytest.mark.parametrize("name", ["ties", "knots", "dare_linear", "dare_ties"])
def test_one_task_comes_back_where_nothing_is_pruned(name):
    (task,) = layer_tasks(0, ranks=[4])
    merged = METHODS[name](density=1.0, scaling=1.0).merge([replace(task, weight=1.0)], "layer")
    assert relative_error(dense(merged), task.delta.dense()) < 1e-6


@pytest.mark.parametrize("name", ["average", "regmean", "core_space"])
def test_equal_tasks_come_back_as_they_were(name):
    """Of equal weights: TSV-M's directions coincide, and a third of each task's is all of it."""
    one, two, three = layer_tasks(7, ranks=[4, 4, 4], out=15)
    same = [replace(task, delta=one.delta, weight=1.0) for task in (one, two, three)]
    assert relative_error(dense(METHODS[name]().merge(same, "layer")), one.delta.dense()) < 1e-10


@pytest.mark.parametrize("name", ["task_arithmetic", "ties", "dare_linear", "dare_ties", "knots", "core_space"])
def test_the_scaling_scales(name):
    tasks = layer_tasks(8)
    one = dense(METHODS[name](scaling=1.0).merge(tasks, "layer"))
    assert relative_error(dense(METHODS[name](scaling=-0.3).merge(tasks, "layer")), -0.3 * one) < 1e-6


def test_weights_are_relative_or_multiply_the_deltas(method):
    tasks = layer_tasks(9)
    doubled = [replace(task, weight=2 * task.weight) for task in tasks]
    factor = 1 if method.name in ("average", "regmean") else 2
    expected = factor * dense(method.merge(tasks, "layer"))
    assert relative_error(dense(method.merge(doubled, "layer")), expected) < 1e-6


def test_a_user_s_own_method_is_a_subclass():
    class First(MergeMethod):
        name = "first"
        source = "nowhere"

        def merge(self, tasks: list[LayerTask], layer: str = "") -> LowRankDelta:
            return tasks[0].delta

    assert as_method(First()).describe() == {"name": "first", "source": "nowhere"}
