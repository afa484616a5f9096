"""What was remembered and what forgotten: the metrics of continual learning, from one matrix of scores.

Needs numpy, and nothing else of this package. In the formulas `a[t, i]` is the score on task `i` after stage `t`, both
from 1 to `T`. Metrics are in the unit of the scores, whichever it is (per cent in most papers).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Scores = Sequence[Sequence[float | None]] | npt.NDArray[Any]


@dataclass(frozen=True, init=False, eq=False)
class AccuracyMatrix:
    """The score on each task after each stage of learning, and the metrics that are means over it.

    Tasks are in the order of learning: stage `t` is the one that learns task `t`. The lower triangle (`i <= t`) has to
    be complete. Scores above it, on tasks not learned yet, may be given, or padding: they are kept, but not used.

    With a single task nothing can be forgotten yet: BWT and both FFM, means over no tasks, are then 0.

    Args:
        scores (`Sequence[Sequence[float]]` or `np.ndarray`):
            A row for each stage, with at least `t` scores in row `t`: lists that grow by one, or a square array.
            `None` and NaN are scores that were not measured. Kept as float64, shape `(T, T)`, read-only, NaN where
            there is no score.
        tasks (`Sequence[str]`, *optional*):
            The names of the tasks, in the same order; `"task 1"` and so on by default.

    Raises:
        ValueError: If a score in the lower triangle is missing or not finite, or if shapes or names do not fit.
    """

    scores: npt.NDArray[np.float64]
    tasks: tuple[str, ...]

    def __init__(self, scores: Scores, tasks: Sequence[str] | None = None) -> None:
        rows = _rows(scores)
        names = _names(tasks, len(rows))
        square = np.full((len(rows), len(rows)), np.nan)
        for stage, row in enumerate(rows, start=1):
            if not stage <= len(row) <= len(rows):
                raise ValueError(
                    f"Row {stage} of the accuracy matrix, after learning '{names[stage - 1]}', has {len(row)} scores. "
                    f"It needs one for each of the {stage} tasks learned so far, and at most {len(rows)}, as many as "
                    "there are rows."
                )
            square[stage - 1, : len(row)] = row
            for task, score in enumerate(row, start=1):
                if np.isinf(score) or (task <= stage and np.isnan(score)):
                    raise ValueError(
                        f"The score on '{names[task - 1]}' after learning '{names[stage - 1]}' (row {stage}, column "
                        f"{task}) is {score}. Scores have to be finite, and none may be missing on a task learned so "
                        "far. Rows are stages, columns are tasks: is the matrix transposed?"
                    )
        square.setflags(write=False)
        object.__setattr__(self, "scores", square)
        object.__setattr__(self, "tasks", names)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, AccuracyMatrix):
            return NotImplemented
        return self.tasks == other.tasks and np.array_equal(self.scores, other.scores, equal_nan=True)

    @property
    def stage_averages(self) -> npt.NDArray[np.float64]:
        """Average accuracy after each stage, `A_t = mean_{i<=t} a[t, i]`; shape `(T,)`."""
        return np.array([row[: stage + 1].mean() for stage, row in enumerate(self.scores)])

    @property
    def faa(self) -> float:
        """Final average accuracy, `mean_i a[T, i]`; also ACC (arXiv 1706.08840), MFN (arXiv 2508.07307), Last."""
        return float(self.stage_averages[-1])

    @property
    def caa(self) -> float:
        """Cumulative average accuracy, `mean_t mean_{i<=t} a[t, i]`; also MAA (arXiv 2508.07307), Avg."""
        return float(self.stage_averages.mean())

    @property
    def mft(self) -> float:
        """Mean fine-tune accuracy, `mean_i a[i, i]`: each task when it was just learned (arXiv 2508.07307)."""
        return float(np.diagonal(self.scores).mean())

    @property
    def bwt(self) -> float:
        """Backward transfer, `mean_{i<T} (a[T, i] - a[i, i])`; negative if tasks were forgotten (arXiv 1706.08840)."""
        return _mean((self.scores[-1] - np.diagonal(self.scores))[:-1])

    @property
    def ffm_from_learning(self) -> float:
        """Final forgetting measure from the learning time, `mean_{i<T} (a[i, i] - a[T, i])`: `-bwt`.

        What is gone of the score that a task had when it was learned; negative if later tasks helped. FFM of Gao et
        al. (MaDQ, CVPR 2026), average forgetting (AF) of DevFD (arXiv 2509.19230).
        """
        return _mean((np.diagonal(self.scores) - self.scores[-1])[:-1])

    @property
    def ffm_from_maximum(self) -> float:
        """Final forgetting measure from the maximum, `mean_{i<T} (max_{i<=t<T} a[t, i] - a[T, i])`.

        What is gone of the best score that a task had before the last stage; negative if it is best at the last. (Code
        that takes the maximum over all stages never reports less than 0.) At least `ffm_from_learning`.

        Source: Chaudhry et al. (arXiv 1801.10112); FFM of Gao et al. (ZAF, NeurIPS 2024). They write the maximum from
        `t = 1`; from `t = i` it leaves out scores from before the task was learned.
        """
        learned = np.where(np.tri(len(self.tasks), dtype=bool), self.scores, -np.inf)
        return _mean(learned[:-1, :-1].max(axis=0, initial=-np.inf) - self.scores[-1, :-1])

    def summary(self) -> dict[str, float]:
        """All metrics by name: `faa`, `caa`, `mft`, `bwt`, `ffm_from_learning` and `ffm_from_maximum`."""
        names = ("faa", "caa", "mft", "bwt", "ffm_from_learning", "ffm_from_maximum")
        return {name: getattr(self, name) for name in names}

    def to_dict(self) -> dict[str, Any]:
        """`tasks` and `scores` as plain lists, for JSON; rows end at their last score, others that miss are `None`."""
        rows = [row[: np.flatnonzero(~np.isnan(row))[-1] + 1].tolist() for row in self.scores]
        return {"tasks": list(self.tasks), "scores": [[None if np.isnan(s) else s for s in row] for row in rows]}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> AccuracyMatrix:
        """What `to_dict` gave.

        Raises:
            ValueError: If `scores` are missing, or are no accuracy matrix.
        """
        if "scores" not in data:
            raise ValueError(f"An accuracy matrix needs 'scores'; this has {', '.join(map(repr, data)) or 'nothing'}.")
        return cls(data["scores"], data.get("tasks"))


class MeanAndSpread(NamedTuple):
    """Mean of a metric over `n` runs, and its sample standard deviation (divided by `n - 1`; NaN for a single run)."""

    mean: float
    spread: float


def mean_and_spread(matrices: Iterable[AccuracyMatrix]) -> dict[str, MeanAndSpread]:
    """Each metric of `AccuracyMatrix.summary` over several runs: other seeds, or other orders of the same tasks.

    Raises:
        ValueError: If there are none, or if they are not of the same tasks.
    """
    runs = list(matrices)
    if not runs:
        raise ValueError("There is no accuracy matrix to take the mean over.")
    for number, run in enumerate(runs[1:], start=2):
        if set(run.tasks) != set(runs[0].tasks):
            raise ValueError(
                f"A mean is over runs on the same tasks, but run 1 learned {', '.join(runs[0].tasks)} and run "
                f"{number} learned {', '.join(run.tasks)}."
            )
    summaries = [run.summary() for run in runs]
    found = {}
    for name in summaries[0]:
        values = np.array([summary[name] for summary in summaries])
        spread = float(values.std(ddof=1)) if len(values) > 1 else float("nan")
        found[name] = MeanAndSpread(float(values.mean()), spread)
    return found


def _mean(values: npt.NDArray[np.float64]) -> float:
    return float(values.mean()) if values.size else 0.0


def _rows(scores: Scores) -> list[npt.NDArray[np.float64]]:
    try:
        rows = [np.array([np.nan if score is None else float(score) for score in row]) for row in scores]
    except (TypeError, ValueError) as error:
        raise ValueError(f"An accuracy matrix is a row of numbers for each stage of learning: {error}.") from error
    if not rows:
        raise ValueError("An accuracy matrix has a row for each stage of learning, and at least one.")
    return rows


def _names(tasks: Sequence[str] | None, count: int) -> tuple[str, ...]:
    if tasks is None:
        return tuple(f"task {number}" for number in range(1, count + 1))
    if isinstance(tasks, str) or not all(isinstance(task, str) for task in tasks):
        raise ValueError(f"`tasks` is a list of names, but is {tasks!r}.")
    if len(tasks) != count or len(set(tasks)) != count:
        raise ValueError(
            f"The accuracy matrix has {count} rows and needs as many different task names, not {list(tasks)!r}."
        )
    return tuple(tasks)
