"""Adapters trained and methods asked at the same time: a small model leaves most of a GPU idle."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from dataclasses import replace
from multiprocessing import get_context

import torch
from transformers.utils import logging

from .comparing import chosen, compare
from .run import Bench, Settings


def at_the_same_time(settings: Settings, names: Sequence[str] | None, count: int) -> None:
    """What [`Bench.train`] and [`compare`] do, in processes that share the device.

    Methods that train for long begin first, merges when all adapters are there.

    Args:
        settings ([`Settings`]): Of a run that is prepared.
        names (`Sequence[str]`, *optional*): Of the methods.
        count (`int`): How many processes.
    """
    methods, tasks = chosen(names), [task.name for task in Bench(settings).tasks()]
    threads = max(1, (os.cpu_count() or 1) // count)
    spawn = get_context("spawn")  # CUDA does not survive a fork
    with ProcessPoolExecutor(count, spawn, initializer=_begin, initargs=(threads,)) as pool:
        trained = [pool.submit(_method, settings, method.name) for method in methods if method.trains]
        _finish([pool.submit(_adapter, settings, task) for task in tasks])
        merged = [pool.submit(_method, settings, method.name) for method in methods if not method.trains]
        _finish([*trained, *merged])


def _begin(threads: int) -> None:
    torch.set_num_threads(threads)
    logging.disable_progress_bar()


def _finish(futures: Sequence[Future[None]]) -> None:
    """All of them, before one that failed says so."""
    wait(futures)
    for future in futures:
        future.result()


def _adapter(settings: Settings, task: str) -> None:
    Bench(replace(settings, tasks=[task])).train()


def _method(settings: Settings, name: str) -> None:
    compare(Bench(settings), [name])
