"""The processes of a distributed run, and what they do together."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from peft.utils import PeftWarning

from .upstream import default_store

T = TypeVar("T")

WARN_AFTER = 60.0  # seconds of waiting for other processes


class ProcessFailedError(RuntimeError):
    """Another process of a distributed run failed; the message says which and how."""


@dataclass(frozen=True)
class Processes:
    """The processes that do something together: all of a distributed run ([`all_processes`]), or this one alone.

    All of them must call the same methods in the same order, and none inside a step of another. If a step fails in
    one process, it fails in the others too, by `ProcessFailedError`: they would wait for the failed one otherwise.
    """

    count: int = 1
    index: int = 0

    def every(self, step: Callable[[], T]) -> list[T]:
        """Do a step in every process; what it gave in each, in their order."""
        if self.count == 1:
            return [step()]
        error: Exception | None = None
        result: T | None = None
        try:
            result = step()
        except Exception as failure:
            error = failure
        found = self._gather((None if error is None else f"{type(error).__name__}: {error}", result))
        if error is not None:
            raise error
        for process, (message, _) in enumerate(found):
            if message is not None:
                raise ProcessFailedError(f"Process {process} failed: {message}")
        return [given for _, given in found]

    def together(self, step: Callable[[], T]) -> T:
        """Do a step in every process; what it gave in this one."""
        mine: list[T] = []
        self.every(lambda: mine.append(step()))
        return mine[0]

    def in_one(self, step: Callable[[], T], index: int = 0) -> T:
        """Do a step in one process only; what it gave there."""
        result: T = self.every(lambda: step() if self.index == index else None)[index]  # type: ignore[assignment]
        return result

    def share(self, steps: Sequence[T], cost: Callable[[T], float]) -> list[T]:
        """This process's share of the steps; everyone's costs about the same. Alone, all in their order."""
        if self.count == 1:
            return list(steps)
        loads, mine = [0.0] * self.count, []
        for step in sorted(steps, key=cost, reverse=True):
            idlest = loads.index(min(loads))
            loads[idlest] += cost(step)
            if idlest == self.index:
                mine.append(step)
        return mine

    def _gather(self, value: Any) -> list[Any]:
        found = [None] * self.count
        torch.distributed.all_gather_object(found, value)
        return found


ALONE = Processes()


def several_run() -> bool:
    """Whether this process is one of several, whether or not they are connected yet."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_world_size() > 1
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def all_processes(call: str) -> Processes:
    """All processes of a distributed run, once each of them has made this `call`; this one if there is no other.

    Raises:
        TimeoutError: Others did not make it within half the process group's timeout, so that this is said before what
            else they may wait in breaks off. A gather without them would block, or mix with what they exchange.
    """
    if not several_run():
        return ALONE
    if not torch.distributed.is_initialized():
        PartialState()  # which connects them, as an `Accelerator` does
    if not torch.distributed.is_initialized():
        return ALONE
    everyone = Processes(torch.distributed.get_world_size(), torch.distributed.get_rank())
    _wait_for_all(everyone, call)
    return everyone


def _wait_for_all(everyone: Processes, call: str) -> None:
    """Wait until every process has made a call as often as this one; how often, each counts in the group's store."""
    store, mine = default_store(), f"peft_many/{call}/{everyone.index}"
    limit, times = store.timeout.total_seconds() / 2, store.add(mine, 1)
    start, pause, warned = time.monotonic(), 0.001, False
    absent = list(range(everyone.count))
    try:
        while absent := [process for process in absent if store.add(f"peft_many/{call}/{process}", 0) < times]:
            waited = time.monotonic() - start
            others = f"{', '.join(map(str, absent))} of {everyone.count}"
            if waited > limit:
                raise TimeoutError(
                    f"Process {everyone.index} called `{call}` across processes, but process {others} did not within "
                    f"{limit:.0f} seconds, half the process group's timeout. Either all processes make this call, or "
                    "those that do pass `across_processes=False`."
                )
            if waited > WARN_AFTER and not warned:
                warned = True
                warnings.warn(
                    f"`{call}` in process {everyone.index} is waiting for process {others} to make the same call. If "
                    "they never will, pass `across_processes=False`.",
                    PeftWarning,
                    stacklevel=4,
                )
            time.sleep(pause)
            pause = min(2 * pause, 0.5)
    except BaseException:
        store.add(mine, -1)  # as if it had not called
        raise
