"""DARE against PEFT's functions to the bit, its expectation, and its random numbers."""

import zlib

import pytest
import torch
from peft.utils.merge_utils import dare_linear, dare_ties

from peft_many.methods import DareLinear, DareTies
from tests.methods.layers import dense_deltas, layer_tasks, relative_error


@pytest.mark.parametrize("density", [0.1, 0.6])
@pytest.mark.parametrize(("method", "function"), [(DareLinear, dare_linear), (DareTies, dare_ties)])
def test_it_is_what_peft_s_function_gives(method, function, density):
    tasks = layer_tasks(seed=0)
    deltas = [task.delta.B @ task.delta.A for task in tasks]
    weights = torch.tensor([task.weight for task in tasks])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(zlib.crc32(b"7 some.layer"))
        expected = function(deltas, weights, density)
    assert torch.equal(method(density=density, seed=7).merge(tasks, "some.layer"), expected)


def test_the_mean_over_seeds_is_the_sum_of_the_deltas():
    tasks = layer_tasks(seed=1)
    expected = sum(task.weight * delta for task, delta in zip(tasks, dense_deltas(tasks), strict=True))
    draws = [DareLinear(density=0.5, seed=seed).merge(tasks, "layer").double() for seed in range(400)]
    assert relative_error(torch.stack(draws).mean(0), expected) < 0.1
    assert relative_error(draws[0], expected) > 0.3


@pytest.mark.parametrize("method", [DareLinear, DareTies])
def test_the_seed_and_the_layer_decide_and_the_global_generator_is_left_alone(method):
    tasks = layer_tasks(seed=2)
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    first = method().merge(tasks, "layer")
    assert torch.equal(torch.rand(3), expected)
    torch.manual_seed(1)
    assert torch.equal(method().merge(tasks, "layer"), first)
    assert not torch.equal(method(seed=1).merge(tasks, "layer"), first)
    assert not torch.equal(method().merge(tasks, "other layer"), first)


def test_the_global_generator_is_left_alone_after_an_error_too(monkeypatch):
    def fail(*args):
        torch.rand(1)
        raise RuntimeError("out of memory")

    monkeypatch.setattr("peft.utils.merge_utils.dare_linear", fail)
    before = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="memory"):
        DareLinear().merge(layer_tasks(seed=3), "layer")
    assert torch.equal(torch.get_rng_state(), before)
