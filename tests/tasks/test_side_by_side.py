"""The helper that spreads work over threads."""

from __future__ import annotations

import threading
import time

import pytest
from coldpress.tasks.side_by_side import side_by_side


def test_every_item_once_and_the_caller_takes_part() -> None:
    seen: list[tuple[int, int]] = []
    prepared: list[int] = []
    both = threading.Barrier(2, timeout=60)  # neither thread can take a first item alone and go on

    def work(item: int) -> None:
        seen.append((item, threading.get_ident()))
        if item < 2:
            both.wait()

    side_by_side(work, range(9), 2, lambda: prepared.append(threading.get_ident()))
    assert sorted(item for item, _ in seen) == list(range(9))
    assert {thread for _, thread in seen} == set(prepared)
    assert threading.get_ident() in prepared
    assert len(prepared) == 2


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_after_an_error_nothing_is_begun(threads: int) -> None:
    begun = []
    failed = threading.Event()

    def work(item: int) -> None:
        begun.append(item)
        if item == 2:
            failed.set()
            raise ValueError("the third")
        if item > 2:
            failed.wait(60)
            time.sleep(0.01)

    with pytest.raises(ValueError, match="the third"):
        side_by_side(work, range(1000), threads)
    assert begun[:3] == [0, 1, 2] if threads == 1 else set(begun) >= {0, 1, 2}
    assert len(begun) < 500


def test_nothing_to_do() -> None:
    side_by_side(lambda item: None, [], 3)
