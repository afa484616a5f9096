"""Two processes of a distributed run, forked off the test: nothing is imported anew, so that each case is quick."""

from __future__ import annotations

import datetime
import multiprocessing
import os
import socket
import time
from collections.abc import Callable
from typing import Any

import torch
from accelerate.state import AcceleratorState

STUCK = "stuck"


def in_two_processes(work: Callable[[int], Any], timeout: float = 60.0, limit: float = 150.0) -> list[Any]:
    """What `work(rank)` gave in each of two processes connected by gloo: a result, its error as `(class, message)`, or
    `STUCK` after `limit` seconds. `timeout` is the process group's, in seconds."""
    context = multiprocessing.get_context("fork")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pipes = [context.Pipe(duplex=False) for _ in range(2)]
    both = [
        context.Process(target=_run, args=(work, rank, port, timeout, pipes[rank][1]), daemon=True)
        for rank in range(2)
    ]
    for process in both:
        process.start()
    deadline, found = time.monotonic() + limit, []
    for process, (reading, writing) in zip(both, pipes):
        writing.close()
        try:
            found.append(reading.recv() if reading.poll(max(0, deadline - time.monotonic())) else STUCK)
        except EOFError:
            found.append(("died", f"{process.exitcode}"))
        reading.close()
    for process in both:
        process.join(5)
        process.kill()
        process.join()
    return found


def _run(work: Callable[[int], Any], rank: int, port: int, timeout: float, pipe: Any) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)  # of the test's own process
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in place.items()} | {"ACCELERATE_USE_CPU": "true"}
    torch.distributed.init_process_group("gloo", timeout=datetime.timedelta(seconds=timeout))
    try:
        given = work(rank)
    except BaseException as error:  # which pytest's are
        given = (type(error).__name__, str(error))
    pipe.send(given)
    pipe.close()
    torch.distributed.destroy_process_group()
