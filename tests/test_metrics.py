"""The metrics of continual learning: published values from published matrices, and what has to hold for any matrix."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import FrozenInstanceError
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from peft_many import metrics
from peft_many.metrics import AccuracyMatrix, mean_and_spread

# Six tasks of UCIT with LLaVA-1.5-7B, as reported at github.com/Fandy-Zhao/hyper-v9s, with MFN, MAA, MFT and BWT.
UCIT = ("ImageNet-R", "ArxivQA", "VizWiz", "IconQA", "CLEVR-Math", "Flickr30k")
UCIT_REPORTS = {
    # docs/reports/v6_ucit_baseline.md, commit 5668cfd, sections 7 and 8: hyper_llava_original_batch.
    "Hyper-LLaVA": (
        [
            [91.73],
            [90.40, 94.23],
            [89.37, 94.07, 61.37],
            [87.07, 94.10, 57.40, 86.00],
            [87.37, 94.27, 56.70, 78.73, 79.70],
            [86.67, 94.00, 58.71, 79.03, 64.33, 58.20],
        ],
        {"faa": 73.49, "caa": 83.27, "mft": 78.54, "bwt": -6.06},
    ),
    # The same, hyper_llava_gb24_matched.
    "Hyper-LLaVA, batches of 24": (
        [
            [91.90],
            [91.03, 94.83],
            [89.63, 94.43, 61.77],
            [86.27, 93.87, 57.54, 84.63],
            [85.90, 93.97, 54.60, 76.83, 79.57],
            [86.80, 93.83, 59.06, 76.17, 65.37, 58.19],
        ],
        {"faa": 73.24, "caa": 83.13, "mft": 78.48, "bwt": -6.29},
    ),
    # docs/reports/COMPOSE_UCIT_FORMAL_SEED42_REPORT.md, commit a55560c, sections 1 and 2.
    "Compose": (
        [
            [26.53],
            [31.27, 90.30],
            [18.00, 88.03, 55.71],
            [21.57, 88.80, 54.79, 44.03],
            [23.50, 89.00, 53.33, 44.97, 43.47],
            [20.97, 89.03, 53.62, 44.30, 41.07, 51.73],
        ],
        {"faa": 50.12, "caa": 49.083305, "mft": 51.961667, "bwt": -2.21},
    ),
}

# DevFD (NeurIPS 2025, arXiv 2509.19230), Table 1: matrices of accuracies (left half) and of AUCs (right half), each
# row with the average over the tasks so far and, from the second on, the average forgetting (AF) so far.
DEVFD = {
    "DevFD, left": (
        [[98.41], [97.06, 89.90], [92.44, 89.07, 97.91], [90.71, 90.31, 93.12, 85.15]],
        [98.41, 93.48, 93.14, 89.82],
        [1.35, 3.40, 4.03],
    ),
    "DevFD, right": (
        [[97.63], [94.69, 93.07], [90.97, 92.76, 97.05], [90.86, 94.35, 95.23, 99.16]],
        [97.63, 93.88, 93.59, 94.90],
        [2.94, 3.49, 2.44],
    ),
    "SUR-LID, right": (
        [[96.85], [82.91, 92.42], [90.50, 96.26, 97.94], [87.90, 96.79, 93.56, 99.07]],
        [96.85, 87.66, 94.90, 94.33],
        [13.94, 1.26, 2.99],
    ),
    "CoReD, left": (
        [[95.50], [92.94, 87.61], [86.84, 81.07, 95.22], [74.08, 76.59, 93.41, 80.78]],
        [95.50, 90.28, 87.71, 81.22],
        [2.56, 7.60, 11.42],
    ),
}

ROUNDING = 0.0051  # Published to two decimals, from scores of two decimals.


def matrices(least: int = 1) -> st.SearchStrategy[np.ndarray]:
    return st.integers(least, 7).flatmap(lambda n: arrays(np.float64, (n, n), elements=st.floats(0, 100)))


@pytest.mark.parametrize("name", UCIT_REPORTS)
def test_the_reported_metrics_of_ucit(name: str) -> None:
    scores, reported = UCIT_REPORTS[name]
    matrix = AccuracyMatrix(scores, UCIT)
    for metric, value in reported.items():
        assert matrix.summary()[metric] == pytest.approx(value, abs=ROUNDING)


@pytest.mark.parametrize("name", DEVFD)
def test_the_published_average_and_forgetting_after_each_stage(name: str) -> None:
    scores, averages, forgetting = DEVFD[name]
    matrix = AccuracyMatrix(scores)
    assert matrix.stage_averages == pytest.approx(averages, abs=ROUNDING)
    assert matrix.caa == pytest.approx(np.mean(averages), abs=ROUNDING)
    for stage, value in enumerate(forgetting, start=2):
        so_far = AccuracyMatrix(scores[:stage])
        assert so_far.ffm_from_learning == pytest.approx(value, abs=ROUNDING)
        assert so_far.bwt == pytest.approx(-value, abs=ROUNDING)


@pytest.mark.parametrize("name", ["DevFD, left", "DevFD, right", "CoReD, left"])
def test_the_published_forgetting_from_the_maximum_where_no_task_improved_before_the_end(name: str) -> None:
    """Both definitions then agree. DevFD's second task is best at the very end, which the maximum leaves out."""
    scores, _, forgetting = DEVFD[name]
    assert AccuracyMatrix(scores).ffm_from_maximum == pytest.approx(forgetting[-1], abs=ROUNDING)


def test_the_maximum_is_over_the_stages_before_the_last() -> None:
    """By hand, where they differ: SUR-LID's second task is at 92.42 when learned, at 96.26 later, at 96.79 at last."""
    matrix = AccuracyMatrix(DEVFD["SUR-LID, right"][0])
    assert matrix.ffm_from_maximum == pytest.approx(((96.85 - 87.90) + (96.26 - 96.79) + (97.94 - 93.56)) / 3)
    assert matrix.ffm_from_learning == pytest.approx(((96.85 - 87.90) + (92.42 - 96.79) + (97.94 - 93.56)) / 3)


@given(matrices())
def test_metrics_are_means_over_the_lower_triangle(scores: np.ndarray) -> None:
    """The formulas written out, over the lower triangle alone."""
    count = len(scores)
    matrix = AccuracyMatrix(scores)
    assert matrix.faa == pytest.approx(sum(scores[-1]) / count)
    assert matrix.mft == pytest.approx(sum(scores[i, i] for i in range(count)) / count)
    assert matrix.caa == pytest.approx(sum(sum(scores[t, : t + 1]) / (t + 1) for t in range(count)) / count)
    if count > 1:
        best = [max(scores[t, i] for t in range(i, count - 1)) for i in range(count - 1)]
        lost = [best[i] - scores[-1, i] for i in range(count - 1)]
        assert matrix.ffm_from_maximum == pytest.approx(sum(lost) / (count - 1))
    assert AccuracyMatrix([row[: t + 1] for t, row in enumerate(scores)]).summary() == matrix.summary()


@given(matrices(2))
def test_bounds_and_relations(scores: np.ndarray) -> None:
    matrix = AccuracyMatrix(scores)
    summary = matrix.summary()
    assert all(0 <= summary[name] <= 100 + 1e-9 for name in ("faa", "caa", "mft"))
    assert all(abs(summary[name]) <= 100 for name in ("bwt", "ffm_from_learning", "ffm_from_maximum"))
    assert matrix.bwt == -matrix.ffm_from_learning
    assert matrix.ffm_from_maximum >= matrix.ffm_from_learning - 1e-12
    share = len(scores) / (len(scores) - 1)
    assert matrix.bwt == pytest.approx((matrix.faa - matrix.mft) * share, abs=1e-9)


@given(arrays(np.float64, st.integers(1, 7), elements=st.floats(0, 100)))
def test_nothing_is_forgotten_where_scores_stay(learned: np.ndarray) -> None:
    matrix = AccuracyMatrix(np.tile(learned, (len(learned), 1)))
    assert matrix.bwt == matrix.ffm_from_learning == matrix.ffm_from_maximum == 0
    assert matrix.faa == matrix.mft


@given(matrices(2), st.data())
def test_order_matters_only_where_it_should(scores: np.ndarray, data: st.DataObject) -> None:
    """Moving tasks, with their own and their final scores, leaves FAA, MFT and BWT; scaling scales all."""
    order = [*data.draw(st.permutations(range(len(scores) - 1))), len(scores) - 1]
    before, after = AccuracyMatrix(scores), AccuracyMatrix(scores[np.ix_(order, order)])
    scaled = AccuracyMatrix(scores / 100)
    for name in ("faa", "mft", "bwt", "ffm_from_learning"):
        assert after.summary()[name] == pytest.approx(before.summary()[name], abs=1e-9)
    for name, value in before.summary().items():
        assert scaled.summary()[name] == pytest.approx(value / 100, abs=1e-9)


@given(matrices(), st.data())
def test_scores_above_the_diagonal_are_kept_and_not_used(scores: np.ndarray, data: st.DataObject) -> None:
    above = ~np.tri(len(scores), dtype=bool)
    zero_shot = data.draw(arrays(np.float64, scores.shape, elements=st.floats(0, 100) | st.just(np.nan)))
    other = AccuracyMatrix(np.where(above, zero_shot, scores))
    assert other.summary() == AccuracyMatrix(scores).summary()
    np.testing.assert_array_equal(other.scores[above], zero_shot[above])


@given(matrices(), st.data())
def test_json_gives_the_same_matrix_back(scores: np.ndarray, data: st.DataObject) -> None:
    unknown = ~np.tri(len(scores), dtype=bool) & data.draw(arrays(np.bool_, scores.shape))
    matrix = AccuracyMatrix(np.where(unknown, np.nan, scores), [f"τ{number}" for number in range(len(scores))])
    assert AccuracyMatrix.from_dict(json.loads(json.dumps(matrix.to_dict(), allow_nan=False))) == matrix


def test_a_triangle_stays_a_triangle_in_json() -> None:
    scores = DEVFD["DevFD, left"][0]
    assert AccuracyMatrix(scores).to_dict() == {"tasks": ["task 1", "task 2", "task 3", "task 4"], "scores": scores}


def test_a_matrix_is_a_value() -> None:
    given_scores = np.array([[80.0, np.nan], [70.0, 90.0]])
    matrix = AccuracyMatrix(given_scores, ["a", "b"])
    given_scores[0, 0] = 0
    assert matrix == AccuracyMatrix([[80.0], [70.0, 90.0]], ("a", "b"))
    assert matrix != AccuracyMatrix([[80.0], [70.0, 90.0]])
    assert matrix != AccuracyMatrix([[80.0], [70.0, 90.5]], ("a", "b"))
    assert matrix != [[80.0], [70.0, 90.0]]
    with pytest.raises(FrozenInstanceError):
        matrix.tasks = ("b", "a")  # type: ignore[misc]
    with pytest.raises(ValueError, match="read-only"):
        matrix.scores[0, 0] = 0


def test_one_task() -> None:
    expected = {"faa": 81.5, "caa": 81.5, "mft": 81.5, "bwt": 0, "ffm_from_learning": 0, "ffm_from_maximum": 0}
    assert AccuracyMatrix([[81.5]]).summary() == expected


@pytest.mark.parametrize(
    ("scores", "tasks", "said"),
    [
        ([], None, "at least one"),
        ([1.0, 2.0], None, "row of numbers for each stage"),
        ([[1.0], ["good", 2.0]], None, "row of numbers for each stage"),
        (np.zeros((2, 2, 2)), None, "row of numbers for each stage"),
        ([[1.0], [2.0]], ["a", "b"], r"Row 2 .* after learning 'b', has 1 scores.* each of the 2 tasks"),
        ([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]], None, "Row 1 .* has 3 scores.* at most 2"),
        ([[1.0], [np.nan, 2.0]], ["a", "b"], r"on 'a' after learning 'b' \(row 2, column 1\) is nan"),
        ([[1.0], [None, 2.0]], None, "is nan"),
        ([[1.0, np.inf], [1.0, 2.0]], None, r"\(row 1, column 2\) is inf"),
        (np.array([[1.0, 2.0], [np.nan, 3.0]]), None, "transposed"),
        ([[1.0]], "a", "list of names"),
        ([[1.0]], [1], "list of names"),
        ([[1.0]], ["a", "b"], "1 rows and needs as many"),
        ([[1.0], [1.0, 2.0]], ["a", "a"], "different task names"),
    ],
)
def test_what_is_no_accuracy_matrix_is_refused(scores: object, tasks: object, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        AccuracyMatrix(scores, tasks)  # type: ignore[arg-type]


def test_a_dict_without_scores_is_refused() -> None:
    with pytest.raises(ValueError, match="needs 'scores'; this has 'tasks'"):
        AccuracyMatrix.from_dict({"tasks": ["a"]})


def test_mean_and_spread_over_seeds() -> None:
    runs = [AccuracyMatrix([[80.0], [70.0, 90.0]]), AccuracyMatrix([[84.0], [78.0, 90.0]])]
    found = mean_and_spread(iter(runs))
    assert list(found) == list(runs[0].summary())
    assert found["faa"] == pytest.approx((82.0, 4 / np.sqrt(2)))
    assert found["bwt"].mean == pytest.approx(-8.0)
    assert found["bwt"].spread == pytest.approx(4 / np.sqrt(2))
    single = mean_and_spread(runs[:1])["faa"]
    assert single.mean == 80
    assert np.isnan(single.spread)


def test_a_mean_is_over_runs_on_the_same_tasks_in_any_order() -> None:
    forth, back, other = (AccuracyMatrix([[80.0], [70.0, 90.0]], list(tasks)) for tasks in ("ab", "ba", "ac"))
    assert mean_and_spread([forth, back])["faa"] == (80, 0)
    with pytest.raises(ValueError, match="run 1 learned a, b and run 3 learned a, c"):
        mean_and_spread([forth, back, other])
    with pytest.raises(ValueError, match="no accuracy matrix"):
        mean_and_spread([])


def test_the_module_needs_numpy_only() -> None:
    path = Path(metrics.__file__)
    check = (
        "import sys; import metrics; print(sorted({'torch', 'peft', 'transformers', 'peft_many'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", check], cwd=path.parent, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
