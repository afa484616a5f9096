"""The streaming sketch against the exact covariance, and what its error does to a merged delta."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_many.algebra.covariance import DenseCovariance, LowRankCovariance
from peft_many.algebra.lpm import LeastSquaresMerge, LowRankDelta
from peft_many.algebra.sketch import CovarianceAccumulator, CovarianceSketch, spectra
from peft_many.algebra.spectrum import eigen_directions
from peft_many.algebra.sums import mean_covariance
from peft_many.algebra.total import Total
from tests.algebra.problems import relative_error, seeds, truncate

WIDTH = 96


def inputs(seed, tokens=1500, width=WIDTH, decay=1.0, outlier=0.0):
    """Tokens with a power-law spectrum, a common direction, and now and then an outlier as language models have."""
    generator = torch.Generator().manual_seed(seed)
    rotation = torch.linalg.qr(torch.randn(width, width, generator=generator)).Q
    rows = torch.randn(tokens, width, generator=generator) * torch.arange(1, width + 1.0) ** (-decay / 2) @ rotation
    rows += 0.5 * torch.randn(width, generator=torch.Generator().manual_seed(99))
    rows[torch.rand(tokens, generator=generator) < 0.01, 3] += outlier
    return rows


def exact(rows):
    return DenseCovariance(remainder=0.0, matrix=rows.double().T @ rows.double() / len(rows))


def sketched(rows, size, batch=100):
    sketch = CovarianceSketch(rows.shape[1], size)
    for part in rows.split(batch):
        sketch.update(part)
    return sketch


def spectral_error(found, expected):
    return (torch.linalg.matrix_norm(found.dense() - expected.dense(), 2) / expected.trace).item()


@settings(max_examples=20, deadline=None)
@given(seeds, st.sampled_from([0.5, 1.0, 2.0]), st.sampled_from([0.0, 30.0]), st.integers(1, 300))
def test_the_error_is_little_more_than_the_best_of_that_rank(seed, decay, outlier, batch):
    rows = inputs(seed, decay=decay, outlier=outlier)
    covariance = exact(rows)
    best = spectral_error(truncate(covariance, 1.0, torch.float64, rank=24), covariance)
    sketch = sketched(rows, 36, batch)
    assert sketch.tokens == len(rows)
    found = truncate(sketch.result(), 1.0, torch.float64, rank=24)
    assert len(found.factor) <= 24
    assert found.trace == pytest.approx(covariance.trace, rel=1e-5)
    assert spectral_error(found, covariance) < 2 * best + 1e-2
    found.check()


@given(seeds)
@settings(max_examples=20, deadline=None)
def test_no_direction_gets_more_energy_than_it_has(seed):
    """Nyström sketches stay below the covariance; only the remainder is spread evenly."""
    rows = inputs(seed)
    spectrum = spectra([sketched(rows, 20)])[0]
    found = (spectrum.directions.T * spectrum.values) @ spectrum.directions
    gap = torch.linalg.eigvalsh(exact(rows).matrix - found)
    assert gap.min() > -1e-6 * exact(rows).trace
    assert torch.allclose(spectrum.directions @ spectrum.directions.T, torch.eye(20).double(), atol=1e-8)


@pytest.mark.parametrize("tokens", [0, 1, 19, 20, 39])
def test_few_tokens_are_kept_as_they_are(tokens):
    rows = inputs(3, tokens=tokens)
    sketch = sketched(rows, 20, batch=4)
    assert sketch.tokens == tokens
    found = sketch.result()
    assert found.factor.shape == (min(tokens, 20), WIDTH)
    spectrum = spectra([sketched(rows, 20, batch=4)])[0]
    expected = rows.double().T @ rows.double() / max(tokens, 1)
    assert torch.allclose((spectrum.directions.T * spectrum.values) @ spectrum.directions, expected, atol=1e-6)


def test_rows_that_the_model_overwrites_later_were_copied():
    rows = inputs(1, tokens=10)
    sketch = CovarianceSketch(WIDTH, 20)
    sketch.update(rows)
    expected = exact(rows).matrix
    rows.zero_()
    assert relative_error(sketch.result().dense(), expected) < 1e-6


def test_a_batch_that_spans_less_than_the_sketch_leaves_room_for_later_ones():
    first = torch.randn(50, 5) @ torch.randn(5, WIDTH)
    rows = torch.cat([first, inputs(5)])
    covariance = exact(rows)
    best = spectral_error(truncate(covariance, 1.0, torch.float64, rank=24), covariance)
    assert spectral_error(sketched(rows, 30, batch=50).result(), covariance) < 3 * best + 1e-2


def test_nothing_of_the_size_of_the_covariance_is_held():
    sketch = sketched(inputs(0, tokens=400, width=512), 16)
    parts = [*vars(sketch).values(), *vars(sketch.sums).values()]
    held = [part.sum if isinstance(part, Total) else part for part in parts if isinstance(part, (torch.Tensor, Total))]
    assert len(held) == 4
    assert all(value.numel() <= 512 * 16 for value in held)
    waiting = sketched(inputs(0, tokens=31, width=512), 16)
    assert sum(rows.numel() for rows in waiting.first) <= 2 * 512 * 16


@pytest.mark.parametrize(("dtype", "factor"), [(torch.bfloat16, 10), (torch.float32, 12), (torch.float16, 12)])
def test_memory_is_what_is_said(dtype, factor):
    size, width = 16, 512
    sums = sketched(inputs(0, tokens=400, width=width).to(dtype), size).sums
    held = [sums.test, *(total.sum for total in (sums.moved, sums.core, sums.sum_of_squares))]
    assert sum(part.nbytes for part in held) == factor * size * width + 8 * size**2 + 8


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_any_floating_dtype_is_summed_up_alike(dtype):
    rows = inputs(2).to(dtype)
    found, expected = sketched(rows, 24).result(), sketched(rows.float(), 24).result()
    assert torch.equal(found.factor, expected.factor)


@pytest.mark.parametrize("outlier", [0.0, 1000.0])
def test_products_in_bfloat16_lose_nothing_that_counts(outlier):
    rows = inputs(2, tokens=6000, outlier=outlier).bfloat16()
    found, expected = spectra([sketched(rows, 36)])[0], spectra([sketched(rows.float(), 36)])[0]
    assert found.rest == pytest.approx(expected.rest, rel=1e-2)  # a 4,000th of the outlier's energy
    torch.testing.assert_close(found.values[:24], expected.values[:24], rtol=1e-2, atol=0)
    aligned = (found.directions[:12] @ expected.directions[:12].T).abs().diagonal()
    assert aligned.min() > 0.9999


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """The ways of a GPU, taken on the CPU; a product of bfloat16 is summed up in float32 as CUDA does."""
    monkeypatch.setattr("peft_many.algebra.sketch.has_caches", lambda device: False)
    monkeypatch.setattr("peft_many.algebra.sketch._sums_bfloat16_in_float32", lambda device: True)

    def mm(rows, others, *, out_dtype):
        assert rows.dtype == others.dtype == torch.bfloat16
        return (rows.double() @ others.double()).to(out_dtype)

    monkeypatch.setattr(torch, "mm", mm)


@pytest.mark.parametrize("outlier", [0.0, 1000.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_gpus_ways_lose_nothing_that_counts(as_on_a_gpu, monkeypatch, dtype, outlier):
    rows = inputs(2, tokens=6000, outlier=outlier).to(dtype)
    found = spectra([sketched(rows, 36)])[0]
    monkeypatch.undo()
    expected = spectra([sketched(rows.float(), 36)])[0]
    assert found.rest == pytest.approx(expected.rest, rel=1e-2)
    torch.testing.assert_close(found.values[:24], expected.values[:24], rtol=1e-2, atol=0)
    aligned = (found.directions[:12] @ expected.directions[:12].T).abs().diagonal()
    assert aligned.min() > 0.9999
    trace = rows.double().square().sum().item() / len(rows)
    assert found.trace == pytest.approx(trace, rel=1e-6)


def test_norms_beyond_float16_do_not_overflow(as_on_a_gpu):
    rows = inputs(2)
    rows[7] = 6e4
    found = sketched(rows.half(), 24).result()
    assert found.trace == pytest.approx(exact(rows.half()).trace, rel=1e-6)
    assert relative_error(found.dense(), exact(rows.half()).dense()) < 1e-3


def test_inputs_of_nothing_but_zeros_leave_room_for_later_ones():
    rows = torch.cat([torch.zeros(200, WIDTH), inputs(5)])
    found, covariance = sketched(rows, 30).result(), exact(rows)
    best = spectral_error(truncate(covariance, 1.0, torch.float64, rank=24), covariance)
    assert spectral_error(found, covariance) < 10 * best + 1e-2


def test_reduced_precision_of_matrix_products_is_not_taken():
    rows = inputs(4, outlier=100.0)
    expected = sketched(rows, 24).result()
    torch.set_float32_matmul_precision("medium")
    try:
        found = sketched(rows, 24).result()
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert torch.equal(found.factor, expected.factor)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("kind", [lambda: CovarianceSketch(WIDTH, 20), lambda: CovarianceAccumulator(WIDTH)])
def test_what_is_not_finite_is_seen_in_the_sum_of_squares(bad, kind):
    rows = inputs(0, tokens=5)
    rows[2, 7] = bad
    for before in (0, 50):  # more than are kept as they are
        running = kind()
        running.update(inputs(1, tokens=before))
        assert running.sum_of_squares.isfinite()
        running.update(rows)
        assert not running.sum_of_squares.isfinite()


@given(seeds, st.lists(st.integers(1, 400), min_size=1, max_size=4))
@settings(max_examples=20, deadline=None)
def test_parts_add_up(seed, lengths):
    """What several processes sketched, weighted by their tokens."""
    parts = [inputs(seed + i, tokens=length) for i, length in enumerate(lengths)]
    whole = exact(torch.cat(parts))
    dense = mean_covariance([exact(part) for part in parts], lengths)
    assert relative_error(dense.dense(), whole.dense()) < 1e-12
    low_rank = [truncate(exact(part), 0.9, torch.float64) for part in parts]
    mean = mean_covariance(low_rank, lengths)
    assert isinstance(mean, LowRankCovariance)
    expected = sum(length * part.dense() for length, part in zip(lengths, low_rank)) / sum(lengths)
    assert relative_error(mean.dense(), expected) < 1e-6
    assert mean.trace == pytest.approx(whole.trace, rel=1e-6)


def test_parts_without_a_token_count_for_nothing():
    empty = CovarianceSketch(WIDTH, 20).result()
    one = sketched(inputs(0), 20).result()
    assert relative_error(mean_covariance([empty, one], [0, 9]).dense(), one.dense()) < 1e-6
    assert mean_covariance([empty, empty], [0, 0]).trace == 0.0


@pytest.mark.parametrize("outlier", [0.0, 30.0])
def test_merging_with_sketches_is_as_good_as_with_the_best_truncation(outlier):
    """What counts in the end: the merge's loss over the optimum on the exact covariances."""
    generator = torch.Generator().manual_seed(0)
    tasks = [inputs(seed, outlier=outlier) for seed in range(3)]
    deltas = [
        LowRankDelta(torch.randn(4, WIDTH, generator=generator), torch.randn(32, 4, generator=generator))
        for _ in tasks
    ]

    def merged(covariances):
        problem = LeastSquaresMerge()
        for covariance, delta in zip(covariances, deltas):
            problem.add(covariance, {"layer": delta})
        return problem.solve()["layer"].dense()

    whole = [exact(rows) for rows in tasks]
    optimum, root = merged(whole), torch.linalg.cholesky(sum(covariance.matrix for covariance in whole))

    def loss(covariances):
        return ((merged(covariances) - optimum) @ root).norm().item() / (optimum @ root).norm().item()

    best = loss([truncate(covariance, 1.0, rank=24) for covariance in whole])
    found = loss([truncate(sketched(rows, 36, batch=400).result(), 1.0, rank=24) for rows in tasks])
    assert found < 1.2 * best
    halves = loss(
        [truncate(sketched(rows, 36, batch=400).result(), 1.0, rank=24).in_half_precision() for rows in tasks]
    )
    assert halves == pytest.approx(found, rel=1e-2)


@given(seeds, st.integers(1, 40), st.floats(1e-6, 1e6))
@settings(deadline=None)
def test_half_precision_is_close_by_and_rounds_once(seed, rank, size):
    rows = size * inputs(seed, tokens=rank)
    low_rank = eigen_directions(exact(rows)).keep(max(1, rank // 2))
    half = low_rank.in_half_precision()
    assert half.factor.dtype == torch.float16
    assert relative_error(half.dense(), low_rank.dense()) < 1e-3
    assert half.trace == pytest.approx(low_rank.trace, rel=1e-3)
    again = half.in_half_precision()
    assert torch.equal(again.factor, half.factor)
    assert (again.scale, again.remainder) == (half.scale, half.remainder)
    half.check()
