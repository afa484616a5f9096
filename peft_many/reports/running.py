"""A merge on its base model, to be asked: as it is, each of its tasks alone, and the base model."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from peft.utils import PeftWarning
from torch import Tensor
from tqdm.auto import tqdm

from ..data.batches import ChatCollator, batches, for_model
from ..data.conversations import Example
from ..files.errors import UnmergeableAdapterError
from ..files.source import AdapterSource, read_config
from ..hub.base_model import BaseModel
from ..hub.loading import put_on
from ..hub.sources import HubArguments
from ..merging.merge import merge_adapter_files
from ..records import MergeRecord, merge_of
from ..statistics.forward import state_kept
from ..tuner.projector import ProjectorMixture

MERGE, ADAPTER, BASE = "merge", "adapter", "base model"
_ALONE = "task_alone"  # the adapter's name while one task's is on the model


class RunningMerge:
    """A merge, or the adapter of one task, on its base model.

    Args:
        source ([`AdapterSource`]): Where the merge is.
        model ([`~peft.PeftModel`]): The base model with the merge.
        collator ([`ChatCollator`]): Makes batches of conversations for it.
    """

    def __init__(self, source: AdapterSource, model: PeftModel, collator: ChatCollator) -> None:
        self.source, self.model, self.collator = source, model.eval(), collator
        self.merge: MergeRecord | None = merge_of(model.peft_config["default"])

    @classmethod
    def load(
        cls,
        source: AdapterSource,
        examples: Sequence[Example],
        *,
        base_model: Any = None,
        processor: Any = None,
        system: str | None = None,
        device: str | torch.device | None = None,
        model_options: Mapping[str, Any] | None = None,
        hub: HubArguments,
    ) -> RunningMerge:
        """Load an adapter's base model and processor, and put the adapter on it, if it can be asked the examples."""
        base = BaseModel.of(base_model, read_config(source), hub)
        collator = ChatCollator(base.load_processor() if processor is None else processor, system)
        collator.check(examples)
        return cls(source, put_on(base.load_on(device, **(model_options or {})), source), collator)

    @property
    def tasks(self) -> list[str]:
        """The names of the merge's tasks."""
        return [] if self.merge is None else self.merge.names

    def taken_out(self, task: str, folder: Path) -> Path:
        """Write a single task's adapter, as it was before it was merged: what is left when all others are forgotten.

        Raises:
            UnmergeableAdapterError: The merge does not hold it whole: it has the mean of several projectors, say.
        """
        others = [name for name in self.tasks if name != task]
        # The average of one is that one; it needs no statistics.
        options: dict[str, Any] = {"method": "average", "gate_lora": False, "weights": {task: 1.0}, "progress": False}
        return merge_adapter_files([self.source.folder], folder, without=others, **options)

    @contextmanager
    def alone(self, folder: Path) -> Iterator[None]:
        """Let an adapter that was taken out stand on the base model by itself while the block runs."""
        active = self.model.active_adapter
        self.model.load_adapter(str(folder), adapter_name=_ALONE)
        try:
            for module in self.model.modules():
                if isinstance(module, ProjectorMixture) and len(module.trained) == 1:
                    module.abstain_above = None  # there is nothing to choose from
            self.model.set_adapter(_ALONE)
            yield
        finally:
            self.model.set_adapter(active)
            self.model.delete_adapter(_ALONE)

    def contexts(self, tasks: Sequence[str], base: bool = True) -> Iterator[tuple[str, Any]]:
        """By name what there is to be asked: the merge, the base model, and these tasks alone, if they can be."""
        yield MERGE if self.merge is not None else ADAPTER, nullcontext()
        if base:
            yield BASE, self.model.disable_adapter()
        for task in tasks:
            with tempfile.TemporaryDirectory() as place:
                try:
                    folder = self.taken_out(task, Path(place, "alone"))
                except UnmergeableAdapterError as error:
                    warnings.warn(f"'{task}' cannot be asked alone: {error}", PeftWarning, stacklevel=3)
                    continue
                yield alone_name(task), self.alone(folder)


class Said(NamedTuple):
    """What a model said, and whether it ended by itself; if not, there were as many tokens as it may say."""

    text: str
    ended: bool


def answers_of(
    model: PeftModel,
    collator: ChatCollator,
    examples: Sequence[Example],
    batch_size: int = 8,
    max_new_tokens: int = 64,
    label: str | None = None,
) -> list[Said]:
    """What the model as it stands says to each example, greedily; with a progress bar if that has a `label`."""
    said: list[Said] = []
    options = {"max_new_tokens": max_new_tokens, "do_sample": False, "num_beams": 1}
    ends = model.generation_config.eos_token_id
    ends = torch.tensor([] if ends is None else ends, dtype=torch.long, device=model.device)
    bar = tqdm(total=len(examples), desc=label, unit="question", disable=label is None)
    with bar, state_kept(model), torch.inference_mode():
        model.eval()
        for batch in batches(examples, collator.questions, batch_size):
            inputs = for_model(batch, model)
            tokens = model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]
            ended = torch.isin(tokens, ends).any(1) | (tokens.shape[1] < max_new_tokens)
            texts = collator.tokenizer.batch_decode(tokens, skip_special_tokens=True)
            said += [Said(text.strip(), *whether) for text, *whether in zip(texts, ended.tolist())]
            bar.update(len(tokens))
    return said


def inputs_of(model: PeftModel, collator: ChatCollator, example: Example) -> dict[str, Tensor]:
    """A question as the model takes it."""
    (batch,) = batches([example], collator.questions, 1)
    return for_model(batch, model)


def alone_name(task: str) -> str:
    """What a task's adapter is called among those that answer."""
    return f"{task} alone"
