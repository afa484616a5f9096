"""Counting what a GPU would have to do."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.gpu.launches import launches

x = torch.randn(4, 6)


def test_views_and_allocations_launch_nothing():
    counted = launches(lambda: (x.T.reshape(3, 8)[1:].unsqueeze(0), torch.empty(3), x.float(), x.to("cpu")))
    assert counted.kernels == {"clone": 1}, "that of the reshape"
    assert not counted.waits


def test_each_operation_counts_once():
    counted = launches(lambda: (x @ x.T).square_().add(1).bfloat16())
    assert counted.kernels == {"mm": 1, "pow_": 1, "add": 1, "_to_copy": 1}


def test_the_casts_of_autocast_count():
    with torch.autocast("cpu", torch.bfloat16):
        assert launches(lambda: torch.nn.functional.linear(x, x)).kernels.total() == 3


@pytest.mark.parametrize(
    "call",
    [
        lambda: x.sum().item(),
        lambda: bool((x > 0).all()),
        lambda: x[x[:, 0] > 0],
        lambda: (x > 0).nonzero(),
        lambda: torch.equal(x, x),
    ],
)
def test_what_depends_on_values_waits(call):
    assert launches(call).waits.total() == 1


def test_a_copy_to_the_host_waits():
    with FakeTensorMode():
        on_gpu = torch.ones(3, device="cuda")
        counted = launches(lambda: (on_gpu.cpu(), torch.ones(3).to(on_gpu.device), torch.empty(3).copy_(on_gpu)))
    assert counted.waits.total() == 2
