"""Three things at once with one item after another: the next ones are read and the last ones written meanwhile."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Read = TypeVar("Read")
Made = TypeVar("Made")


def overlapped(
    items: Sequence[Item],
    read: Callable[[Item], Read],
    work: Callable[[Read], Made],
    write: Callable[[Made], None],
    ahead: int,
) -> Generator[Item, None, None]:
    """`write(work(read(item)))` for each item, in order; gives each item when it is worked on.

    `read` has a thread of its own, `write` another, and `work` is done by the caller's. At most `ahead` items are
    read, or being read, before their turn, and at most `ahead` wait to be written, or are being written: with the one
    that is worked on, `2 · ahead + 1` at a time. With `ahead` 0 there are no threads.

    What goes wrong in a thread is raised here, as it is, at the latest when all is done. Nothing is begun after that,
    nor after Ctrl-C; what was begun is waited for, so that no thread goes on.
    """
    if ahead == 0:
        for item in items:
            write(work(read(item)))
            yield item
        return
    coming: deque[Future[Read]] = deque()
    going: deque[Future[None]] = deque()
    reader, writer = (ThreadPoolExecutor(1, f"peft_many {what}") for what in ("reads", "writes"))
    try:
        coming.extend(reader.submit(read, item) for item in items[:ahead])
        for place, item in enumerate(items):
            inputs = coming.popleft().result()
            coming.extend(reader.submit(read, later) for later in items[place + ahead : place + ahead + 1])
            made = work(inputs)
            del inputs  # the memory of a group
            if len(going) == ahead:
                going.popleft().result()
            going.append(writer.submit(write, made))
            del made
            yield item
        for written in going:
            written.result()
    finally:
        for executor in (reader, writer):
            executor.shutdown(cancel_futures=True)
