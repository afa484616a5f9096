"""What the layers of a gated merge compute: of the tasks that a batch belongs to, not of all that were merged."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from peft_many.routing.row_weights import RowWeights
from peft_many.tuner import gated_linear
from peft_many.tuner.gated_linear import ColumnsLinear, GatedLinear
from tests.routing.test_gates import alone, gated, inputs_of, logits, picture


def inputs_for(tasks):
    return inputs_of("llava", [[picture("llava", task)] for task in tasks])


def seen(model, inputs):
    """The width of what each `lora_B` gets."""
    found, handles = set(), []
    for module in model.modules():
        if isinstance(module, ColumnsLinear):
            handles.append(module.register_forward_pre_hook(lambda module, args: found.add(args[0].shape[-1])))
    said = logits(model, inputs)
    for handle in handles:
        handle.remove()
    return found, said


@pytest.mark.parametrize("tasks", [(0, 0), (1, 1), (2, 2), (1, 0), (2, 1), (0, 2)], ids=str)
def test_only_the_tasks_that_are_there_are_computed(tasks):
    inputs, model = inputs_for(tasks), gated("llava")
    (ranks,) = {module.ranks for module in model.modules() if isinstance(module, GatedLinear)}
    widths, said = seen(model, inputs)
    assert widths == {sum(ranks[min(tasks) : max(tasks) + 1])}
    for row, task in enumerate(tasks):
        mask = inputs["attention_mask"][row].bool()
        expected = logits(alone("llava", task), inputs)[row][mask]
        torch.testing.assert_close(said[row][mask], expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_tasks_between_those_of_the_rows_are_left_out_where_these_are_far_apart(monkeypatch):
    """Two of nine tasks, the first and the last, of rank 2."""
    weights = torch.zeros(2, 9)
    weights[0, 0] = weights[1, 8] = 1.0
    gates = RowWeights(weights, torch.ones(2), 0).gates((2,) * 9, 1, torch.float32, torch.device("cpu"))
    assert gates.columns.tolist() == [0, 1, 16, 17]
    first = GatedLinear(nn.Linear(5, 18, bias=False), "default", (2,) * 9)
    first.task_weight.normal_()
    second = ColumnsLinear(nn.Linear(18, 6, bias=False), first)
    monkeypatch.setattr(gated_linear, "current_gates", lambda *_: gates)
    given = torch.randn(2, 3, 5)
    found = second(first(given))
    for row, own in enumerate((slice(0, 2), slice(16, 18))):
        torch.testing.assert_close(found[row], given[row] @ first.task_weight[own].T @ second.weight[:, own].T)


def test_a_row_that_gets_the_merged_delta_needs_all_columns():
    model = gated("llava")
    (ranks,) = {module.ranks for module in model.modules() if isinstance(module, GatedLinear)}
    inputs = inputs_of("llava", [[picture("llava", 1)], []])
    assert seen(model, inputs)[0] == {sum(ranks)}


@torch.no_grad()
def test_a_decoding_step_of_one_task_computes_what_its_adapter_does():
    inputs, counted = inputs_for((1, 1)), []
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, 1, dtype=torch.int64)], dim=1)
    for model in (gated("llava"), alone("llava", 1)):
        cache = model(**inputs, use_cache=True).past_key_values
        with FlopCounterMode(display=False) as counter:
            model(input_ids=torch.tensor([[30], [31]]), attention_mask=mask, past_key_values=cache)
        counted.append(counter.get_total_flops())
    assert counted[0] == counted[1] > 0
