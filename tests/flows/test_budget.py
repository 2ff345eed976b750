"""A budget of device time: what counts, what survives, and how a run that has used it up ends and goes on."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner
from coldpress.flows import budget as budgets
from coldpress.flows.budget import Budget, account_of, in_words
from coldpress.flows.cli import main
from coldpress.flows.recipe import load_recipe
from coldpress.flows.run import run_recipe
from coldpress.flows.terminal import Terminal
from coldpress.storage.inspect import verify
from coldpress.storage.store import Store
from coldpress.tasks.stage import Preempted


class Clock:
    """Goes when it is told."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def attempt(store: Store, clock: Clock) -> Callable[..., Budget]:
    """`attempt("r1-1", allowed=100)`: an attempt at one recipe."""
    return lambda name, allowed=100.0, account="a": Budget(store, account, name, allowed, clock)


def spend(budget: Budget, clock: Clock, seconds: float) -> None:
    with budget.watched(lambda: None), budget.metered():
        clock.now += seconds


def test_two_stages_at_once_use_two_seconds_a_second_and_pauses_none(
    attempt: Callable[..., Budget], clock: Clock
) -> None:
    budget = attempt("r1-1")
    with budget.metered():
        clock.now += 10
        with budget.metered():
            clock.now += 5
    clock.now += 1000
    assert budget.used == 20


def test_all_attempts_at_a_recipe_count_until_one_has_finished(attempt: Callable[..., Budget], clock: Clock) -> None:
    spend(attempt("r1-1"), clock, 10)
    spend(attempt("r1-2"), clock, 20)
    last = attempt("r2-1")
    assert last.used == 30
    assert attempt("r3-1", account="another").used == 0
    last.close()
    assert attempt("r3-1").used == 0


def test_what_was_used_is_recorded_while_a_stage_computes(
    attempt: Callable[..., Budget], clock: Clock, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that `kill -9` loses little."""
    monkeypatch.setattr(budgets, "SECONDS_BETWEEN_LOOKS", 0.01)
    running = attempt("r1-1", allowed=1e6)
    with running.watched(lambda: None), running.metered():
        clock.now += 3600
        deadline = time.monotonic() + 20
        while attempt("r1-2").used == 0:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert attempt("r1-2").used == 3600
        assert verify(store) == []


def test_a_used_up_budget_is_told_once_and_lets_no_stage_begin(
    attempt: Callable[..., Budget], clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(budgets, "SECONDS_BETWEEN_LOOKS", 0.01)
    told: list[float] = []
    budget = attempt("r1-1", allowed=60)
    with budget.watched(lambda: told.append(clock.now)):
        with budget.metered():
            clock.now += 59
            time.sleep(0.05)
            assert told == []
            clock.now += 1
            deadline = time.monotonic() + 20
            while not told:
                assert time.monotonic() < deadline
                time.sleep(0.01)
        for _ in range(2):
            with pytest.raises(Preempted, match=r"60 s of device time, and 60 s are allowed; .* a larger --budget"):
                budget.metered().__enter__()
    assert told == [60]


def test_what_others_use_at_the_same_time_comes_off_too(
    attempt: Callable[..., Budget], clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(budgets, "SECONDS_BETWEEN_LOOKS", 0.01)
    over = threading.Event()
    here, there = attempt("r1-1", allowed=200), attempt("r2-1", allowed=200)
    with here.watched(over.set):
        spend(there, clock, 120)
        with here.metered():
            clock.now += 79
            assert not over.wait(0.2)
            clock.now += 1
            assert over.wait(20)
            assert here.used == 200


def test_equal_recipes_share_an_account_and_changed_ones_do_not(tiny_recipe: Path) -> None:
    here = account_of(load_recipe(str(tiny_recipe)))
    tiny_recipe.write_text(f"# a remark\n{tiny_recipe.read_text()}")
    assert account_of(load_recipe(str(tiny_recipe))) == here
    assert account_of(load_recipe(str(tiny_recipe), ("stages.pruned.sparsity=0.6",))) != here
    assert account_of(load_recipe(str(tiny_recipe)).only(("pruned",))) != here


def test_a_run_without_budget_left_computes_what_needs_no_device_and_goes_on_with_a_larger_one(
    prefect_server: None, tiny_recipe: Path, quiet_terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterName

    monkeypatch.setattr("coldpress.flows.run.server_configured", lambda: True)
    memory, recipe = Store("memory://budget"), load_recipe(str(tiny_recipe))
    clock = Clock()
    spend(Budget(memory, account_of(recipe), "before-1", 100.0, clock), clock, 5.0)

    stopped = run_recipe(recipe, memory, quiet_terminal, device="cpu", budget=5.0)
    assert stopped.stages["base"].state == "computed"
    assert stopped.stages["pruned"].state == "pre-empted"
    assert stopped.to_json()["device_seconds"] == {"used": 5.0, "allowed": 5.0}
    with get_client(sync_client=True) as client:
        named = FlowRunFilter(name=FlowRunFilterName(any_=[stopped.run]))
        (flow_run,) = client.read_flow_runs(flow_run_filter=named)
    assert flow_run.state is not None
    assert flow_run.state.name == "Cancelled"  # which no automation starts again
    assert "a larger --budget goes on from there" in str(flow_run.state.message)

    finished = run_recipe(recipe, memory, quiet_terminal, device="cpu", budget=3600.0)
    assert finished.unfinished == []
    assert finished.device_seconds is not None
    assert finished.device_seconds["used"] > 5
    assert list(memory.files.list("spent")) == []
    assert run_recipe(recipe, memory, quiet_terminal, device="cpu", budget=1e-6).unfinished == []  # all is cached


def test_a_budget_has_a_unit(tiny_recipe: Path) -> None:
    ended = CliRunner().invoke(main, ["run", str(tiny_recipe), "--budget", "12"])
    assert ended.exit_code == 2
    assert "write it as 90s, 30m, 2h or 1d" in ended.output


@pytest.mark.parametrize(("seconds", "text"), [(4.3, "4.3 s"), (600, "10 min"), (43200, "12 h"), (86400.5, "24 h")])
def test_durations_in_words(seconds: float, text: str) -> None:
    assert in_words(seconds) == text
