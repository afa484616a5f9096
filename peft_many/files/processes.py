"""The processes of a distributed run, as Accelerate sees them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from .atomic import new_folder

T = TypeVar("T")


class ProcessFailedError(RuntimeError):
    """Another process of a distributed run failed; the message says which and how."""


def current_processes() -> PartialState | None:
    """Accelerate's state if several processes run, `None` if this one is alone.

    Alone, nothing is initialised: Accelerate's state is made once, and making it here would choose the device for it.
    """
    started = torch.distributed.is_available() and torch.distributed.is_initialized()
    if not started and int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return None
    state = PartialState()
    return state if state.num_processes > 1 else None


def from_every_process(value: Any) -> list[Any]:
    """The values that all processes pass, in their order; everyone must call it. Alone, one's own."""
    return [value] if current_processes() is None else list(gather_object([value]))


def together(step: Callable[[], T]) -> T:
    """Do a step in every process; if it fails in one, it fails in the others too, by `ProcessFailedError`.

    Otherwise these would wait for the failed one until they time out. Alone, simply do it.
    """
    if current_processes() is None:
        return step()
    error: Exception | None = None
    try:
        result = step()
    except Exception as failure:
        error = failure
    found = from_every_process(None if error is None else f"{type(error).__name__}: {error}")
    if error is not None:
        raise error
    for process, message in enumerate(found):
        if message is not None:
            raise ProcessFailedError(f"Process {process} failed: {message}")
    return result


def in_first(step: Callable[[], T]) -> T:
    """Do a step in the first process only; its result, or its failure, is everyone's. Alone, simply do it."""
    state = current_processes()
    mine = together(lambda: step() if state is None or state.is_main_process else None)
    result: T = from_every_process(mine)[0]
    return result


def share(steps: Sequence[T], cost: Callable[[T], float]) -> list[T]:
    """This process's share of the steps; everyone's costs about the same. Alone, all."""
    state = current_processes()
    if state is None:
        return list(steps)
    loads, mine = [0.0] * state.num_processes, []
    for step in sorted(steps, key=cost, reverse=True):
        idlest = loads.index(min(loads))
        loads[idlest] += cost(step)
        if idlest == state.process_index:
            mine.append(step)
    return mine


@contextlib.contextmanager
def shared_folder(path: Path, replaced: Collection[str] = ()) -> Iterator[Path]:
    """As [`new_folder`], one for all processes. They must all enter and leave, and fail only [`together`] inside."""
    with contextlib.ExitStack() as stack:
        yield in_first(lambda: stack.enter_context(new_folder(path, replaced)))
        in_first(stack.close)
