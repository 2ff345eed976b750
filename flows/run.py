"""Running a recipe: each node a Prefect task, Prefect's graph the recipe's DAG.

Prefect has the graph, the states and the scheduling; lookup, computing and publishing are ours. What passes between
tasks is an artifact reference. A run that is wholly cached answers without Prefect, unless a server is configured.
"""

from __future__ import annotations

import datetime
import functools
import getpass
import json
import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..storage.errors import ColdpressError
from ..storage.store import Store
from ..tasks.reporting.significance import Items, compare_all
from .budget import Budget, account_of
from .execution import Execution
from .plan import Planned, check_disk, prepare
from .prefect_server import ServerAway, configure_prefect, reach_server, server_configured
from .provenance import show_report
from .recipe import Node, Recipe
from .result import RunResult, read_items, save_record
from .slots import Slots, check_present
from .terminal import Terminal
from .worker import InProcess, Worker

if TYPE_CHECKING:
    from prefect import Flow


RUN_TAG = "coldpress"


@dataclass(frozen=True)
class Attempt:
    """A flow run that is going on already: the id of the run, which all its attempts share, and which one this is.

    scheduled: one of many runs of a schedule, each of which has a budget to itself.
    """

    run: str
    number: int
    scheduled: bool = False


def new_run_id() -> str:
    """Sorted by time, unique without asking anyone."""
    return f"{datetime.datetime.now(datetime.UTC):%Y%m%dT%H%M%S}-{secrets.token_hex(3)}"


def run_tags(recipe: str, device: str) -> list[str]:
    """By what a run is found on the dashboard: that it is ours, its recipe, who asked for it, and for what device."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        user = str(os.getuid())
    return [RUN_TAG, f"recipe:{recipe}", f"user:{user}", f"device:{device}"]


def spread_tag(run: str) -> str:
    """By what the flow runs are found over which a run is spread."""
    return f"spread:{run}"


def run_recipe(
    recipe: Recipe,
    store: Store,
    terminal: Terminal,
    *,
    device: str = "auto",
    slots: int = 1,
    devices: Sequence[str] = (),
    seconds: float | None = None,
    budget: float | None = None,
    within: Attempt | None = None,
) -> RunResult:
    """Check, plan and run a recipe; failed branches don't stop the others. Raises RecipeError before anything runs.

    `slots` stages are computed at the same time. `devices`: see `slots.py`; one slot each, if there are any.
    `seconds`: after so many the run asks itself to stop, as SIGTERM would, its work kept.
    `budget`: seconds of device time that it may use, together with unfinished attempts before it; see `budget.py`.
    `within`: the flow run in which this is called, whose tasks the stages become; without it the run makes its own.
    """
    if devices and store.url.startswith("memory://"):
        raise ColdpressError("only one process sees a memory:// store; --devices needs a folder or a URL")
    if devices and device != "cpu":
        check_present(devices)
    plan = prepare(recipe, store, device)
    check_disk(plan, store)
    attempt = within or Attempt(new_run_id(), 1)
    result = record_plan(recipe, store, plan, attempt.run, attempt.number)
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
            budget=budget,
            within=within,
        )
    for node in recipe.nodes:
        artifact = result.stages[node.name].artifact
        if artifact is not None:
            store.set_ref(f"{recipe.name}/{node.name}", artifact)
    try:
        collect_metrics(recipe, store, result)
    finally:
        save_record(recipe, store, result)
    return result


def record_plan(recipe: Recipe, store: Store, plan: Mapping[str, Planned], run: str, attempt: int = 1) -> RunResult:
    """Keep in the store that a run begins, or is to begin; returns its result so far."""
    result = RunResult(run, recipe.name, store.url, recipe.variants, attempt=attempt)
    for planned in plan.values():
        result.record(planned.node, "pending", planned.action)
    save_record(recipe, store, result)
    return result


def collect_metrics(recipe: Recipe, store: Store, result: RunResult) -> None:
    """Read what the evaluations found, and compare what was measured on the same windows or questions."""
    items: list[Items] = []
    for variant in recipe.variants:
        result.metrics[variant] = {}
        made = result.stages[variant]
        if made.artifact is not None:
            manifest = store.manifest(made.artifact)
            made.format, made.base = manifest.format, manifest.base
        for name in recipe.evaluations.get(variant, ()):
            artifact = result.stages[name].artifact
            if artifact is not None:
                found = json.loads(store.read_file(artifact, "metrics.json"))
                values = {key: value for key, value in found.items() if not isinstance(value, list)}
                row = row_of(recipe, variant, name)
                result.metrics.setdefault(row, {}).update(values)
                data = _measured_on(recipe.node(name), result)
                kept = read_items(store, artifact, found)
                items.extend(Items(row, metric, data, each) for metric, each in kept.items())
                if "runtime" in values:
                    result.runtimes.setdefault(row, {})[recipe.node(name).stage.method] = values["runtime"]
                if "generations.json" in store.manifest(artifact).files:
                    result.generations[row] = json.loads(store.read_file(artifact, "generations.json"))
    compared = compare_all(items, {row: _references(recipe, row) for row in result.metrics})
    result.differences, result.indistinguishable = compared["differences"], compared["indistinguishable"]


def row_of(recipe: Recipe, variant: str, evaluation: str) -> str:
    """Where an evaluation's figures stand: with the variant's, or in a row of their own if they could have equal names.

    lm-eval's figures are named by their tasks, so several evaluations stand together unless they share a task.
    """
    node = recipe.node(evaluation)
    if evaluation == f"{variant}/{node.stage.method}":
        return variant
    if node.stage.method != "lm-eval":
        return evaluation
    others = [recipe.node(name) for name in recipe.evaluations[variant] if name != evaluation]
    asked = {task for other in others if other.stage == node.stage for task in other.parameters.model_dump()["tasks"]}
    return evaluation if asked & set(node.parameters.model_dump()["tasks"]) else variant


def _references(recipe: Recipe, row: str) -> tuple[str, ...]:
    """The rows that a row of the report is compared with: its root model's, or that one's evaluation of that name."""
    variant = row if row in recipe.variants else row.rpartition("/")[0]
    root = recipe.node(variant).root
    return (root, root + row.removeprefix(variant))


def _measured_on(node: Node, result: RunResult) -> str:
    """What tells apart evaluations that asked other things: their data, or else the stage and its parameters."""
    others = {role: str(result.stages[name].artifact) for role, name in node.inputs.items() if role != "model"}
    return json.dumps(others or [node.stage.name, node.parameters.for_key()], sort_keys=True)


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
    budget: float | None,
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
    if devices and server_configured():
        configure_prefect()
        reach_server()
        from .device_limits import DeviceLimits

        limits = DeviceLimits(devices)
    metered = None
    if budget is not None:
        attempt = within or Attempt(result.run, result.attempt)
        account = attempt.run if attempt.scheduled else account_of(recipe)
        metered = Budget(store, account, f"{attempt.run}-{attempt.number}", budget)
    shared = Slots(start, slots, devices, limits, expected=computes)
    try:
        if within is not None:
            Execution(recipe, store, terminal, result, shared, device, seconds, metered).run()
            return
        configure_prefect()
        import httpx
        import prefect
        from prefect.settings import (
            PREFECT_CLIENT_MAX_RETRIES,
            PREFECT_FLOWS_HEARTBEAT_FREQUENCY,
            temporary_settings,
        )
        from prefect.task_runners import ThreadPoolTaskRunner

        reach_server()
        execution = Execution(recipe, store, terminal, result, shared, device, seconds, metered)
        task_runner: Any = ThreadPoolTaskRunner()  # a thread for each stage that waits or computes
        flow: Flow[Any, Any] = prefect.flow(
            name=recipe.name,
            flow_run_name=result.run,
            task_runner=task_runner,
            persist_result=False,
            validate_parameters=False,
        )(_with_report(execution, recipe, store, result))
        # A run that only looks things up needs no heartbeat, whose thread takes a second to join.
        settings: dict[Any, Any] = {} if computes else {PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}
        settings[PREFECT_CLIENT_MAX_RETRIES] = 3  # 14 seconds at a server that is away, when all is done
        with temporary_settings(settings), prefect.tags(*run_tags(recipe.name, device)):
            try:
                flow(recipe=recipe.path, store=store.url, overrides=list(recipe.overrides), return_state=True)
            except httpx.HTTPError as error:
                if any(stage.state == "pending" for stage in result.stages.values()):
                    raise ServerAway(f"the Prefect server did not answer: {error or type(error).__name__}") from error
                terminal.say(f"the Prefect server could not be told how the run ended: {error or type(error).__name__}")
                result.untold = True
    finally:
        shared.kill()
        if metered is not None and not result.unfinished:
            metered.close()


def _with_report(execution: Execution, recipe: Recipe, store: Store, result: RunResult) -> Callable[..., Any]:
    """The body of a run's own flow: the stages, and then the report as an artifact of the flow run."""

    @functools.wraps(execution.flow)  # whose parameters the dashboard shows
    def body(*parameters: Any, **named: Any) -> Any:
        state = execution.flow(*parameters, **named)
        collect_metrics(recipe, store, result)
        show_report(result, execution.dashboard)
        return state

    return body
