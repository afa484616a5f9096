"""How answers are scored: accuracies as the benchmarks count them, captions by BLEU, METEOR, ROUGE-L and CIDEr.

The accuracies follow `llava/eval/CoIN/eval_*.py` of github.com/Ghy0501/MCITlib, each function names its file. Captions
go through pycocoevalcap, which the benchmarks use too. It runs Java for METEOR and for splitting captions into words.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from peft_many.data import captions
from peft_many.data.captions import CAPTION_METRICS

__all__ = ["CAPTION_METRICS", "caption_scores", "check_captions_can_be_scored"]


def equal(answer: str, truth: str, question: str, image: str) -> float:
    """UCIT: equal but for case (`eval_deepseek_r1.py`, where the language model that names it is not asked)."""
    return float(answer.upper() == truth.upper())


def contained_as_word(answer: str, truth: str, question: str, image: str) -> float:
    """RS and AD: the truth occurs in the answer, beside a space or a stop if it is one word (`eval_ai2d.py`)."""
    if _declined(answer):
        return 0.0
    answer, truth = answer.lower(), truth.lower()
    if " " in truth or " " not in answer:
        return float((truth if " " in truth else truth.replace(".", "")) in answer)
    truth = truth.replace(".", "")
    return float(any(form in answer for form in (f" {truth}", f"{truth} ", f"{truth}.", f"{truth},")))


def contained(answer: str, truth: str, question: str, image: str) -> float:
    """Med: the truth occurs in the answer (`eval_pvqa.py`)."""
    return float(not _declined(answer) and truth.lower() in answer.lower())


def listed(answer: str, truth: str, question: str, image: str) -> float:
    """Sci: equal; of map questions, contained, or the share of the listed states that occur (`eval_sci.py`)."""
    if _declined(answer):
        return 0.0
    answer, truth = answer.lower(), truth.lower()
    source = image.split("/")[-1].split("_")[0]
    if source in ("AI2D", "TQA", "VQA", "SciVerse"):
        return float(answer == truth)
    if "Which states" in question:
        states, given = truth.split(","), answer.split(",")
        return sum(state in given for state in states) / len(states)
    return float(truth in answer)


def equal_letter(answer: str, truth: str, question: str, image: str) -> float:
    """Fin: a letter, yes or no, equal but for case, spaces and stops in the answer (`eval_finvis.py`)."""
    return float(not _declined(answer) and answer.lower().replace(" ", "").replace(".", "") == truth.lower())


def _declined(answer: str) -> bool:
    return "Unanswerable" in answer


def check_captions_can_be_scored(leave_out: Collection[str] = ()) -> None:
    """Find out that something is missing before hours of generation; see the package's function."""
    try:
        captions.check_captions_can_be_scored(leave_out)
    except (ModuleNotFoundError, FileNotFoundError) as error:
        raise type(error)(
            f"{error} Leaving out all caption metrics (`--leave-out`, once for each) writes the answers without "
            "scoring them."
        ) from error


def caption_scores(
    given: Sequence[str], references: Sequence[Sequence[str]], leave_out: Collection[str] = ()
) -> dict[str, float]:
    """Score captions against their references, in per cent; see the package's function."""
    check_captions_can_be_scored(leave_out)
    return captions.caption_scores(given, references, leave_out)
