"""The end of a sketch: several of one shape together give what each gives alone, and a GPU is waited for once."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException

from peft_many.algebra.covariance import LowRankCovariance
from peft_many.algebra.nystrom import nystrom_spectra
from peft_many.algebra.sketch import CovarianceAccumulator, CovarianceSketch, finished, spectra
from peft_many.algebra.spectrum import Spectrum, Truncation, eigen_directions
from tests.algebra.problems import relative_error
from tests.algebra.test_sketch import WIDTH, exact, inputs, sketched
from tests.fake_gpu import fake_gpu

SIZE = 20


def dense(spectrum: Spectrum) -> torch.Tensor:
    return (spectrum.directions.T * spectrum.values) @ spectrum.directions


def sums(seeds: range, tokens: int = 600) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor, torch.Tensor]:
    """What several sketches have summed up, in float64: `Ω`, `Y`, `QᵀQ` and the trace."""
    test = [torch.linalg.qr(inputs(seed, 500).T @ inputs(seed, 500)[:, :SIZE]).Q for seed in seeds]
    rows = [inputs(seed, tokens).double() for seed in seeds]
    projected = [x @ own.double() for x, own in zip(rows, test)]
    moved = torch.stack([x.T @ q / tokens for x, q in zip(rows, projected)])
    core = torch.stack([q.T @ q / tokens for q in projected])
    return test, moved, core, torch.stack([x.square().sum() / tokens for x in rows])


def test_sketches_of_one_shape_are_finished_together_as_each_alone():
    sketches = [sketched(inputs(seed, tokens=300 + 100 * seed), SIZE) for seed in range(4)]
    for one, found in zip(sketches, spectra(sketches)):
        alone = spectra([one])[0]
        torch.testing.assert_close(found.values, alone.values, rtol=1e-10, atol=0)
        assert relative_error(dense(found), dense(alone)) < 1e-10
        assert found.rest == pytest.approx(alone.rest, rel=1e-10)


def test_it_is_the_formula_of_the_paper():
    test, moved, core, traces = sums(range(3))
    expected = [y @ torch.linalg.solve(c, y.T) for y, c in zip(moved, core)]
    for found, one, trace in zip(nystrom_spectra(test, moved.clone(), core.clone(), traces), expected, traces):
        assert relative_error(dense(found), one) < 1e-5, "that is the shift"
        assert found.trace == pytest.approx(trace.item(), rel=1e-12)


def test_only_sketches_that_are_indefinite_get_a_larger_shift():
    test, moved, core, traces = sums(range(3))
    untouched = nystrom_spectra(test, moved.clone(), core.clone(), traces)
    core[1].diagonal().sub_(1e-4 * moved[1].norm() + torch.linalg.eigvalsh(core[1])[0])
    found = nystrom_spectra(test, moved, core, traces)
    for place in (0, 2):
        assert relative_error(dense(found[place]), dense(untouched[place])) < 1e-12
    assert 1e-6 < relative_error(dense(found[1]), dense(untouched[1])) < 0.1
    assert found[1].values.min() >= 0


def test_directions_that_no_token_reached_do_no_harm():
    """Rounding makes such a core indefinite."""
    rows = torch.randn(900, 5) @ torch.randn(5, WIDTH)
    together = [sketched(rows, SIZE), sketched(inputs(0, 900), SIZE)]
    found = spectra(together)
    assert relative_error(dense(found[0]), exact(rows).matrix) < 1e-5
    assert relative_error(dense(found[1]), dense(spectra(together[1:])[0])) < 1e-10


def test_what_is_not_finite_is_an_error():
    test, moved, core, traces = sums(range(2))
    core[1, 0, 0] = torch.nan
    with pytest.raises(FloatingPointError):
        nystrom_spectra(test, moved, core, traces)


def test_running_sums_of_all_kinds_are_finished_and_let_go():
    """On a device without float64, as Apple's, with the sums on the CPU."""
    running: dict[str, CovarianceAccumulator | CovarianceSketch] = {
        f"{size}.{seed}": sketched(inputs(seed, tokens), size)
        for size, tokens in ((SIZE, 200), (12, 200), (SIZE, 7))
        for seed in range(3)
    }
    expected = {name: one.result() for name, one in running.items()}
    for one in running.values():
        if one.sums is not None:
            one.device = torch.device("mps")
    running["whole"] = CovarianceAccumulator(WIDTH)
    found = dict(finished(running, most_numbers=2 * WIDTH * SIZE))
    assert not running
    assert found.keys() == {*expected, "whole"}
    for name, one in expected.items():
        assert relative_error(found[name].dense(), one.dense()) < 1e-6
        assert found[name].device == torch.device("cpu")


def test_what_a_sketch_keeps_is_not_decomposed_again(monkeypatch):
    rows = inputs(0)
    result = sketched(rows, SIZE).result()
    plain = LowRankCovariance(result.remainder, result.factor)
    expected = Truncation(rank=8).apply(plain)
    monkeypatch.setattr(torch.linalg, "eigh", None)
    found = Truncation(rank=8).apply(result)
    assert relative_error(found.dense(), expected.dense()) < 1e-5
    assert found.remainder == pytest.approx(expected.remainder, rel=1e-6)
    assert not found.is_orthogonal, "it is rounded"


def test_the_same_data_gives_the_same_bits():
    one, two = (Truncation(rank=8).apply(sketched(inputs(0), SIZE).result()) for _ in range(2))
    assert torch.equal(one.factor, two.factor)
    assert one.remainder == two.remainder


# What a GPU is waited for


def on_gpu(sketch: CovarianceSketch) -> CovarianceSketch:
    """The sketch with its sums on a GPU."""
    sketch.device = torch.device("cuda:0")
    sums = sketch.sums
    sums.test = torch.empty(sums.test.shape, device="cuda:0")
    for total in (sums.moved, sums.core, sums.sum_of_squares):
        total.sum = torch.empty(total.sum.shape, dtype=torch.float64, device="cuda:0")
    return sketch


def test_a_gpu_is_waited_for_once_for_all_sketches_of_a_shape():
    sketches = [sketched(inputs(seed), SIZE) for seed in range(3)]
    with fake_gpu() as counted, pytest.raises(DataDependentOutputException):
        spectra([on_gpu(one) for one in sketches])  # fails where the numbers are read, as they are not there
    assert counted.waits == {"_to_copy": 1}


def test_a_whole_spectrum_is_waited_for_once():
    with fake_gpu() as counted, pytest.raises(DataDependentOutputException):
        eigen_directions(LowRankCovariance(0.0, torch.ones(9, WIDTH, device="cuda:0")))
    assert counted.waits == {"_to_copy": 1}


def test_what_is_kept_stays_on_the_gpu():
    with fake_gpu() as counted:
        eight = LowRankCovariance(0.0, torch.ones(9, WIDTH, device="cuda:0")).in_eight_bits()
        assert eight.device.type == "cuda"
    assert not counted.waits
