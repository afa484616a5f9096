"""`evaluate_merge`: what a merge answers right, beside each of its tasks' adapters alone and the base model."""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from peft.utils import PeftWarning
from torch.nn import functional
from tqdm.auto import tqdm
from typing_extensions import Unpack

from ..data.conversations import Example
from ..data.reading import read_examples, read_text
from ..data.scores import CAPTIONS, check_metric, score, score_captions
from ..files.atomic import replace_file, results_folder
from ..hub.sources import HubArguments
from ..records.values import one_of
from ..records.words import quoted
from ..statistics.forward import state_kept
from .running import ADAPTER, BASE, MERGE, RunningMerge, alone_name, answers_of

_FILES = ("evaluation.json", "answers.json", "evaluation.png")
_WINDOW = 512  # tokens of a text that are seen at once


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
        answers (`dict[str, dict[str, list[str]]]`): What was said, by who answered and by task.
    """

    metrics: dict[str, str]
    questions: dict[str, int]
    scores: dict[str, dict[str, float]]
    perplexity: dict[str, float] = field(default_factory=dict)
    captions: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
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
        """All but the answers, for JSON."""
        found = {name: value for name, value in asdict(self).items() if name != "answers"}
        return {**found, "mean": self.mean, "forgotten": self.forgotten}


def evaluate_merge(
    merge: str | os.PathLike[str],
    data: Mapping[str, Any],
    *,
    metric: str | Mapping[str, str] = "exact",
    alone: Literal["all", "own", "none"] = "all",
    text: str | os.PathLike[str] | None = None,
    limit: int | None = None,
    split: str = "test",
    images: str | os.PathLike[str] | None = None,
    base_model: str | os.PathLike[str] | None = None,
    processor: Any = None,
    system: str | None = None,
    batch_size: int = 8,
    max_new_tokens: int = 64,
    device: str | torch.device | None = None,
    model_options: Mapping[str, Any] | None = None,
    progress: bool = True,
    **hub: Unpack[HubArguments],
) -> Evaluation:
    """Ask a merge the test questions of its tasks, and the base model and each task's adapter alone too.

    Decoding is greedy. The tasks' adapters are taken from the merge, which holds all of them.

    Arguments that are not listed are as in [`measure_adapter`].

    Args:
        merge (`str` or `os.PathLike`): A merge, or the adapter of one task: a folder or a Hub id.
        data (`Mapping[str, Any]`):
            By task, its test questions, in any form that [`measure_adapter`] takes. Those that are called as a task of
            the merge are compared with that task's adapter.
        metric (`str` or `Mapping[str, str]`, defaults to `"exact"`):
            How answers are scored, or how by task: `"exact"` (equal but for case and a stop at the end), `"vqa"`
            (VQA's accuracy), or `"captions"` (the mean of BLEU-1 to BLEU-4, METEOR, ROUGE-L and CIDEr, by
            pycocoevalcap, which needs Java; above 100 is possible, as CIDEr counts up to 1000).
        alone (`str`, defaults to `"all"`):
            Ask each task's adapter alone the questions of all tasks (`"all"`), of its own (`"own"`), or none.
        text (`str` or `os.PathLike`, *optional*): A text file to compute the perplexity of.
        limit (`int`, *optional*): Ask no more than this number of questions of each task, the first ones.
        split (`str`, defaults to `"test"`): Which part of a data set that has several.
        batch_size (`int`, defaults to 8): Questions in one pass.
        max_new_tokens (`int`, defaults to 64): The longest answer.

    Returns:
        [`Evaluation`]: Scores by who answered and by task.

    Raises:
        ValueError: The data are in no format that is known, or there is no such metric.
        FileNotFoundError: The merge, its base model, the data or an image are not there; or Java is not, for captions.
        ImportError: What scores captions, or reads the data, is not installed.

    Example:

        ```py
        >>> from peft_many import evaluate_merge

        >>> rows = [{"image": "red.png", "question": "What colour is it ?", "answer": "red"}]
        >>> options = {"base_model": "base", "max_new_tokens": 2, "progress": False}
        >>> found = evaluate_merge("merged", {"clevr": rows}, **options)
        >>> sorted(found.scores)
        ['base model', 'clevr alone', 'iconqa alone', 'merge']
        ```
    """
    one_of("alone", alone, ("all", "own", "none"))
    metrics = {task: metric if isinstance(metric, str) else metric.get(task, "exact") for task in data}
    for one in set(metrics.values()):
        check_metric(one)
    if not isinstance(metric, str) and (unknown := [task for task in metric if task not in data]):
        raise ValueError(f"`metric` names '{unknown[0]}', of which no data are given; there are {quoted(data)}.")
    if not data:
        raise ValueError("There is nothing to evaluate on; give `data`, test questions by task.")
    # Files are read before the model is: what is missing shows at once.
    questions = {task: read_examples(place, split=split, images=images, limit=limit) for task, place in data.items()}
    prose = None if text is None else read_text(text)
    running = RunningMerge.load(
        merge,
        [example for of_task in questions.values() for example in of_task],
        base_model=base_model,
        processor=processor,
        system=system,
        device=device,
        model_options=model_options,
        hub=hub,
    )
    _warn_of_strange(data, running.tasks if alone != "none" else [])
    answers: dict[str, dict[str, list[str]]] = {}
    perplexity: dict[str, float] = {}
    tasks = [task for task in running.tasks if alone == "all" or (alone == "own" and task in data)]
    own = {alone_name(task): [task] for task in tasks} if alone == "own" else {}
    ask = partial(answers_of, running.model, running.collator, batch_size=batch_size, max_new_tokens=max_new_tokens)
    for who, context in running.contexts(tasks):
        with context:
            answers[who] = {
                task: ask(questions[task], label=f"{who} on {task}" if progress else None)
                for task in own.get(who, questions)
            }
            if prose is not None and who in (MERGE, ADAPTER, BASE):
                perplexity[who] = perplexity_of(running.model, running.collator.tokenizer, prose, progress)
    scores, captions = _scored(metrics, answers, questions, progress)
    counts = {task: len(rows) for task, rows in questions.items()}
    return Evaluation(metrics, counts, scores, perplexity, captions, answers)


def _scored(
    metrics: Mapping[str, str],
    answers: Mapping[str, Mapping[str, Sequence[str]]],
    questions: Mapping[str, Sequence[Example]],
    progress: bool,
) -> tuple[dict[str, dict[str, float]], dict[str, dict[str, dict[str, float]]]]:
    """The scores and caption metrics of an [`Evaluation`]; with a bar where Java is started for each who answered."""
    scores: dict[str, dict[str, float]] = {}
    captions: dict[str, dict[str, dict[str, float]]] = {}
    silent = not progress or CAPTIONS not in metrics.values()
    for who, by_task in tqdm(answers.items(), desc="Scoring captions", disable=silent):
        scores[who] = {}
        for task, said in by_task.items():
            if metrics[task] == CAPTIONS:
                found = captions.setdefault(who, {})[task] = score_captions(said, questions[task])
                scores[who][task] = found["mean"]
            else:
                scores[who][task] = score(metrics[task], said, questions[task])
    return scores, captions


def _warn_of_strange(data: Mapping[str, Any], tasks: Sequence[str]) -> None:
    """Say which data have a name that no task of the merge has: misspelled, they are compared with no adapter."""
    strange = [name for name in data if name not in tasks]
    if tasks and strange:
        warnings.warn(
            f"No task of the merge is called {quoted(strange)}, so no adapter of its own is compared with the merge "
            f"there; the tasks are {quoted(tasks)}.",
            PeftWarning,
            stacklevel=3,
        )


def perplexity_of(model: Any, tokenizer: Any, text: str, progress: bool = False) -> float:
    """`exp` of the mean negative log-likelihood of a text's tokens, read in windows that follow one another."""
    ids = tokenizer(text, return_tensors="pt")["input_ids"].to(model.device)
    if ids.shape[1] < 2:
        raise ValueError("The text for the perplexity has fewer than two tokens.")
    total = 0.0
    windows = tqdm(range(0, ids.shape[1] - 1, _WINDOW), desc="Reading the text", disable=not progress)
    with state_kept(model), torch.inference_mode():
        for start in windows:
            window = ids[:, start : start + _WINDOW + 1]
            logits = model(input_ids=window[:, :-1], attention_mask=torch.ones_like(window[:, :-1])).logits
            total += functional.cross_entropy(logits[0].float(), window[0, 1:], reduction="sum").item()
    return math.exp(total / (ids.shape[1] - 1))


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
    for name, content in ((scores, found.to_dict()), (answers, found.answers)):
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
