"""The merge for servers without gates, made better without the tasks' data; and adapters that nobody measured."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from peft import PeftModel

from peft_many import collect_statistics, refit_merge

from .methods import Answerer, Method, merged, refitted, same
from .model import Collator
from .parts import pairs_of, with_parts
from .pretraining import pretraining_examples
from .training import answers, batches_of
from .workshop import BATCH_SIZE, Workshop
from .world import Example, Task

PLAIN, UNMEASURED = "the plain merge", "adapters that nobody measured"
PRETENDED = 64  # samples of an adapter that nobody measured
KEPT = 16  # prompts that an adapter keeps
_WEIGHED = "weighed"


def weighed(shop: Workshop, task: Task) -> Path:
    """The task's own adapter with tokens weighed by how far they move the answers."""
    return shop.remeasured(task, _WEIGHED, weigh_tokens=True)


def _weighed(shop: Workshop, stage: int, **options: Any) -> Answerer:
    return same(merged(shop, stage, adapter=partial(weighed, shop), **options))


# --- Imagined samples ------------------------------------------------------------------------------------------------


def with_prompts(shop: Workshop, task: Task) -> Path:
    """The task's own adapter with what samples can be imagined from."""
    return shop.remeasured(task, "prompts", keep_prompts=KEPT)


def _refitted_without_data(shop: Workshop, stage: int, **options: Any) -> Answerer:
    model = merged(shop, stage, adapter=partial(with_prompts, shop), router="gaussian")
    refit_merge(model, progress=False, **options)
    return same(model)


# --- Adapters that nobody measured -----------------------------------------------------------------------------------


def _pictures_of_others(shop: Workshop, task: Task, count: int) -> list[np.ndarray]:
    others = [other for other in shop.tasks if other is not task]
    return [shop.samples(others[i % len(others)], count)[i].image for i in range(count)]


def _plain_pictures(shop: Workshop, task: Task, count: int) -> list[np.ndarray]:
    return [example.image for example in islice(pretraining_examples(shop.seed + 2), count)]


def _noise(shop: Workshop, task: Task, count: int) -> list[np.ndarray]:
    rng = np.random.default_rng(shop.seed + 2)
    return [rng.integers(0, 256, example.image.shape, dtype=np.uint8) for example in shop.samples(task, count)]


PICTURES = {"other tasks' pictures": _pictures_of_others, "plain pictures": _plain_pictures, "noise": _noise}


def pretended(shop: Workshop, task: Task, pictures: str, prompts: str, count: int = PRETENDED) -> list[Example]:
    """Pictures that are not the task's with `"own"` prompts or the `"base"`'s, answered by the task's own adapter."""
    questions = [example.question for example in shop.samples(task, count)]
    if prompts == "base":
        questions = [example.question for example in islice(pretraining_examples(shop.seed + 3), len(questions))]
    shown = PICTURES[pictures](shop, task, len(questions))
    asked = [Example(picture, ((question, ""),)) for picture, question in zip(shown, questions)]
    given = answers(_own(shop, task), Collator(shop.tiny, prompts_only=True), asked)
    return [replace(one, turns=((one.question, answer),)) for one, answer in zip(asked, given)]


def _pretended_to_measure(shop: Workshop, task: Task, pictures: str, prompts: str, weigh: bool) -> Path:
    def make(folder: Path) -> None:
        model = _own(shop, task)
        batches = batches_of(pretended(shop, task, pictures, prompts), Collator(shop.tiny), BATCH_SIZE)
        collect_statistics(model, batches, progress=False, weigh_tokens=weigh)
        model.save_pretrained(folder)

    return shop.made(f"pretended/{pictures}, {prompts}{', weighed' if weigh else ''}/{task.name}", make)


def _unmeasured(
    shop: Workshop, stage: int, pictures: str, prompts: str, weigh: bool = True, own_projector: bool = True
) -> Answerer:
    adapter = partial(_pretended_to_measure, shop, pictures=pictures, prompts=prompts, weigh=weigh)
    model = merged(shop, stage, adapter=adapter, projectors="mean")
    return _with_own_projectors(shop, model) if own_projector else same(model)


def _average(shop: Workshop, stage: int) -> Answerer:
    return _with_own_projectors(shop, merged(shop, stage, method="average", projectors="mean"))


def _with_own_projectors(shop: Workshop, model: PeftModel) -> Answerer:
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        pairs = pairs_of(Path(folder))
    return lambda task: with_parts(shop.base, lora=pairs, projectors=shop.alone(task))


def _own(shop: Workshop, task: Task) -> PeftModel:
    return PeftModel.from_pretrained(shop.base(), shop.alone(task)).eval()


# --- The tables ------------------------------------------------------------------------------------------------------


def plain_merges() -> Iterator[Method]:
    """All of them."""
    yield Method("tokens weighed", PLAIN, "", partial(_weighed, router="gaussian"))
    yield Method("tokens weighed, cosine", PLAIN, "", _weighed)
    after = partial(refitted, targets="outputs", router="gaussian", weigh_tokens=True)
    yield Method("refit, tokens weighed", PLAIN, "", after)
    for weigh, how in ((False, ""), (True, ", tokens weighed")):
        after = partial(_refitted_without_data, weigh_tokens=weigh)
        yield Method(f"refit without data{how}", PLAIN, "", after)
    yield Method("average, own projector", UNMEASURED, "", _average)
    for pictures in PICTURES:
        for weigh, how in ((False, ""), (True, ", weighed")):
            after = partial(_unmeasured, pictures=pictures, prompts="own", weigh=weigh)
            yield Method(f"{pictures}, own prompts{how}", UNMEASURED, "", after)
    after = partial(_unmeasured, pictures="plain pictures", prompts="base")
    yield Method("plain pictures, the base's prompts, weighed", UNMEASURED, "", after)
    after = partial(_unmeasured, pictures="other tasks' pictures", prompts="own", own_projector=False)
    yield Method("other tasks' pictures, own prompts, weighed, mean projector", UNMEASURED, "", after)
