"""The tasks of UCIT and MLLM-DCL: where their files lie, how they are trained, and how their answers are scored.

One row for each task, in the order of the benchmark. Sources: MCITlib (github.com/Ghy0501/MCITlib), files
`configs/model_configs/LLaVA/{UCIT,MLLM-DCL}/train/task*.json` (rank, learning rate, epochs), `configs/data_configs/`
(names of files, also at its version 3), `scripts/CoIN/Eval_*/eval_*.sh` (which scoring belongs to which task) and
`llava/eval/CoIN/model_{others,ai2d,pvqa,fin}.py` (instructions added to a question); HiDe-LLaVA's README
(github.com/Ghy0501/HiDe-LLaVA) for UCIT's first layout; MLLM-CL's README (github.com/bjzhb666/MLLM-CL) for MLLM-DCL's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from scores import contained, contained_as_word, equal, equal_letter, listed

UCIT, MLLM_DCL = "UCIT", "MLLM-DCL"


@dataclass(frozen=True)
class Task:
    """One task of a benchmark.

    Args:
        name (`str`): Its name, also what its adapter is called.
        benchmark (`str`): `"UCIT"` or `"MLLM-DCL"`.
        folders (`tuple[str, ...]`): What the folder of its instruction files is called, by the layouts in use.
        train, test (`tuple[str, ...]`): What the instruction files are called there.
        score (`Callable`, *optional*): `score(answer, truth, question, image)` in [0, 1]; `None` for captions.
        references (`str`, *optional*): For captions, the file of reference captions, in COCO's format.
        suffix (`Callable[[str], str]`, *optional*): What is added to a test question, by its true answer.
        pads_test_images (`bool`): Whether test images are padded to a square as training images are, or cropped.
        rank (`int`): LoRA's r in the published recipe; `lora_alpha` is twice that.
        learning_rate (`float`): LoRA's.
        epochs (`int`): How often training goes through the data.
    """

    name: str
    benchmark: str
    folders: tuple[str, ...]
    train: tuple[str, ...] = ("train.json",)
    test: tuple[str, ...] = ("test.json",)
    score: Callable[[str, str, str, str], float] | None = equal
    references: str | None = None
    suffix: Callable[[str], str] | None = None
    pads_test_images: bool = True
    rank: int = 32
    learning_rate: float = 2e-5
    epochs: int = 1

    @property
    def has_captions(self) -> bool:
        """Whether its answers are captions, which are scored all together."""
        return self.references is not None


def _single_word(truth: str) -> str:
    return " Answer the question with a single word (or phrase)."


def _letter_or_yes_no(truth: str) -> str:
    # As MCITlib asks: the wording gives away which kind of answer is expected.
    if truth in ("Yes", "No"):
        return " Only answer with yes or no directly."
    return " Answer with the given letter directly, e.g., A, B, C, D."


# MCITlib pads training images to a square, but not those that it tests UCIT on (`model_others.py`).
_ucit = partial(
    Task,
    benchmark=UCIT,
    train=("train.json", "train_4w.json", "train_brief_4w.json"),
    test=("test.json", "test_3000.json"),
    pads_test_images=False,
    rank=16,
    learning_rate=2e-4,
)
_caption = partial(_ucit, score=None, references="val_coco_type_3000.json")
_dcl = partial(Task, benchmark=MLLM_DCL)

_ROWS = (
    _ucit("ImageNet-R", folders=("ImageNet-R",)),
    _ucit("ArxivQA", folders=("ArxivQA",)),
    _caption("VizWiz", folders=("VizWiz", "VizWiz-caption", "VizWiz-cap")),
    _ucit("IconQA", folders=("IconQA",)),
    _ucit("CLEVR-Math", folders=("CLEVR-Math", "CLEVR")),
    _caption("Flickr30k", folders=("Flickr30k", "Flickr30k-cap")),
    _dcl("RS", folders=("RS",), score=contained_as_word),
    _dcl("Med", folders=("Med",), score=contained, suffix=_single_word, epochs=3),
    _dcl("AD", folders=("AD",), score=contained_as_word),
    _dcl("Sci", folders=("Sci",), score=listed, epochs=2),
    _dcl("Fin", folders=("Fin",), score=equal_letter, suffix=_letter_or_yes_no),
)
TASKS = {task.name: task for task in _ROWS}


def find_task(name: str) -> Task:
    """The task of that name, whatever its case.

    Raises:
        ValueError: There is none.
    """
    for task in _ROWS:
        if task.name.lower() == name.lower():
            return task
    raise ValueError(f"There is no task '{name}'; there are {', '.join(TASKS)}.")


def find_tasks(names: Sequence[str]) -> list[Task]:
    """Tasks by name; the name of a benchmark stands for all of its tasks."""
    found: list[Task] = []
    for name in names:
        members = [task for task in _ROWS if task.benchmark.lower() == name.lower()]
        found += [task for task in members or [find_task(name)] if task not in found]
    return found
