"""Running a recipe: each node a Prefect task, Prefect's graph the recipe's DAG.

Prefect has the graph, the states and the scheduling; lookup, computing and publishing are ours. What passes between
tasks is an artifact reference. A run that is wholly cached answers without Prefect, unless a server is configured.
"""

from __future__ import annotations

import datetime
import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..storage.store import Store
from .execution import Execution
from .plan import Planned, check_disk, prepare
from .prefect_server import configure_prefect, reach_server, server_configured
from .recipe import Recipe
from .result import RunResult, save_record
from .terminal import Terminal
from .worker import InProcess, Worker

if TYPE_CHECKING:
    from prefect import Flow


@dataclass(frozen=True)
class Attempt:
    """A flow run that is going on already: the id of the run, which all its attempts share, and which one this is."""

    run: str
    number: int


def new_run_id() -> str:
    """Sorted by time, unique without asking anyone."""
    return f"{datetime.datetime.now(datetime.UTC):%Y%m%dT%H%M%S}-{secrets.token_hex(3)}"


def run_recipe(
    recipe: Recipe,
    store: Store,
    terminal: Terminal,
    *,
    device: str = "auto",
    slots: int = 1,
    within: Attempt | None = None,
) -> RunResult:
    """Check, plan and run a recipe; failed branches don't stop the others. Raises RecipeError before anything runs.

    `within`: the flow run in which this is called, whose tasks the stages become; without it the run makes its own.
    """
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
        _run_on_prefect(recipe, store, terminal, plan, result, device=device, slots=slots, within=within)
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
                if "generations.json" in store.manifest(artifact).files:
                    texts = json.loads(store.read_file(artifact, "generations.json"))
                    result.generations[variant if usual else name] = texts


def _run_on_prefect(
    recipe: Recipe,
    store: Store,
    terminal: Terminal,
    plan: Mapping[str, Planned],
    result: RunResult,
    *,
    device: str,
    slots: int,
    within: Attempt | None,
) -> None:
    workers: list[Worker | InProcess] = []
    if not all(planned.action for planned in plan.values()):
        kind = InProcess if store.url.startswith("memory://") else Worker
        workers = [kind(device) for _ in range(slots)]  # their slow imports run while Prefect starts
    try:
        if within is not None:
            Execution(recipe, store, terminal, result, workers).run()
            return
        configure_prefect()
        import prefect
        from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings

        reach_server()
        execution = Execution(recipe, store, terminal, result, workers)
        flow: Flow[Any, Any] = prefect.flow(
            name=recipe.name,
            flow_run_name=result.run,
            task_runner=_task_runner(slots),
            persist_result=False,
            validate_parameters=False,
        )(execution.flow)
        # A run that only looks things up needs no heartbeat, whose thread takes a second to join.
        settings = {} if workers else {PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}
        with temporary_settings(settings):
            flow(recipe=recipe.path, store=store.url, overrides=list(recipe.overrides), return_state=True)
    finally:
        for worker in workers:
            worker.kill()


def _task_runner(slots: int) -> Any:
    from prefect.task_runners import ThreadPoolTaskRunner

    # One thread a worker: what waits for a device shows as pending. Nodes are submitted in an order in which inputs
    # come first, so a full pool never waits for a queued node.
    return ThreadPoolTaskRunner(max_workers=slots)
