"""The mean of the deltas against its definition."""

from dataclasses import replace

import torch
from hypothesis import given

from peft_many.methods import Average
from tests.methods.layers import dense, dense_deltas, layer_tasks, relative_error, seeds


@given(seeds)
def test_it_is_the_weighted_mean_of_the_deltas(seed):
    tasks = layer_tasks(seed, ranks=[2, 0, 4])
    total = sum(task.weight for task in tasks)
    expected = sum(task.weight / total * delta for task, delta in zip(tasks, dense_deltas(tasks), strict=True))
    assert relative_error(dense(Average().merge(tasks)), expected) < 1e-12


def test_an_untrained_layer_counts_as_zero():
    one, untrained = (replace(task, weight=1.0) for task in layer_tasks(0, ranks=[3, 0]))
    assert relative_error(dense(Average().merge([one, untrained])), one.delta.dense() / 2) < 1e-12


def test_the_tasks_B_stand_side_by_side():
    tasks = layer_tasks(1)
    assert torch.equal(Average().merge(tasks).B, torch.cat([task.delta.B for task in tasks], dim=1))
