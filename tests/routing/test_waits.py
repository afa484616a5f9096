"""What routing and gates cost a GPU beside the adapters' own arithmetic: few kernels, and few waits for it."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from peft_many.tuner.gated_linear import GatedLinear
from tests.files import making
from tests.routing.test_gates import alone, gated, inputs_of, merge, picture, plain
from tests.waits import on_pretended_gpu

tasks = pytest.mark.parametrize("tasks", [(0, 0), (0, 2), (1, None)], ids=str)


def inputs_for(tasks: tuple[int | None, ...]) -> dict[str, torch.Tensor]:
    return inputs_of("llava", [[] if task is None else [picture("llava", task)] for task in tasks])


@tasks
def test_the_host_waits_once_to_route_and_once_to_gate(
    monkeypatch: pytest.MonkeyPatch, tasks: tuple[int | None, ...]
) -> None:
    inputs = inputs_for(tasks)
    of_one = on_pretended_gpu(monkeypatch, alone("llava", 0), inputs).waits
    routed = on_pretended_gpu(monkeypatch, plain("llava"), inputs).waits
    assert routed - of_one == Counter(cpu=1), "what each image counts for each task"
    both = on_pretended_gpu(monkeypatch, gated("llava"), inputs).waits
    assert both - of_one == Counter(cpu=2), "and which row it stands in"


@pytest.mark.parametrize("gate", [False, True])
def test_a_decoding_step_waits_for_nothing(monkeypatch: pytest.MonkeyPatch, gate: bool) -> None:
    inputs = inputs_for((0, 2))
    found = []
    for model in (alone("llava", 0), gated("llava") if gate else plain("llava")):
        with torch.no_grad():
            cache = model(**inputs, use_cache=True).past_key_values
        mask = torch.cat([inputs["attention_mask"], torch.ones(2, 1, dtype=torch.int64)], dim=1)
        step = {"input_ids": torch.tensor([[30], [31]]), "attention_mask": mask}
        found.append(on_pretended_gpu(monkeypatch, model, step, lambda: model(**step, past_key_values=cache)))  # noqa: B023
    of_one, of_merge = found
    assert of_merge.waits == of_one.waits
    layers = sum(isinstance(module, GatedLinear) for module in gated("llava").modules())
    assert of_merge.kernels - of_one.kernels == (Counter(mul=layers) if gate else Counter()), "the gate itself"
    assert not of_one.kernels - of_merge.kernels


def test_in_half_precision_a_merge_launches_less_than_one_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    text = inputs_of("llava", [[], []])
    one = making.make_adapter("llava", 0, dtype=torch.bfloat16).eval()
    of_one = on_pretended_gpu(monkeypatch, one, text).kernels
    for made in (making.merge, merge):
        of_merge = on_pretended_gpu(monkeypatch, made("llava", dtype=torch.bfloat16), text).kernels
        assert not of_merge - of_one
        assert set(of_one - of_merge) == {"_to_copy"}, "to float32 and back"
