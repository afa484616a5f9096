"""What the hooks ask of a GPU: few kernels for each input, no wait for a result, no tensors of two devices."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.gpu.launches import Launches, launches
from peft_many.families.image_rows import ImageRows
from peft_many.statistics import images
from peft_many.statistics.images import PrototypeHooks
from peft_many.statistics.inputs import CovarianceHooks
from peft_many.statistics.tokens import TokenRows

WIDTH, WIDER, ROWS, LENGTH, SIZE = 24, 40, 3, 50, 8
INPUTS = 3  # of the layers below: q, k and v share one
MOST_LAUNCHES = 12
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


class Linear(nn.Linear):
    def reset_parameters(self) -> None:  # random numbers need a device that is there
        if self.weight.device.type == "cpu":
            super().reset_parameters()


class Layers(nn.Module):
    """Linear layers as in a decoder."""

    def __init__(self, dtype: torch.dtype, device: str) -> None:
        super().__init__()
        made: Any = {"dtype": dtype, "device": device}
        self.q, self.k, self.v = (Linear(WIDTH, WIDTH, **made) for _ in range(3))
        self.up, self.down = Linear(WIDTH, WIDER, **made), Linear(WIDER, WIDTH, **made)

    def forward(self, hidden: Tensor) -> Tensor:
        attended = self.q(hidden) + self.k(hidden) + self.v(hidden)
        output: Tensor = self.down(self.up(attended).to(self.down.weight.device))
        return output


def masks(padded: bool) -> dict[str, Tensor]:
    mask = torch.ones(ROWS, LENGTH, dtype=torch.int64)
    mask[0, : 9 if padded else 0] = 0
    return {"attention_mask": mask}


@contextmanager
def measuring(model: nn.Module, size: int | None) -> Iterator[CovarianceHooks]:
    layers = dict(model.named_children())
    with CovarianceHooks(layers, {}, TokenRows(layers, model), size) as hooks, torch.no_grad():
        yield hooks


def extra(counted: Launches, call: Callable[[], Any]) -> int:
    """Kernels beyond those of the same call without hooks."""
    return counted.kernels.total() - launches(call).kernels.total()


@pytest.mark.parametrize("size", [SIZE, None])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_few_kernels_for_each_input(dtype: torch.dtype, padded: bool, size: int | None) -> None:
    model, hidden = Layers(dtype, "cpu"), torch.randn(ROWS, LENGTH, WIDTH).to(dtype)
    with measuring(model, size) as hooks:
        for _ in range(2):  # a sketch begins with the first
            hooks.begin_batch(masks(padded))
            counted = launches(lambda: model(hidden))
    with torch.no_grad():
        assert extra(counted, lambda: model(hidden)) <= MOST_LAUNCHES * INPUTS + 1, counted.kernels
    assert counted.waits == {"nonzero": 1}, "once a batch, if at all"


@pytest.mark.parametrize("size", [SIZE, None])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_gpu_is_not_waited_for(dtype: torch.dtype, padded: bool, size: int | None) -> None:
    """On tensors that are on no GPU but know that they should be, and have no values to be read."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        model, hidden = Layers(dtype, "cuda"), torch.zeros(ROWS, LENGTH, WIDTH, dtype=dtype, device="cuda")
    with measuring(model, size) as hooks:
        hooks.begin_batch(masks(padded))
        assert hooks.tokens.masks["attention_mask"].all_tokens is not padded
        for _ in range(2):
            with FakeTensorMode(allow_non_fake_inputs=True):
                counted = launches(lambda: model(hidden))
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
        assert extra(counted, lambda: model(hidden)) <= MOST_LAUNCHES * INPUTS, counted.kernels
    assert not counted.waits
    for running in hooks._sums.values():
        assert running.sum_of_squares.device.type == "cuda"


def test_each_input_is_summed_up_where_it_is() -> None:
    """As with a `device_map` over a GPU and the CPU: no kernel gets tensors of both."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        model, hidden = Layers(torch.float32, "cuda"), torch.zeros(ROWS, LENGTH, WIDTH, device="cuda")
        model.down = Linear(WIDER, WIDTH)
    with measuring(model, SIZE) as hooks:
        hooks.begin_batch(masks(padded=True))
        assert not hooks.tokens.masks["attention_mask"].all_tokens
        with FakeTensorMode(allow_non_fake_inputs=True):
            model(hidden)
    assert [running.sum_of_squares.device.type for running in hooks._sums.values()] == ["cuda", "cuda", "cpu"]


def test_a_gpu_sums_up_bfloat16_without_a_copy() -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):
        model, hidden = Layers(torch.bfloat16, "cuda"), torch.zeros(ROWS, LENGTH, WIDTH, device="cuda").bfloat16()
        with measuring(model, SIZE):
            model(hidden)
            counted = launches(lambda: model(hidden))
    assert "_to_copy" not in counted.kernels


@pytest.mark.parametrize("padded", [False, True])
def test_images_are_pooled_without_waiting(monkeypatch: pytest.MonkeyPatch, padded: bool) -> None:
    """On meta tensors, which cannot be read; lengths of images are on the CPU and can."""
    real = torch.arange(ROWS) > 0 if padded else None
    monkeypatch.setattr(images, "image_rows_of", lambda call: ImageRows(torch.ones(ROWS).long(), False, real=real))
    projector, features = Linear(WIDTH, WIDTH, device="meta"), torch.zeros(ROWS, LENGTH, WIDTH, device="meta")
    with PrototypeHooks({"projector": projector}) as hooks, torch.no_grad():
        for _ in range(2):
            counted = launches(lambda: projector(features))
    assert not counted.waits.keys() & {"_to_copy", "copy_"}
    pooling = hooks._found["projector"]
    assert pooling.total.device.type == "meta"
    assert pooling.count == 2 * (ROWS - padded)
