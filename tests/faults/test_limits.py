"""A run with a deadline or a budget ends by itself, or is killed before it could: what it did and used is kept."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from coldpress.storage.inspect import verify
from coldpress.storage.store import Store
from runs import committed, finish, kill_all, start, states, wait_for

STORE = "limited"


def slowly(recipe: Path, server: str, *options: str, pause: float = 0.5) -> subprocess.Popen[str]:
    """A run whose stages take so many seconds a block."""
    watched = {"PYTHONPATH": str(Path(__file__).with_name("watched")), "WATCHED": str(recipe.parent)}
    return start(recipe, STORE, *options, **watched, WATCHED_PAUSE=str(pause), PREFECT_API_URL=server)


def end(process: subprocess.Popen[str]) -> tuple[int, dict[str, Any], str]:
    """(exit status, document, what it said)."""
    output, said = process.communicate(timeout=300)
    return process.returncode, json.loads(output), said


def test_at_its_deadline_a_run_stops_in_the_middle_of_a_stage_and_is_not_taken_for_pre_empted(
    recipe: Path, server: str
) -> None:
    status, document, said = end(slowly(recipe, server, "--deadline", "6s"))
    assert status == 1
    assert "its deadline has come: all finished work is kept" in said
    assert "pre-empted" in states(document).values()
    after = finish(start(recipe, STORE, PREFECT_API_URL=server))
    assert set(states(after).values()) <= {"cached", "resumed", "computed"}
    assert verify(Store(str(recipe.parent / STORE))) == []


@pytest.mark.long
def test_a_killed_run_has_used_what_it_had_recorded_of_its_budget(recipe: Path, server: str) -> None:
    running, folder = slowly(recipe, server, "--budget", "1h", pause=1.5), recipe.parent / STORE
    wait_for(running, lambda: bool(list(folder.glob("spent/*/*"))))
    kill_all(running)
    done = committed(str(folder), "pruned") + committed(str(folder), "gptq")
    assert done >= 1
    status, document, said = end(slowly(recipe, server, "--budget", "5s"))
    assert status == 1
    assert "the budget is used up" in said
    assert document["device_seconds"]["used"] > 5
    assert "computed" not in states(document).values()
    finish(start(recipe, STORE, "--budget", "1h", PREFECT_API_URL=server))
    assert list(folder.glob("spent/*/*")) == []
