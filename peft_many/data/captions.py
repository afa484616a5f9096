"""Captions scored by BLEU, METEOR, ROUGE-L and CIDEr.

They go through pycocoevalcap, which the benchmarks use too. It runs Java for METEOR and for splitting captions into
words.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection, Mapping, Sequence

CAPTION_METRICS = ("BLEU", "METEOR", "ROUGE-L", "CIDEr")


def check_captions_can_be_scored(leave_out: Collection[str] = ()) -> None:
    """Find out that something is missing before hours of generation.

    A caption is split into words, as Java may be there and not run, and pycocoevalcap writes into its own folder.

    Raises:
        ModuleNotFoundError: pycocoevalcap is not installed.
        FileNotFoundError: There is no Java.
        ValueError: `leave_out` names no metric.
        OSError, RuntimeError: Captions cannot be split into words.
    """
    if _check_installed(leave_out):
        _in_words({0: ["a caption"]})


def _check_installed(leave_out: Collection[str]) -> bool:
    """Whether anything is to be computed, which then can be."""
    unknown = sorted(set(leave_out) - set(CAPTION_METRICS))
    if unknown:
        raise ValueError(f"There is no caption metric {unknown[0]!r}; there are {', '.join(CAPTION_METRICS)}.")
    if set(leave_out) == set(CAPTION_METRICS):
        return False
    try:
        import pycocoevalcap.tokenizer.ptbtokenizer  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "Captions are scored by pycocoevalcap, which is not installed: `pip install 'peft-many[ucit]'`."
        ) from error
    if shutil.which("java") is None:
        raise FileNotFoundError(
            "Captions are split into words by Stanford's tokenizer, and METEOR is computed, by Java programs that "
            "pycocoevalcap brings along, but there is no `java`. Install a Java runtime (version 8 or later)."
        )
    return True


def caption_scores(
    captions: Sequence[str], references: Sequence[Sequence[str]], leave_out: Collection[str] = ()
) -> dict[str, float]:
    """Score captions against their references, in per cent; `mean` is the benchmark's number.

    Args:
        captions (`Sequence[str]`): One for each image.
        references (`Sequence[Sequence[str]]`): For each image, at least one.
        leave_out (`Collection[str]`): Metrics out of `CAPTION_METRICS` not to compute. There is no `mean` then, as
            it would not be comparable.

    Returns:
        `dict[str, float]`: By metric, `BLEU-1` to `BLEU-4` among them.
    """
    _check_installed(leave_out)
    if len(captions) != len(references) or not captions or not all(references):
        raise ValueError(f"There are {len(captions)} captions and {len(references)} images with references.")
    wanted = [metric for metric in CAPTION_METRICS if metric not in leave_out]
    if not wanted:
        return {}
    given = _in_words({image: [caption] for image, caption in enumerate(captions)})
    truth = _in_words(dict(enumerate(references)))
    found: dict[str, float] = {}
    for metric in wanted:
        found |= _score(metric, given, truth)
    if len(wanted) == len(CAPTION_METRICS):
        found["mean"] = sum(found.values()) / len(found)
    return found


def _in_words(captions: Mapping[int, Sequence[str]]) -> dict[int, list[str]]:
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    # One caption is one line there, so characters that end lines must go first.
    lines = {image: [{"caption": " ".join(text.split())} for text in texts] for image, texts in captions.items()}
    try:
        split: dict[int, list[str]] = PTBTokenizer().tokenize(lines)
    except OSError as error:
        raise OSError(
            f"pycocoevalcap cannot split captions into words: {error}. It runs `java`, and writes a file into the "
            "folder that it is installed in."
        ) from error
    if {image: len(texts) for image, texts in split.items()} != {image: len(texts) for image, texts in lines.items()}:
        raise RuntimeError("Stanford's tokenizer gave another number of captions than it got. Does `java` run?")
    return split


def _score(metric: str, given: dict[int, list[str]], truth: dict[int, list[str]]) -> dict[str, float]:
    if metric == "BLEU":
        from pycocoevalcap.bleu.bleu import Bleu

        scores, _ = Bleu(4).compute_score(truth, given, verbose=0)
        return {f"BLEU-{n}": 100 * float(score) for n, score in enumerate(scores, start=1)}
    if metric == "METEOR":
        from pycocoevalcap.meteor.meteor import Meteor as Scorer
    elif metric == "ROUGE-L":
        from pycocoevalcap.rouge.rouge import Rouge as Scorer
    else:
        from pycocoevalcap.cider.cider import Cider as Scorer
    score, _ = Scorer().compute_score(truth, given)
    return {metric: 100 * float(score)}
