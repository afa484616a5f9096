"""The processes of a distributed run, as Accelerate sees them."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import gather_object

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
    """Do a step in every process; if it fails in one, it fails in all. Alone, simply do it.

    Raises:
        ProcessFailedError: It failed in another process; in that one, its own error.
    """
    if current_processes() is None:
        return step()
    error: Exception | None = None
    try:
        result = step()
    except Exception as failure:
        error = failure
    fail_together(error)
    return result


def fail_together(error: BaseException | None) -> None:
    """Raise if any process failed: its own error in that one, and one that names it in the others.

    Otherwise the others would wait for the failed one until they time out.
    """
    found = from_every_process(None if error is None else f"{type(error).__name__}: {error}")
    if error is not None:
        raise error
    for process, message in enumerate(found):
        if message is not None:
            raise ProcessFailedError(f"Process {process} failed: {message}")
