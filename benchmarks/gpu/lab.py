"""What several steps work on, made when it is first needed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from peft_many import merge_adapter_sequence

from .meters import Meter
from .model import Batch, batch, build, copied, mixed_batch, save_adapter
from .sizes import CHECKED, Sizes

CPU, FLOAT = torch.device("cpu"), torch.float32
CHECKED_TASKS, CHECKED_R, STRENGTH = 3, 8, 0.1
# How far a result may be off, relative to the CPU's in float32, in a model of this dtype.
TOLERANCES = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}
# Merges to check, by name.
MERGES: dict[str, dict[str, Any]] = {
    "plain": {},
    "gated": {"gate_lora": True},
    "gated by distances": {"gate_lora": True, "router": "gaussian"},
}


def in_full_precision() -> None:
    """Compute float32 convolutions, as the vision tower's, without TF32: it is off by more than the checks allow."""
    torch.backends.cudnn.allow_tf32 = False


def short(dtype: torch.dtype) -> str:
    """`float32` of `torch.float32`."""
    return str(dtype).removeprefix("torch.")


@dataclass
class Checked:
    """Small models and adapters, the same everywhere: made on the CPU in float32, which says what is right."""

    device: torch.device
    scratch: Path

    def base(self, device: torch.device | None = None, dtype: torch.dtype = FLOAT, **options: Any) -> nn.Module:
        """A fresh copy of the base model; on the device that is checked, if no other is named."""
        return copied(self._original, build(CHECKED, device or self.device, dtype, **options))

    @cached_property
    def _original(self) -> nn.Module:
        return build(CHECKED, CPU, torch.float32)

    def batches(self, task: int, device: torch.device | None = None, dtype: torch.dtype = FLOAT) -> list[Batch]:
        """Two batches of a task."""
        return [batch(CHECKED, device or self.device, dtype, task, seed) for seed in range(2)]

    @cached_property
    def folders(self) -> list[Path]:
        """An adapter for each task."""
        found = [self.scratch / "checked" / f"task_{task}" for task in range(CHECKED_TASKS)]
        for task, folder in enumerate(found):
            save_adapter(self.base(CPU), folder, task, self.batches(task, CPU), CHECKED_R, STRENGTH)
        return found

    def merged(self, merge: str, base: nn.Module, device: torch.device | None = None) -> PeftModel:
        """One of the merges, on a base model."""
        device = self.device if device is None else device
        return merge_adapter_sequence(base, self.folders, device=device, progress=False, **MERGES[merge])

    def mixed(self, device: torch.device | None = None, dtype: torch.dtype = FLOAT) -> Batch:
        """A batch with images of all tasks."""
        return mixed_batch(CHECKED, device or self.device, dtype, CHECKED_TASKS)

    @cached_property
    def expected(self) -> dict[str, Tensor]:
        """By merge, the logits of the mixed batch."""
        return {name: logits(self.merged(name, self.base(CPU), CPU), self.mixed(CPU)) for name in MERGES}


@dataclass
class Lab:
    """The device, a folder for files, sizes, and the model of the costs, which is large and there once.

    Args:
        meter (`Meter`): Measures on the device.
        sizes (`Sizes`): Of what costs are measured on.
        scratch (`Path`): A folder with space for files.
    """

    meter: Meter
    sizes: Sizes
    scratch: Path
    _base: nn.Module | None = None

    @property
    def device(self) -> torch.device:
        """That everything is measured and checked on."""
        return self.meter.device

    @cached_property
    def checked(self) -> Checked:
        """The small models of the checks."""
        return Checked(self.device, self.scratch)

    @property
    def adapters(self) -> list[Path]:
        """Folders of the costs' adapters, whether or not they have been made."""
        return [self.scratch / f"task_{task}" for task in range(self.sizes.tasks)]

    def batch(self, task: int, seed: int = 0) -> Batch:
        """One for the model of the costs."""
        return batch(self.sizes.model, self.device, self.sizes.dtype, task, seed)

    @contextmanager
    def base(self) -> Iterator[nn.Module]:
        """The base model of the costs, to be given back without adapters; after a failure it is made anew."""
        model = build(self.sizes.model, self.device, self.sizes.dtype) if self._base is None else self._base
        self._base = None
        yield model
        self._base = model

    @contextmanager
    def with_adapter(self, folder: Path) -> Iterator[PeftModel]:
        """The model of the costs with an adapter from its folder."""
        with self.base() as base:
            model = PeftModel.from_pretrained(base, folder).eval()
            yield model
            model.unload()


def logits(model: nn.Module, given: Batch) -> Tensor:
    """Those of the tokens that are no padding, `(tokens, words)`, float32 on the CPU."""
    with torch.no_grad():
        found = model(**given).logits
    return found[given["attention_mask"].bool()].float().cpu()


def covariances(statistics: Any) -> dict[str, Tensor]:
    """What was measured of one task: by layer `C`, and by projector the mean of its images' features."""
    (task,) = statistics.tasks
    of_layers = {layer: task.inputs[key].covariance.dense() for layer, key in task.input_of.items()}
    return of_layers | {name: seen.prototype for name, seen in task.projectors.items()}
