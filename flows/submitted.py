"""The flow that a Prefect worker starts for `coldpress submit`: one flow run, however often its process dies.

A recipe travels as text. Each attempt runs it from the beginning, finds in the store what earlier attempts finished
and in its journals what they had begun. How an attempt ends decides what comes next (`deployment.py`): Crashed, which
"Pre-empted" is too, is scheduled again; Completed, Failed and Cancelled stay.
"""

from __future__ import annotations

import io
import os
import signal
import socket
import threading
import time
from datetime import UTC, datetime
from typing import Any, NoReturn, cast

import httpx
import prefect
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterId,
    TaskRunFilter,
    TaskRunFilterState,
    TaskRunFilterStateType,
)
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.context import FlowRunContext
from prefect.exceptions import Abort, PrefectHTTPStatusError
from prefect.states import Cancelled, Crashed, Failed
from prefect.task_runners import TaskRunner, ThreadPoolTaskRunner
from rich.console import Console
from rich.text import Text

from ..storage.errors import ColdpressError
from ..storage.store import Store
from .deployment import FLOW, GOES_ON, MAX_ATTEMPTS
from .execution import grace_seconds
from .prefect_server import ServerAway
from .provenance import Dashboard, show_report
from .recipe import parse_recipe
from .result import end_state
from .run import Attempt, run_recipe
from .slots import check_devices
from .terminal import Terminal

_SECONDS_TO_REPORT = 15.0


def worker_slots() -> tuple[tuple[str, ...], int]:
    """(devices, slots) of the machine that this run came to: $COLDPRESS_DEVICES and $COLDPRESS_SLOTS."""
    slots = os.environ.get("COLDPRESS_SLOTS") or None
    if slots is not None and (not slots.isdecimal() or int(slots) < 1):
        raise ColdpressError(f"COLDPRESS_SLOTS is {slots!r}; write a number from 1 up")
    return check_devices(os.environ.get("COLDPRESS_DEVICES"), int(slots) if slots else None)


@prefect.flow(
    name=FLOW,
    task_runner=cast("TaskRunner[Any]", ThreadPoolTaskRunner()),
    persist_result=False,
    retries=0,
)
def recipe_run(
    text: str,
    store: str,
    recipe: str = "recipe.yaml",
    folder: str = "/",
    overrides: list[str] = [],  # noqa: B006 (Prefect shows it as the default)
    only: list[str] = [],  # noqa: B006
    device: str = "auto",
    run: str = "",
    deadline: float | None = None,
    budget: float | None = None,
) -> State[Any]:
    """Run a recipe. text: its YAML. recipe: how it is called in errors. folder: where its relative paths begin.

    store: an absolute folder or an fsspec URL. run: the run's id; without one the flow run's own.
    deadline: seconds since its first attempt began; then it is cancelled, its work kept.
    budget: seconds of device time, of all its attempts; then likewise.
    """
    try:
        return _attempt(text, store, recipe, folder, overrides, only, device, run, deadline, budget)
    except (httpx.TransportError, PrefectHTTPStatusError, ServerAway) as error:
        # No fault of the recipe's: it goes on when the server is back.
        return Crashed(message=f"the Prefect server could not be reached: {error or type(error).__name__}")


def _attempt(
    text: str,
    store: str,
    recipe: str,
    folder: str,
    overrides: list[str],
    only: list[str],
    device: str,
    run: str,
    deadline: float | None,
    budget: float | None,
) -> State[Any]:
    flow_run = _present_flow_run()
    cap = max_attempts()
    if flow_run.run_count > cap:
        return Failed(message=f"given up after {cap} attempts; `coldpress submit` goes on from what they have done")
    if flow_run.run_count > 1:
        close_dead_task_runs(flow_run)
        if (ended := _end_before(flow_run)) is not None:
            _end_quietly(ended)
    left = None if deadline is None else deadline - _seconds_since_first_start(flow_run)
    if left is not None and left <= 0:
        return _out_of_time(deadline)
    opened = Store(store)
    if run and not opened.has_run(run):
        raise ColdpressError(
            f"{store} on {socket.gethostname()} is not the store that the run was submitted with: nothing there knows "
            f"run {run}; use a folder that both machines see under this path, or a URL like s3://bucket/folder"
        )
    checked = parse_recipe(recipe, text, folder, overrides)
    if only:
        checked = checked.only(only)
    attempt = Attempt(run or str(flow_run.id), flow_run.run_count, scheduled=not run)
    _end_when_orphaned()
    devices, slots = worker_slots()
    result = run_recipe(
        checked,
        opened,
        _LoggingTerminal(),
        device=device,
        slots=slots,
        devices=devices,
        seconds=left,
        budget=budget,
        within=attempt,
    )
    show_report(result, Dashboard())
    if result.out_of_time and result.unfinished:
        _end_quietly(_out_of_time(deadline))
    if result.stopped_by is not None and _present_flow_run().state.is_cancelling():  # type: ignore[union-attr]
        _end_quietly(Cancelled(message="cancelled; all finished work is kept"))
    elif result.stopped_by is not None or (result.out_of_budget and result.unfinished):
        _end_quietly(end_state(result))
    return end_state(result)


def _end_before(flow_run: FlowRun) -> State[Any] | None:
    """How the run had ended already, if only an automation that came late has scheduled it again; else None."""
    with get_client(sync_client=True) as client:
        past = sorted(client.read_flow_run_states(flow_run.id), key=lambda state: state.timestamp)
    ends = [place for place, state in enumerate(past) if state.is_final() and not state.is_crashed()]
    if not ends:
        return None
    again = next((state for state in past[ends[-1] :] if state.is_scheduled()), None)
    if again is None or again.message != GOES_ON:
        return None  # by a person
    ended = past[ends[-1]]
    return State(type=ended.type, name=ended.name, message=ended.message)


def _out_of_time(deadline: float | None) -> State[Any]:
    return Cancelled(message=f"its deadline of {deadline:g} s has come; what it finished is kept")


def _seconds_since_first_start(flow_run: FlowRun) -> float:
    with get_client(sync_client=True) as client:
        states = client.read_flow_run_states(flow_run.id)
    started = [state.timestamp for state in states if state.is_running()]
    return (datetime.now(UTC) - min(started)).total_seconds() if started else 0.0


def _end_quietly(state: State[Any]) -> NoReturn:
    """End the flow run in a state that was asked for; returned to Prefect it would be logged with a traceback."""
    with get_client(sync_client=True) as client:
        client.set_flow_run_state(_present_flow_run().id, state)
    raise Abort(str(state.message))


def max_attempts() -> int:
    """How often a run may be started: $COLDPRESS_MAX_ATTEMPTS, 20 by default."""
    text = os.environ.get("COLDPRESS_MAX_ATTEMPTS", str(MAX_ATTEMPTS))
    if not text.isdecimal() or int(text) < 1:
        raise ColdpressError(f"COLDPRESS_MAX_ATTEMPTS is {text!r}; write a number from 1 up")
    return int(text)


def _present_flow_run() -> FlowRun:
    """The flow run as the server has it now; the context's copy is as old as the process."""
    context = FlowRunContext.get()
    assert context is not None
    assert context.flow_run is not None
    with get_client(sync_client=True) as client:
        return client.read_flow_run(context.flow_run.id)


def close_dead_task_runs(flow_run: FlowRun) -> None:
    """Task runs of earlier attempts that still say Running or Pending died with their process: set them Crashed."""
    unfinished = TaskRunFilter(
        state=TaskRunFilterState(
            type=TaskRunFilterStateType(any_=[StateType.RUNNING, StateType.PENDING, StateType.SCHEDULED])
        )
    )
    mine = FlowRunFilter(id=FlowRunFilterId(any_=[flow_run.id]))
    with get_client(sync_client=True) as client:
        for task_run in client.read_task_runs(flow_run_filter=mine, task_run_filter=unfinished):
            _close(client, task_run.id)


def _close(client: SyncPrefectClient, task_run: Any) -> None:
    client.set_task_run_state(task_run, Crashed(message="its process died; the next attempt goes on"), force=True)


def _end_when_orphaned() -> None:
    """When the worker that started this process dies, ask the run to stop: nobody could cancel it any more.

    Only while the run heeds signals; before and after, Prefect would take SIGTERM for a crash. And not for ever: with
    the server gone too, Prefect would try for minutes to reach it.
    """
    parent, prefects = os.getppid(), signal.getsignal(signal.SIGTERM)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        deadline = time.monotonic() + grace_seconds() + _SECONDS_TO_REPORT
        asked = False
        while time.monotonic() < deadline:
            if not asked and signal.getsignal(signal.SIGTERM) is not prefects:
                asked = True
                os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.2)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class _LoggingTerminal(Terminal):
    """What the terminal would show, as lines in the run's log on the dashboard."""

    def __init__(self) -> None:
        super().__init__(Console(file=io.StringIO()))
        self._logger = prefect.get_run_logger()

    def say(self, text: str) -> None:
        self._logger.info(Text.from_markup(text).plain)
