"""The user's autocast and precision of products: neither touches the arithmetic here, and both stay as they were."""

import contextlib

import pytest
import torch

from peft_many.algebra.precision import float32_products, without_autocast
from peft_many.algebra.sketch import CovarianceSketch
from peft_many.algebra.spread import FeatureMetric
from tests.kernels import without_half_precision

NEW = pytest.mark.skipif(not hasattr(torch.backends, "fp32_precision"), reason="since torch 2.9")


def parts():
    return [torch.backends.cuda.matmul, torch.backends.mkldnn.matmul]


def precisions():
    """Everything that tells how float32 products are computed."""
    found = [getattr(part, "fp32_precision", None) for part in (torch.backends, *parts())]
    with contextlib.suppress(RuntimeError):  # where parts say what it has no word for
        found.append(torch.get_float32_matmul_precision())
    return found


@pytest.fixture
def settings():
    yield
    torch.set_float32_matmul_precision("highest")
    for part in (torch.backends, *parts()):
        part.fp32_precision = "none"


def old(precision):
    torch.set_float32_matmul_precision(precision)


def of_all(precision):
    torch.backends.fp32_precision = precision


def of_gpus(precision):
    torch.backends.cuda.matmul.fp32_precision = precision


def of_cpus(precision):
    torch.backends.mkldnn.matmul.fp32_precision = precision


WAYS = [(old, "highest"), (old, "high"), (old, "medium"), (of_all, "tf32"), (of_gpus, "tf32"), (of_cpus, "bf16")]


def sketched(rows, size=20):
    sketch = CovarianceSketch(rows.shape[1], size)
    for part in rows.split(50):
        sketch.update(part)
    return sketch.result().factor


def inputs(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(300, 96, generator=generator) * torch.logspace(2, -2, 96)).to(dtype)


@NEW
@pytest.mark.parametrize(("allow", "precision"), WAYS)
@pytest.mark.parametrize(
    ("rounded", "wanted"),
    [(torch.float32, ["ieee", "ieee"]), (torch.float16, ["tf32", "tf32"]), (torch.bfloat16, ["tf32", "bf16"])],
)
def test_the_users_precision_is_as_before(settings, allow, precision, rounded, wanted):
    allow(precision)
    before = precisions()
    with contextlib.suppress(KeyError), float32_products(rounded):
        assert [part.fp32_precision for part in parts()] == wanted
        raise KeyError
    assert precisions() == before


@NEW
def test_what_is_set_for_all_operations_afterwards_still_counts(settings):
    sketched(inputs())
    torch.backends.fp32_precision = "tf32"
    assert [part.fp32_precision for part in parts()] == ["tf32", "tf32"]


@NEW
@pytest.mark.parametrize(("allow", "precision"), WAYS)
def test_sketches_take_no_reduced_precision(settings, allow, precision):
    expected = sketched(inputs())
    allow(precision)
    assert torch.equal(sketched(inputs()), expected)


@pytest.mark.parametrize("allowed", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sketches_under_autocast_are_those_without(monkeypatch, dtype, allowed):
    without_half_precision(monkeypatch)
    expected = sketched(inputs(dtype))
    with torch.autocast("cpu", allowed):
        assert torch.equal(sketched(inputs(dtype)), expected)


def test_distances_under_autocast_are_those_without():
    metric = FeatureMetric(torch.linalg.qr(inputs().T).Q[:, :8].T, torch.linspace(2, 1, 9))
    expected = metric.squared_distances(inputs(), inputs()[:3])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(metric.squared_distances(inputs(), inputs()[:3]), expected)


def test_autocast_is_on_again_afterwards():
    one = torch.ones(2, 2)
    with torch.autocast("cpu", torch.bfloat16):
        with contextlib.suppress(KeyError), without_autocast():
            assert (one @ one).dtype == torch.float32
            raise KeyError
        assert (one @ one).dtype == torch.bfloat16
    with without_autocast():
        pass
    assert (one @ one).dtype == torch.float32
