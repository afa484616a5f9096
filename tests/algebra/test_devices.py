"""What depends on the device, without having one: tensors that say they are on a GPU, and a GPU without float64."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor, FakeTensorMode
from torch.profiler import profile

from peft_many.algebra import covariance, devices, lpm, scatter
from peft_many.algebra.covariance import LowRankCovariance
from peft_many.algebra.eight_bits import Scales
from peft_many.algebra.lpm import LeastSquaresMerge, LowRankDelta
from peft_many.algebra.residual import relative_residuals
from peft_many.files.fingerprints import _directions, fingerprint_there
from tests.algebra.problems import make_tasks, truncate

OUT, WIDTH, RANK = 48, 600, 4


@pytest.fixture
def waits(monkeypatch):
    """On a GPU by name: to ask a tensor for a number fails, and so does mixing devices. The numbers asked for."""
    asked = []

    def numbers_of(tensors):
        asked.append(len(tensors))
        return [[0.0] * tensor.numel() for tensor in tensors]

    for module in (covariance, scatter, lpm):
        monkeypatch.setattr(module, "numbers_of", numbers_of)
    # What looks for the device itself, where other operations go by the dispatcher.
    monkeypatch.setattr(FakeTensor, "to", to, raising=False)
    monkeypatch.setattr(FakeTensor, "copy_", lambda tensor, other: torch.ops.aten.copy_(tensor, other), raising=False)
    monkeypatch.setattr(FakeTensor, "pin_memory", lambda tensor: tensor, raising=False)
    monkeypatch.setattr(FakeTensor, "__getitem__", part)
    monkeypatch.setattr(FakeTensor, "__setitem__", lambda tensor, index, value: part(tensor, index).copy_(value))
    _directions.cache_clear()
    with FakeTensorMode():
        yield asked
    _directions.cache_clear()


def part(tensor, index):
    """`tensor[index]` of slices and `None`."""
    for dimension, one in enumerate(index if isinstance(index, tuple) else (index,)):
        if one is None:
            tensor = tensor.unsqueeze(dimension)
        else:
            start, end, _ = one.indices(tensor.shape[dimension])
            tensor = tensor.narrow(dimension, start, end - start)
    return tensor


def to(tensor, *wanted, non_blocking=False):
    """`tensor.to` of a device, a dtype or both; a copy that would be waited for fails."""
    device = next((torch.device(one) for one in wanted if isinstance(one, (str, torch.device))), tensor.device)
    dtype = next((one for one in wanted if isinstance(one, torch.dtype)), tensor.dtype)
    assert device.type == tensor.device.type or non_blocking
    return torch.ops.aten._to_copy(tensor, device=device, dtype=dtype)


def stored(device: str, eight_bits: bool) -> LowRankCovariance:
    factor = torch.empty(20, WIDTH, dtype=torch.int8 if eight_bits else torch.float16, device=device)
    scales = Scales(torch.empty(20, device=device), torch.empty(WIDTH, dtype=torch.int8, device=device))
    return LowRankCovariance(0.1, factor, scales=scales if eight_bits else None)


def delta(device: str) -> LowRankDelta:
    return LowRankDelta(A=torch.empty(RANK, WIDTH, device=device), B=torch.empty(OUT, RANK, device=device))


def test_asking_a_tensor_that_is_not_there_fails(waits):
    """So that the tests here can fail."""
    with pytest.raises(DataDependentOutputException):
        torch.ones(1, device="cuda").item()
    with pytest.raises(RuntimeError, match="device"):
        torch.ones(1, 1, device="cuda") @ torch.ones(1, 1)


@pytest.mark.parametrize("eight_bits", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("where", ["cpu", "cuda"])
def test_a_merge_on_a_gpu_waits_where_it_says(waits, where, dtype, eight_bits):
    """For traces, the factorisation, what rounding loses, and whether all is finite; what it is given may be here."""
    problem, tasks = LeastSquaresMerge(device="cuda"), [(stored(where, eight_bits), delta(where)) for _ in range(3)]
    for known, own in tasks:
        problem.add(known, {"q": own, "k": own})
    merged = problem.solve(dtype=dtype)
    assert waits == [3, 1, 2, 2]
    for found in merged.values():
        assert (found.A.device.type, found.A.dtype) == (found.B.device.type, found.B.dtype) == ("cuda", dtype)


@pytest.mark.parametrize("stacked", [True, False])
def test_what_is_recorded_of_a_layer_waits_for_nothing(waits, stacked):
    merged = lpm.MergedDelta(*vars(delta("cuda")).values(), stacked=stacked)
    assert relative_residuals(merged, [(delta("cuda"), stored("cuda", False))]).device.type == "cuda"
    assert fingerprint_there(merged.A, merged.B).device.type == "cuda"
    assert waits == []


def test_a_gpu_gets_products_in_one_piece(monkeypatch):
    pieces = []
    real = torch.Tensor.addmm_
    monkeypatch.setattr(torch.Tensor, "addmm_", lambda *given: pieces.append(1) or real(*given))
    rows = torch.randn(700, 3, dtype=torch.float64)
    found = [torch.zeros(700, 700, dtype=torch.float64) for _ in range(2)]
    covariance.add_lower_gram(found[0], rows)
    assert len(pieces) > 1
    pieces.clear()
    monkeypatch.setattr(covariance, "has_caches", lambda device: False)
    covariance.add_lower_gram(found[1], rows)
    assert len(pieces) == 1
    for matrix in found:
        torch.testing.assert_close(matrix.tril(), (rows @ rows.T).tril())


def test_a_device_without_float64_leaves_that_to_the_cpu(monkeypatch):
    """Apple's; to the same bits. "meta" stands in for it, on which nothing could be computed."""
    assert devices.float64_device("mps") == torch.device("cpu")
    monkeypatch.setattr(devices, "WITHOUT_FLOAT64", ("meta",))
    found = []
    for device in ("cpu", "meta"):
        problem = LeastSquaresMerge(device=device)
        for task in make_tasks(0):
            problem.add(truncate(task.covariance, 0.9), {"layer": task.delta}, task.weight)
        found.append(problem.solve()["layer"])
    assert torch.equal(found[0].A, found[1].A)
    assert torch.equal(found[0].B, found[1].B)


def test_many_numbers_are_asked_for_at_once():
    tensors = [torch.arange(3), torch.tensor(2.5), torch.zeros(0), torch.ones(2, 2, dtype=torch.bfloat16)]
    assert devices.numbers_of(tensors) == [[0.0, 1.0, 2.0], [2.5], [], [1.0] * 4]
    assert devices.numbers_of([]) == []


def test_rows_that_lie_apart_are_multiplied_at_once():
    layer = nn.Linear(64, 300, bias=False).requires_grad_(False)
    last = torch.randn(8, 5, 64)[:, -1:]

    def multiplied():
        with profile() as found:
            output = layer(last)
        return output, {event.name for event in found.events()} & {"aten::mm", "aten::bmm"}

    expected, products = multiplied()
    assert products == {"aten::bmm"}, "torch needs no help any more"
    devices.multiply_rows_at_once(layer)
    output, products = multiplied()
    assert products == {"aten::mm"}
    torch.testing.assert_close(output, expected)
