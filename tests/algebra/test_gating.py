"""Gates against the gated delta they stand for, and which row an image stands in."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peft_many.algebra.covariance import DenseCovariance
from peft_many.algebra.gating import CONFIDENT_WEIGHT, confidence, gates, rows_of_images
from peft_many.algebra.lpm import LeastSquaresMerge, LowRankDelta
from tests.algebra.problems import seeds

ranks_of_tasks = st.lists(st.integers(0, 4), min_size=1, max_size=5).filter(any)


@given(seeds, ranks_of_tasks, st.integers(1, 4))
def test_gates_give_the_delta_of_the_definition(seed, ranks, rows):
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    B, A, merged = [random(5, r) for r in ranks], [random(r, 6) for r in ranks], [random(r, 6) for r in ranks]
    weights = random(rows, len(ranks)).softmax(-1)
    trust, left = torch.rand(2, rows, generator=generator, dtype=torch.float64)
    of_merged, of_own = gates(weights, trust, left, ranks)
    for row in range(rows):
        x, chosen = random(6), weights[row].argmax()
        own = [trust[row] * (t == chosen) * A[t] for t in range(len(ranks))]
        delta = sum(B[t] @ (left[row] * merged[t] + own[t]) for t in range(len(ranks)))
        hidden = of_merged[row] * (torch.cat(merged) @ x) + of_own[row] * (torch.cat(A) @ x)
        torch.testing.assert_close(torch.cat(B, dim=1) @ hidden, delta @ x)


@given(ranks_of_tasks, st.data())
def test_the_two_ends(ranks, data):
    task = data.draw(st.integers(0, len(ranks) - 1))
    weights = torch.nn.functional.one_hot(torch.tensor([task, task]), len(ranks)).float()
    merged, own = gates(weights, torch.tensor([0.0, 1.0]), torch.tensor([1.0, 0.0]), ranks)
    assert merged.tolist() == [[1.0], [0.0]]
    blocks = [part.unique().tolist() for part in own[1].split(ranks) if len(part)]
    assert own[0].count_nonzero() == 0
    assert blocks == [[float(t == task)] for t, rank in enumerate(ranks) if rank]


def test_of_equally_likely_tasks_one_is_chosen():
    _, own = gates(torch.tensor([[0.0, 0.5, 0.5]]), torch.ones(1), torch.zeros(1), [1, 1, 1])
    assert own.tolist() == [[0, 1, 0]]


@given(seeds, st.integers(1, 6), st.integers(1, 5), st.floats(0.01, 1.0))
def test_only_a_large_weight_is_trusted(seed, tasks, rows, threshold):
    weights = torch.randn(rows, tasks, generator=torch.Generator().manual_seed(seed)).mul(3).softmax(-1)
    trust = confidence(weights, threshold)
    assert trust.tolist() == [float(max(row) >= torch.tensor(threshold).item()) for row in weights.tolist()]


def test_nothing_known_is_not_trusted_and_a_sole_task_is():
    assert confidence(torch.tensor([[0.0, 0.0], [0.5, 0.5], [0.4, 0.6], [torch.nan, torch.nan]])).tolist() == [
        0,
        1,
        1,
        0,
    ]
    assert confidence(torch.tensor([[1.0]])).tolist() == [1]
    assert 1 / 3 < CONFIDENT_WEIGHT < 1 / 2


@given(st.lists(st.lists(st.integers(1, 5), max_size=3), min_size=1, max_size=5))
def test_images_stand_in_the_row_whose_placeholders_they_fill(images_of_rows):
    tokens = torch.tensor([tokens for row in images_of_rows for tokens in row], dtype=torch.int64)
    expected = [row for row, images in enumerate(images_of_rows) for _ in images]
    found = rows_of_images(tokens, torch.tensor([sum(row) for row in images_of_rows]))
    assert found is not None
    assert found.tolist() == expected


@pytest.mark.parametrize(
    ("tokens", "placeholders"), [([3], [2]), ([2, 2], [3, 1]), ([1, 3], [2, 2]), ([], [1]), ([4], [2, 2])]
)
def test_counts_that_fit_no_rows(tokens, placeholders):
    assert rows_of_images(torch.tensor(tokens, dtype=torch.int64), torch.tensor(placeholders)) is None


@given(seeds, st.floats(1e-9, 0.1))
def test_blocks_that_cancel_are_kept_if_asked_for(seed, gap):
    """What rounding loses of the merge is then small beside the tasks' deltas, whatever is left of these."""
    generator = torch.Generator().manual_seed(seed)
    A, B = torch.randn(2, 6, generator=generator), torch.randn(5, 2, generator=generator)
    rest = gap * torch.randn(5, 2, generator=generator)
    turn = torch.linalg.qr(torch.randn(2, 2, generator=generator)).Q  # so that the two are rounded apart
    others = [LowRankDelta(A, B), LowRankDelta(turn @ A, (rest - 0.7 * B) @ turn.T)]
    problem = LeastSquaresMerge()
    for delta, weight in zip(others, (0.7, 1.0)):  # on the same inputs, so that nearly nothing remains
        covariance = DenseCovariance(remainder=0.0, matrix=torch.eye(6, dtype=torch.float64))
        problem.add(covariance, {"layer": delta}, weight)
    plain, kept = problem.solve()["layer"], problem.solve(keep_blocks=True)["layer"]
    assert not plain.stacked or gap > 1e-3
    assert kept.stacked
    assert plain.task_A is None
    assert kept.task_A is not None
    assert torch.equal(kept.task_A, torch.cat([delta.A for delta in others]))
    assert torch.equal(kept.B, torch.cat([delta.B for delta in others], dim=1))
    assert (kept.dense() - plain.dense()).norm() < 1e-6 * (B @ A).norm() + 1e-6 * plain.dense().norm()


def test_own_rows_beyond_the_range_of_half_precision_are_an_error():
    problem = LeastSquaresMerge()
    for size in (1e5, -1e5):
        covariance = DenseCovariance(remainder=0.0, matrix=torch.eye(6, dtype=torch.float64))
        problem.add(covariance, {"layer": LowRankDelta(torch.full((2, 6), size), torch.ones(5, 2))})
    assert problem.solve(dtype=torch.float16)["layer"].A.isfinite().all()  # half of it
    with pytest.raises(OverflowError, match=r"'layer' has entries beyond the range of torch\.float16"):
        problem.solve(dtype=torch.float16, keep_blocks=True)
