"""Running a recipe: each node a Prefect task, Prefect's graph the recipe's DAG.

Prefect has the graph, the states and the scheduling; lookup, computing and publishing are ours. What passes between
tasks is an artifact reference. A run that is wholly cached answers without Prefect, unless a server is configured.
"""

from __future__ import annotations

import datetime
import getpass
import json
import os
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..storage.errors import ColdpressError
from ..storage.store import Store
from .execution import Execution
from .plan import Planned, check_disk, prepare
from .prefect_server import configure_prefect, reach_server, server_configured
from .recipe import Recipe
from .result import RunResult, save_record
from .slots import Slots
from .terminal import Terminal
from .worker import InProcess, Worker

if TYPE_CHECKING:
    from prefect import Flow


RUN_TAG = "coldpress"


@dataclass(frozen=True)
class Attempt:
    """A flow run that is going on already: the id of the run, which all its attempts share, and which one this is."""

    run: str
    number: int


def new_run_id() -> str:
    """Sorted by time, unique without asking anyone."""
    return f"{datetime.datetime.now(datetime.UTC):%Y%m%dT%H%M%S}-{secrets.token_hex(3)}"


def run_tags(recipe: str) -> list[str]:
    """By what a run is found on the dashboard: that it is ours, its recipe, and who asked for it."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        user = str(os.getuid())
    return [RUN_TAG, f"recipe:{recipe}", f"user:{user}"]


def run_recipe(
    recipe: Recipe,
    store: Store,
    terminal: Terminal,
    *,
    device: str = "auto",
    slots: int = 1,
    devices: Sequence[str] = (),
    seconds: float | None = None,
    within: Attempt | None = None,
) -> RunResult:
    """Check, plan and run a recipe; failed branches don't stop the others. Raises RecipeError before anything runs.

    `slots` stages are computed at the same time. `devices`: see `slots.py`; one slot each, if there are any.
    `seconds`: after so many the run asks itself to stop, as SIGTERM would, its work kept.
    `within`: the flow run in which this is called, whose tasks the stages become; without it the run makes its own.
    """
    if devices and store.url.startswith("memory://"):
        raise ColdpressError("only one process sees a memory:// store; --devices needs a folder or a URL")
    plan = prepare(recipe, store)
    check_disk(plan, store)
    attempt = within or Attempt(new_run_id(), 1)
    result = RunResult(attempt.run, recipe.name, store.url, recipe.variants, attempt=attempt.number)
    for planned in plan.values():
        result.record(planned.node, "pending", planned.action)
    save_record(recipe, store, result)
    everything_cached = all(planned.action for planned in plan.values())
    if everything_cached and within is None and not server_configured():
        for planned in plan.values():
            assert planned.action is not None
            result.record(planned.node, "cached", planned.action)
            terminal.finish(planned.node.name, "cached", 0)
    else:
        _run_on_prefect(
            recipe,
            store,
            terminal,
            plan,
            result,
            device=device,
            slots=slots,
            devices=devices,
            seconds=seconds,
            within=within,
        )
    for node in recipe.nodes:
        artifact = result.stages[node.name].artifact
        if artifact is not None:
            store.set_ref(f"{recipe.name}/{node.name}", artifact)
    try:
        _collect_metrics(recipe, store, result)
    finally:
        save_record(recipe, store, result)
    return result


def _collect_metrics(recipe: Recipe, store: Store, result: RunResult) -> None:
    for variant in recipe.variants:
        result.metrics[variant] = {}
        for name in recipe.evaluations.get(variant, ()):
            artifact = result.stages[name].artifact
            if artifact is not None:
                found = json.loads(store.read_file(artifact, "metrics.json"))
                values = {key: value for key, value in found.items() if not isinstance(value, list)}
                usual = name == f"{variant}/{recipe.node(name).stage.method}"
                result.metrics.setdefault(variant if usual else name, {}).update(values)


def _run_on_prefect(
    recipe: Recipe,
    store: Store,
    terminal: Terminal,
    plan: Mapping[str, Planned],
    result: RunResult,
    *,
    device: str,
    slots: int,
    devices: Sequence[str],
    seconds: float | None,
    within: Attempt | None,
) -> None:
    computes = not all(planned.action for planned in plan.values())
    if devices and device == "auto":
        device = "cuda"  # they were named: computing on the CPU instead would be a surprise

    def start(visible: str | None) -> Worker | InProcess:
        if store.url.startswith("memory://"):
            return InProcess(device)
        if devices and visible is None:
            return Worker("cpu", visible="")
        return Worker(device, visible=visible, share=slots)

    limits = None
    if computes and devices and server_configured():
        configure_prefect()
        reach_server()
        from .device_limits import DeviceLimits

        limits = DeviceLimits(devices)
    shared = Slots(start, slots if computes else 0, devices if computes else (), limits)
    try:
        if within is not None:
            Execution(recipe, store, terminal, result, shared, seconds).run()
            return
        configure_prefect()
        import prefect
        from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings

        reach_server()
        execution = Execution(recipe, store, terminal, result, shared, seconds)
        flow: Flow[Any, Any] = prefect.flow(
            name=recipe.name,
            flow_run_name=result.run,
            task_runner=_task_runner(max(shared.threads, 1)),
            persist_result=False,
            validate_parameters=False,
        )(execution.flow)
        # A run that only looks things up needs no heartbeat, whose thread takes a second to join.
        settings = {} if computes else {PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}
        with temporary_settings(settings), prefect.tags(*run_tags(recipe.name)):
            flow(recipe=recipe.path, store=store.url, overrides=list(recipe.overrides), return_state=True)
    finally:
        shared.kill()


def _task_runner(threads: int) -> Any:
    from prefect.task_runners import ThreadPoolTaskRunner

    # One thread a slot: what waits for one shows as pending. Nodes are submitted in an order in which inputs
    # come first, so a full pool never waits for a queued node.
    return ThreadPoolTaskRunner(max_workers=threads)
