"""What is said of a running stage: how far it is, and how long it will take."""

from __future__ import annotations

import pytest
from coldpress.flows.terminal import Pace, fitting


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """`clock[0]` is the time in seconds."""
    now = [0.0]
    monkeypatch.setattr("coldpress.flows.terminal.time.monotonic", lambda: now[0])
    return now


def test_the_time_left_is_told_from_the_steps_done(clock: list[float]) -> None:
    pace = Pace()
    assert pace.describe("training, loss 3.210", 1, 301) == "training, loss 3.210 1/301"
    clock[0] = 20.0
    assert pace.describe("training, loss 2.900", 11, 301) == "training, loss 2.900 11/301, 10 min left"
    clock[0] = 600.0
    assert pace.describe("training, loss 2.500", 301, 301) == "training, loss 2.500 301/301"


def test_each_activity_of_a_stage_has_its_own_pace(clock: list[float]) -> None:
    pace = Pace()
    for block in range(1, 31):
        clock[0] += 0.1
        pace.describe("loading", block, 30)
    clock[0] += 50.0
    assert pace.describe("training, loss 3.000", 31, 131) == "training, loss 3.000 31/131"  # resumed
    clock[0] += 50.0
    assert pace.describe("training, loss 2.900", 32, 131) == "training, loss 2.900 32/131, 82 min left"


def test_a_narrow_terminal_leaves_columns_that_may_go_to_the_report() -> None:
    widths, optional = [7, 10, 20, 5], [False, True, True, False]
    assert fitting(widths, optional, 120) == [0, 1, 2, 3]
    assert fitting(widths, optional, 1 + 10 + 13 + 8) == [0, 1, 3]
    assert fitting(widths, optional, 1 + 10 + 13 + 7) == [0, 3]
    assert fitting([7, 20, 10, 5], optional, 1 + 10 + 13 + 8) == [0, 2, 3]  # a later one may fit
    assert fitting(widths, optional, 5) == [0, 3]
