"""Gated and routed merges under `torch.compile`, and in the compiled decoding steps of `generate`."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from transformers import CompileConfig

from peft_many.tuner.gated_linear import GatedLinear
from tests.files import making
from tests.routing.test_gates import (
    alone,
    gated,
    generate,
    inputs_of,
    logits,
    merge,
    models_of_rows,
    picture,
)


@pytest.fixture(autouse=True)
def _fresh() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def language_model(model: PeftModel) -> nn.Module:
    found: nn.Module = model.get_base_model().model.language_model
    return found


def test_the_layers_of_a_merge_are_one_graph() -> None:
    for made, dynamic in ((making.merge, False), (merge, None)):  # sizes that are not known take long
        model = made("llava")
        expected = [logits(model, inputs_of("llava")), logits(model, inputs_of("llava", [[], []]))]
        language_model(model).compile(backend="aot_eager", fullgraph=True, dynamic=dynamic)
        for inputs, known in zip((inputs_of("llava"), inputs_of("llava", [[], []])), expected, strict=True):
            torch.testing.assert_close(logits(model, inputs), known, atol=1e-5, rtol=1e-5)


def test_layers_share_their_gates() -> None:
    asked = []

    def count(graph: torch.fx.GraphModule, example: Any) -> Any:
        asked.append(sum("peft_many.gates" in str(node.target) for node in graph.graph.nodes))
        return graph.forward

    model = merge("llava")
    language_model(model).compile(backend=aot_autograd(fw_compiler=count))
    logits(model, inputs_of("llava"))
    assert sum(isinstance(module, GatedLinear) for module in model.modules()) > 1
    assert asked == [1]


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
@pytest.mark.parametrize("beams", [1, 2])
def test_compiled_decoding_steps_with_a_static_cache(family: str, beams: int) -> None:
    inputs, model = inputs_of(family), merge(family)
    compiled = CompileConfig(backend="aot_eager", mode=None)
    compiled._compile_all_devices = True
    options = {"num_beams": beams, "cache_implementation": "static"}
    found = generate(model, inputs, compile_config=compiled, **options)
    assert torch.equal(found, generate(gated(family), inputs, **options))
    for row, own in enumerate(models_of_rows(family)):
        assert torch.equal(found[row], generate(own, inputs, num_beams=beams)[row])


def test_other_images_in_the_same_graphs() -> None:
    model = merge("llava")
    language_model(model).compile(backend="aot_eager", dynamic=False)
    for tasks in ((0, 1), (2, 0), (1, 1)):
        inputs = inputs_of("llava", [[picture("llava", task)] for task in tasks])
        found = logits(model, inputs)
        for row, task in enumerate(tasks):
            mask = inputs["attention_mask"][row].bool()
            expected = logits(alone("llava", task), inputs)[row][mask]
            torch.testing.assert_close(found[row][mask], expected, atol=1e-5, rtol=1e-5)


def test_threads_in_the_same_graphs() -> None:
    model, failures = merge("llava"), []
    language_model(model).compile(backend="eager", dynamic=False)
    static = {"cache_implementation": "static", "disable_compile": True}  # two graphs: of what is read, of a step
    inputs = [inputs_of("llava", [[picture("llava", task)], []]) for task in (0, 1)]
    expected = [generate(alone("llava", task), inputs[task])[0] for task in (0, 1)]
    assert torch.equal(generate(model, inputs[0], **static)[0], expected[0])  # compiled once, which is not for threads

    def work(task: int) -> None:
        try:
            assert torch.equal(generate(model, inputs[task], **static)[0], expected[task])
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(task,)) for task in (0, 1) * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
