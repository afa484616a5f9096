"""`evaluate_merge`: what a merge answers right, beside each of its tasks' adapters alone and the base model."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from functools import partial
from typing import Any, Literal

import torch
from peft.utils import PeftWarning
from tqdm.auto import tqdm
from typing_extensions import Unpack

from ..data.conversations import Example
from ..data.reading import read_examples, read_text
from ..data.scores import CAPTIONS, check_metric, score, score_captions
from ..files.source import read_config
from ..hub.sources import HubArguments, find_adapter
from ..records import merge_of
from ..records.values import one_of
from ..records.words import quoted
from .evaluation import Evaluation
from .perplexity import perplexity_of
from .running import ADAPTER, BASE, MERGE, RunningMerge, Said, alone_name, answers_of


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
        split (`str`, defaults to `"test"`): Which part of a data set that has several; files are read whole.
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
    if not isinstance(data, Mapping):
        raise ValueError(f"`data` must map tasks' names to test questions, but it is a {type(data).__name__}.")
    metrics = {task: metric if isinstance(metric, str) else metric.get(task, "exact") for task in data}
    for one in set(metrics.values()):
        check_metric(one)
    if not isinstance(metric, str) and (unknown := [task for task in metric if task not in data]):
        raise ValueError(f"`metric` names '{unknown[0]}', of which no data are given; there are {quoted(data)}.")
    if not data:
        raise ValueError("There is nothing to evaluate on; give `data`, test questions by task.")
    source = find_adapter(merge, **hub)
    record = merge_of(read_config(source))
    _warn_of_strange(data, [] if record is None or alone == "none" else record.names)
    # Files are read before the model is: what is missing shows at once.
    questions = {task: read_examples(place, split=split, images=images, limit=limit) for task, place in data.items()}
    prose = None if text is None else read_text(text)
    running = RunningMerge.load(
        source,
        [example for of_task in questions.values() for example in of_task],
        base_model=base_model,
        processor=processor,
        system=system,
        device=device,
        model_options=model_options,
        hub=hub,
    )
    ask = partial(answers_of, running.model, running.collator, batch_size=batch_size, max_new_tokens=max_new_tokens)
    said, perplexity = _ask_all(running, questions, alone, ask, prose, progress)
    answers = {who: {task: [one.text for one in row[task]] for task in row} for who, row in said.items()}
    scores, captions = _scored(metrics, answers, questions, progress)
    asked = {task: [_shown(example) for example in of_task] for task, of_task in questions.items()}
    counts = {task: len(rows) for task, rows in asked.items()}
    return Evaluation(metrics, counts, scores, perplexity, captions, _cut_short(said), asked, answers)


def _ask_all(
    running: RunningMerge,
    questions: Mapping[str, Sequence[Example]],
    alone: str,
    ask: Callable[..., list[Said]],
    prose: str | None,
    progress: bool,
) -> tuple[dict[str, dict[str, list[Said]]], dict[str, float]]:
    """What everybody says, by who answered and by task, and the perplexities of a text."""
    said: dict[str, dict[str, list[Said]]] = {}
    perplexity: dict[str, float] = {}
    tasks = [task for task in running.tasks if alone == "all" or (alone == "own" and task in questions)]
    own = {alone_name(task): [task] for task in tasks} if alone == "own" else {}
    for who, context in running.contexts(tasks):
        with context:
            said[who] = {
                task: ask(questions[task], label=f"{who} on {task}" if progress else None)
                for task in own.get(who, questions)
            }
            if prose is not None and who in (MERGE, ADAPTER, BASE):
                perplexity[who] = perplexity_of(running.model, running.collator.tokenizer, prose, progress)
    return said, perplexity


def _cut_short(said: Mapping[str, Mapping[str, Sequence[Said]]]) -> dict[str, dict[str, int]]:
    """How many answers did not end, by who answered and by task; where there are any."""
    counts = {who: {task: sum(not one.ended for one in row[task]) for task in row} for who, row in said.items()}
    found = {who: {task: count for task, count in row.items() if count} for who, row in counts.items()}
    return {who: row for who, row in found.items() if row}


def _shown(example: Example) -> dict[str, Any]:
    """A question as a file shows it."""
    images = [os.fspath(image) for image in example.images if isinstance(image, (str, os.PathLike))]
    named = {"images": images} if images else {}
    return {"question": example.question, **named, "right": list(example.right)}


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
        meant = next(iter(get_close_matches(strange[0], tasks, 1)), "")
        asked = f" Did you mean '{meant}' by '{strange[0]}'? Then stop here and say so: {meant}=DATA." if meant else ""
        warnings.warn(
            f"No task of the merge is called {quoted(strange)}, so no adapter of its own is compared with the merge "
            f"there; the tasks are {quoted(tasks)}.{asked}",
            PeftWarning,
            stacklevel=3,
        )
