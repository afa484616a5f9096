"""TIES against PEFT's function to the bit, and against the paper's algorithm."""

import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft.utils.merge_utils import ties

from peft_many.methods import Ties
from tests.methods.layers import dense_deltas, layer_tasks, relative_error, seeds, ties_reference


@pytest.mark.parametrize("sign", ["total", "frequency"])
@pytest.mark.parametrize("density", [0.2, 0.5])
def test_it_is_what_peft_s_function_gives(sign, density):
    tasks = layer_tasks(seed=0)
    deltas = [task.delta.B @ task.delta.A for task in tasks]
    weights = torch.tensor([task.weight for task in tasks])
    assert torch.equal(Ties(density, 1.0, sign).merge(tasks), ties(deltas, weights, density, sign))


@given(seeds, st.sampled_from([0.1, 0.2, 0.7, 1.0]))
def test_it_is_the_paper_s_algorithm(seed, density):
    tasks = layer_tasks(seed, width=6, out=5)
    expected = ties_reference(dense_deltas(tasks), [task.weight for task in tasks], density)
    assert relative_error(Ties(density).merge(tasks).double(), expected) < 1e-5


def test_tasks_that_did_not_train_the_layer_have_no_sign():
    tasks = layer_tasks(seed=1, ranks=[2, 0, 3])
    assert torch.equal(Ties().merge(tasks), Ties().merge([tasks[0], tasks[2]]))


def test_a_density_of_one_is_no_reason_to_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Ties(density=1.0).merge(layer_tasks(seed=2))
