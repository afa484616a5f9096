"""What an evaluation found, and the folder that it is written into."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..files.atomic import replace_file, results_folder
from .running import MERGE, alone_name

_FILES = ("evaluation.json", "answers.json", "evaluation.png")


@dataclass(frozen=True)
class Evaluation:
    """How well a merge answers, and how well others do.

    Args:
        metrics (`dict[str, str]`): By task, what its answers were scored by.
        questions (`dict[str, int]`): By task, how many were asked.
        scores (`dict[str, dict[str, float]]`):
            By who answered (`"merge"`, or `"adapter"` if it is none, `"base model"`, and a task's adapter,
            `"clevr alone"`) and by task, the mean score in per cent.
        perplexity (`dict[str, float]`): Of a text, by the merge and by the base model.
        captions (`dict[str, dict[str, dict[str, float]]]`):
            By who answered, by task that is scored by `"captions"`, and by caption metric: `BLEU-1` to `BLEU-4`,
            `METEOR`, `ROUGE-L`, `CIDEr` and their `mean`.
        cut_short (`dict[str, dict[str, int]]`):
            By who answered and by task, how many answers had `max_new_tokens` tokens and no end; where there are any.
        asked (`dict[str, list[dict[str, Any]]]`):
            By task, its questions: the `"question"`, the answers that are `"right"`, and the names of its `"images"`.
        answers (`dict[str, dict[str, list[str]]]`): What was said, by who answered and by task.
    """

    metrics: dict[str, str]
    questions: dict[str, int]
    scores: dict[str, dict[str, float]]
    perplexity: dict[str, float] = field(default_factory=dict)
    captions: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    cut_short: dict[str, dict[str, int]] = field(default_factory=dict)
    asked: dict[str, list[dict[str, Any]]] = field(default_factory=dict, repr=False)
    answers: dict[str, dict[str, list[str]]] = field(default_factory=dict, repr=False)

    @property
    def mean(self) -> dict[str, float]:
        """By who answered all tasks, the mean over them."""
        whole = {name: row for name, row in self.scores.items() if row.keys() == self.metrics.keys()}
        return {name: sum(row.values()) / len(row) for name, row in whole.items()}

    @property
    def forgotten(self) -> dict[str, float]:
        """By task, what its adapter alone scores more than the merge; below zero where merging helped."""
        merge = self.scores.get(MERGE, {})
        own = {task: self.scores.get(alone_name(task), {}).get(task) for task in merge}
        return {task: score - merge[task] for task, score in own.items() if score is not None}

    def to_dict(self) -> dict[str, Any]:
        """All but questions and answers, for JSON."""
        found = {name: value for name, value in asdict(self).items() if name not in ("asked", "answers")}
        return {**found, "mean": self.mean, "forgotten": self.forgotten}

    def conversations(self) -> dict[str, list[dict[str, Any]]]:
        """By task and question, what was asked, what is right, and what was `"said"` by whom; for JSON."""
        return {
            task: [
                {**row, "said": {who: said[task][place] for who, said in self.answers.items() if task in said}}
                for place, row in enumerate(rows)
            ]
            for task, rows in self.asked.items()
        }


def check_evaluation_folder(output_dir: str | os.PathLike[str], overwrite: bool, merge: Any = None) -> Path:
    """The folder for an evaluation of a merge, or a `FileExistsError` or another `OSError` if it cannot be written."""
    return results_folder(output_dir, _FILES, overwrite, [merge])


def save_evaluation(found: Evaluation, output_dir: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
    """Write `evaluation.json`, `answers.json` and, if matplotlib is installed, `evaluation.png` into a folder.

    Args:
        found ([`Evaluation`]): What [`evaluate_merge`] gave.
        output_dir (`str` or `os.PathLike`): The folder; what else is in it stays.
        overwrite (`bool`, defaults to `False`): Replace an earlier evaluation that is there.

    Returns:
        `Path`: The folder.

    Raises:
        FileExistsError: There is an earlier evaluation.

    Example:

        ```py
        >>> from peft_many import save_evaluation
        >>> from peft_many.reports.evaluation import Evaluation

        >>> scores = {"merge": {"clevr": 50.0}, "clevr alone": {"clevr": 60.0}}
        >>> found = Evaluation({"clevr": "exact"}, {"clevr": 10}, scores)
        >>> save_evaluation(found, "evaluated").name
        'evaluated'
        ```
    """
    output = check_evaluation_folder(output_dir, overwrite)
    output.mkdir(parents=True, exist_ok=True)
    scores, answers, picture = _FILES
    for name, content in ((scores, found.to_dict()), (answers, found.conversations())):
        with replace_file(output / name) as temporary:
            temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    try:
        from .scores_picture import draw_scores
    except ImportError:
        (output / picture).unlink(missing_ok=True)  # of the evaluation that was replaced
        return output
    with replace_file(output / picture) as temporary:
        draw_scores(found.scores, found.metrics).savefig(temporary, format="png", dpi=130)
    return output
