"""A dense delta and its factors are the same, whatever its rank; a wrong rank is found out."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peft_many.algebra.factoring import RankError, factored


def of_rank(out: int, width: int, rank: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(out, rank, generator=generator, dtype=torch.float64)
    return left @ torch.randn(rank, width, generator=generator, dtype=torch.float64)


@given(out=st.integers(1, 40), width=st.integers(1, 40), true=st.integers(0, 40), said=st.integers(1, 60))
def test_the_product_of_the_factors_is_the_delta(out, width, true, said):
    true = min(true, said)
    delta = of_rank(out, width, true, seed=out + 41 * width)
    found = factored(delta, said)
    rank = min(said, out, width)
    assert found.A.shape == (rank, width)
    assert found.B.shape == (out, rank)
    assert found.A.dtype == found.B.dtype == torch.float32
    assert (found.dense() - delta).norm() <= 1e-6 * delta.norm()


@pytest.mark.parametrize("said", [4, 20])  # with room for the random combinations, and without
def test_a_delta_of_higher_rank_is_refused(said):
    with pytest.raises(RankError, match=rf"of its norm lies beyond the rank {said}"):
        factored(of_rank(24, 32, said + 1, seed=0), said)


def test_the_same_delta_gives_the_same_factors():
    delta = of_rank(40, 50, 3, seed=1)
    state = torch.get_rng_state()
    first, second = factored(delta, 3), factored(delta, 3)
    assert torch.equal(first.A, second.A)
    assert torch.equal(first.B, second.B)
    assert torch.equal(torch.get_rng_state(), state)
