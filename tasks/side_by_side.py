"""Work on several threads, of which the calling one is one."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")


def side_by_side(
    work: Callable[[Item], None], items: Iterable[Item], threads: int, prepare: Callable[[], None] = lambda: None
) -> None:
    """`work(item)` for all items, begun in their order on so many threads, each of which calls `prepare` before.

    After an error no further item is begun; it is raised when what was begun has ended. The calling thread takes part:
    threads that it wakes before it goes to sleep itself are often put onto one and the same core by Linux.
    """
    waiting = deque(items)

    def do() -> None:
        try:
            prepare()
            while True:
                try:
                    item = waiting.popleft()
                except IndexError:
                    return
                work(item)
        except BaseException:
            waiting.clear()
            raise

    helpers = min(threads, len(waiting)) - 1
    with ThreadPoolExecutor(max(1, helpers), thread_name_prefix="side-by-side") as pool:
        others = [pool.submit(do) for _ in range(helpers)]
        do()
        for other in others:
            other.result()
