"""Files that are planned: tensors known by dtype and shape, and read when they are written, some before the rest."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .tensor_file import TensorFile, TensorFileWriter, lay_out, set_metadata


@dataclass(frozen=True)
class Planned:
    """A tensor that is read when it is asked for."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * torch.Size(self.shape).numel()

    @classmethod
    def of(cls, tensor: Tensor) -> Planned:
        """One that is there already, or mapped."""
        return cls(tensor.dtype, tuple(tensor.shape), lambda: tensor)


class PlannedTensors(Mapping[str, Tensor]):
    """Tensors by name that are read each time they are asked for, so that no two of them need be in memory."""

    def __init__(self, plans: Mapping[str, Planned]) -> None:
        self.plans = plans

    def __getitem__(self, name: str) -> Tensor:
        return self.plans[name].read()

    def __iter__(self) -> Iterator[str]:
        return iter(self.plans)

    def __len__(self) -> int:
        return len(self.plans)


def plans_of(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Planned]]:
    """The tensors of any mapping as planned ones, those of [`PlannedTensors`] without reading them."""
    if isinstance(tensors, PlannedTensors):
        yield from tensors.plans.items()
    else:
        yield from ((name, Planned.of(tensor)) for name, tensor in tensors.items())


@dataclass(frozen=True)
class TensorPlan:
    """What is to be in a safetensors file: its metadata, and tensors by key in the parts in which they are written."""

    metadata: Mapping[str, str]
    widest: Mapping[str, str]  # metadata that take more room, so that all of this shape could take these's place
    parts: Sequence[Mapping[str, Planned]]

    @property
    def announced(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        return {key: (plan.dtype, plan.shape) for part in self.parts for key, plan in part.items()}

    def lay_out(self, path: Path) -> None:
        lay_out(path, self.announced, self.widest)
        set_metadata(path, self.metadata)

    def write(
        self, path: Path, sources: Collection[TensorFile] = (), wanted: Callable[[str], bool] = lambda key: True
    ) -> None:
        """Write the tensors with a wanted key into a file that was laid out.

        After each part the memory of `sources` is given back, the files that tensors are mapped from.
        """
        with TensorFileWriter(path) as writer:
            for part in self.parts:
                for key, plan in part.items():
                    if wanted(key):
                        writer.write(key, plan.read())
                for source in sources:
                    source.release()


@contextlib.contextmanager
def written_meanwhile(
    plan: TensorPlan, path: Path, sources: Collection[TensorFile], early: Callable[[str], bool]
) -> Iterator[Callable[[TensorPlan], None]]:
    """Write the early tensors of a plan in a thread while the block runs, which gets what completes the file.

    That is told the final plan, whose metadata take the place of the first ones. If the tensors are others after all,
    the file is written anew. It must lie where an error removes it.
    """
    stopped = threading.Event()

    def wanted(key: str) -> bool:
        return early(key) and not stopped.is_set()

    plan.lay_out(path)
    with ThreadPoolExecutor(1, "peft_many copies") as executor:
        copying = executor.submit(plan.write, path, sources, wanted)

        def complete(final: TensorPlan) -> None:
            copying.result()
            as_planned = (final.announced, final.widest) == (plan.announced, plan.widest)
            if as_planned:
                set_metadata(path, final.metadata)
            else:
                final.lay_out(path)
            final.write(path, sources, lambda key: not (as_planned and early(key)))

        try:
            yield complete
        finally:
            stopped.set()
