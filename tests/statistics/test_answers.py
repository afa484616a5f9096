"""Weighing tokens by how far they move the answers: against plain autograd in float64, and what must not change."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

from peft_many import collect_statistics, merge_adapter_files
from peft_many.files.errors import UnmergeableAdapterError
from peft_many.files.statistics import AdapterStatistics
from tests import tiny
from tests.files import making

from .test_collect import adapted, assert_unchanged, family, layer_names, state_of

KINDS = pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])


def collect(model: Any, batches: Any, **options: Any) -> AdapterStatistics:
    return collect_statistics(model, batches, **{"progress": False, "energy": 1.0, "weigh_tokens": True, **options})


def labelled(count: int = 2, padding: int = 2, prompts: bool = True) -> list[dict[str, Tensor]]:
    """Rows of seven tokens, padded on the right, all of them answers if there are no prompts between."""
    generator = torch.Generator().manual_seed(3)
    batches = []
    for _ in range(count):
        ids = torch.randint(3, 100, (3, 7), generator=generator)
        labels = ids.clone()
        if prompts:
            labels[torch.rand(3, 7, generator=generator) < 0.5] = -100
            labels[:, :2], labels[:, 4] = -100, ids[:, 4]
        by = {"input_ids": (ids, tiny.PAD), "attention_mask": (torch.ones_like(ids), 0), "labels": (labels, -100)}
        batches.append({name: nn.functional.pad(one, (0, padding), value=value) for name, (one, value) in by.items()})
    return batches


def by_autograd(model: PeftModel, batches: list[dict[str, Tensor]], shifted: bool) -> dict[str, Tensor]:
    """By layer `Σ w_i x_i x_iᵀ` over all rows, with gradients of each layer's own output alone."""
    base, generator = model.get_base_model(), torch.Generator().manual_seed(0)
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def note(name: str, _: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        output.retain_grad()
        seen.setdefault(name, []).append((args[0], output))

    layers = {name: base.get_submodule(name) for name in layer_names(model)}
    handles = [layer.register_forward_hook(partial(note, name)) for name, layer in layers.items()]
    for batch in batches:
        logits = model.eval()(**batch).logits
        labels = batch["labels"]
        rows, places = ((labels[:, 1:] if shifted else labels) != -100).nonzero(as_tuple=True)
        answers = logits[rows, places]
        signs = torch.randint(2, answers.shape, generator=generator, dtype=torch.int8).double() * 2 - 1
        (answers * (signs - signs.mean(1, keepdim=True)) / answers.shape[1] ** 0.5).sum().backward()
    for handle in handles:
        handle.remove()
    squares: dict[tuple[int, int], Any] = {}
    for calls in seen.values():
        for number, (x, y) in enumerate(calls):
            found = squares.setdefault((number, id(x)), torch.zeros(x.shape[:-1], dtype=x.dtype))
            found += 0 if y.grad is None else y.grad.square().sum(-1)
    sums = {}
    for name, calls in seen.items():
        parts = [(x.detach(), squares[number, id(x)].sqrt()) for number, (x, _) in enumerate(calls)]
        sums[name] = sum(torch.einsum("rt,rti,rtj->ij", w, x, x) for x, w in parts)
    model.zero_grad()
    return sums


@KINDS
def test_covariances_are_weighed_by_gradients_of_the_logits(kind: str) -> None:
    model = adapted(kind).double()
    batches = labelled(prompts=kind != "t5")  # where the decoder's mask is made of the labels
    expected = by_autograd(model, batches, shifted=kind != "t5")
    (task,) = collect(model, batches).tasks
    assert task.weighed
    assert len(expected) == len(task.input_of) > 4
    for name, total in expected.items():
        found = task.covariance_of(name).dense() * task.tokens_of(name)
        torch.testing.assert_close(found, total, rtol=1e-4, atol=1e-6 * float(total.abs().max()))


def test_padding_counts_nothing() -> None:
    model = adapted("llama").double()
    (one,), (other,) = (collect(model, labelled(padding=length)).tasks for length in (0, 4))
    for name in one.input_of:
        assert one.tokens_of(name) == other.tokens_of(name)
        torch.testing.assert_close(
            one.covariance_of(name).dense(), other.covariance_of(name).dense(), rtol=1e-5, atol=1e-9
        )


def test_batches_without_an_answer_move_nothing() -> None:
    batches = labelled()
    silent = [{**batch, "labels": torch.full_like(batch["labels"], -100)} for batch in batches]
    (task,) = collect(adapted("llama"), silent).tasks
    assert all(measured.covariance.trace == 0 for measured in task.inputs.values())


@family
def test_models_with_images_are_as_before(family: str) -> None:
    model = adapted(family)
    batches = list(making.task_batches(model, family, style=0))
    batches = [{**batch, "labels": batch["input_ids"]} for batch in batches]
    model.train()
    with torch.no_grad():
        model(**batches[0])  # transformers adds hooks of its own in the first call
    before = state_of(model)
    (task,) = collect(model, batches).tasks
    assert_unchanged(model, before)
    assert all(measured.covariance.trace > 0 for measured in task.inputs.values())
    (plain,) = collect(model, batches, weigh_tokens=False).tasks
    assert not plain.weighed
    assert {name: plain.tokens_of(name) for name in plain.input_of} == {n: task.tokens_of(n) for n in task.input_of}
    for name, seen in plain.projectors.items():
        torch.testing.assert_close(task.projectors[name].prototype, seen.prototype)


def test_sharing_and_sketches_make_no_difference_but_rounding() -> None:
    model = adapted("llama")
    (whole,) = collect(model, labelled(4)).tasks
    (apart,) = collect(model, labelled(4), share_inputs=False).tasks
    (sketched,) = collect(model, labelled(4), energy=None, rank=8).tasks
    down = next(name for name in whole.input_of if name.endswith("down_proj"))  # which reads an input of its own
    torch.testing.assert_close(apart.covariance_of(down).dense(), whole.covariance_of(down).dense())
    for name in whole.input_of:
        assert sketched.covariance_of(name).trace == pytest.approx(whole.covariance_of(name).trace, rel=1e-3)


@pytest.mark.parametrize("labels", [None, torch.zeros(3, dtype=torch.long)])
def test_labels_are_needed(labels: Any) -> None:
    model = adapted("llama")
    before = state_of(model)
    batch = {**labelled()[0], "labels": labels}
    with pytest.raises(ValueError, match="labels"):
        collect(model, [batch])
    assert_unchanged(model, before)


def test_logits_have_to_be_where_labels_are() -> None:
    model = adapted("llama")
    with pytest.raises(RuntimeError, match="logits at every label"):
        collect(model, labelled(), forward_fn=lambda m, batch: m(input_ids=batch["input_ids"], logits_to_keep=1))


def test_weighed_and_plain_statistics_are_not_merged_together(tmp_path: Path) -> None:
    for name, weigh in (("one", True), ("two", False), ("three", True)):
        model = adapted("llama", task_name=name)
        making.perturb(model, "default", seed=1 + ("one", "two", "three").index(name))
        collect(model, labelled(), weigh_tokens=weigh)
        model.save_pretrained(tmp_path / name)
    with pytest.raises(UnmergeableAdapterError, match="weigh_tokens"):
        merge_adapter_files([tmp_path / "one", tmp_path / "two"], tmp_path / "merge", progress=False)
    merge_adapter_files([tmp_path / "one", tmp_path / "three"], tmp_path / "merge", progress=False)
    merged = AdapterStatistics.load(tmp_path / "merge" / "adapter_statistics.safetensors")
    assert [task.weighed for task in merged.tasks] == [True, True]


def test_half_precision_is_near() -> None:
    exact, rounded = (
        collect(adapted("llama").to(dtype), labelled()).tasks[0] for dtype in (torch.float32, torch.bfloat16)
    )
    for name in exact.input_of:
        one, other = (task.covariance_of(name).dense() for task in (exact, rounded))
        assert (other - one).norm() < 0.05 * one.norm()
