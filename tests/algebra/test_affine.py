"""Fitting an affine layer: against a stacked least-squares problem solved by another routine."""

import pytest
import torch

from peft_many.algebra.affine import affine_fit


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("ridge", [1e-6, 1e-2])
def test_it_is_the_optimum_of_its_objective(with_bias, ridge):
    torch.manual_seed(0)
    weights, rows, width, out = (1.0, 0.3), (40, 7), 5, 3
    x = [torch.randn(n, width, dtype=torch.float64) + 1 for n in rows]
    y = [torch.randn(n, out, dtype=torch.float64) for n in rows]
    W0, b0 = torch.randn(out, width, dtype=torch.float64), torch.randn(out, dtype=torch.float64)
    W, b = affine_fit(zip(weights, x, y), W0, b0 if with_bias else None, ridge)

    wide = [torch.cat([part, torch.ones(len(part), 1, dtype=torch.float64)], 1) if with_bias else part for part in x]
    scale = [(w / len(part)) ** 0.5 for w, part in zip(weights, wide)]
    left, right = torch.cat([s * part for s, part in zip(scale, wide)]), torch.cat([s * t for s, t in zip(scale, y)])
    start = torch.cat([W0, b0[:, None]], 1) if with_bias else W0
    pull = (ridge * left.square().sum() / left.shape[1]) ** 0.5
    left = torch.cat([left, pull * torch.eye(left.shape[1], dtype=torch.float64)])
    expected = torch.linalg.lstsq(left, torch.cat([right, pull * start.T])).solution.T
    found = torch.cat([W, b[:, None]], 1) if with_bias else W
    assert (b is not None) == with_bias
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_one_part_that_is_affine_already_is_given_back():
    torch.manual_seed(0)
    W, b, x = torch.randn(3, 5), torch.randn(3), torch.randn(20, 5)
    fitted, shift = affine_fit([(1.0, x, x @ W.T + b)], torch.zeros(3, 5), torch.zeros(3), 1e-12)
    torch.testing.assert_close(fitted.float(), W, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(shift.float(), b, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(affine_fit([(1.0, x, x @ W.T + b)], W, b, 1e-2)[0].float(), W)
