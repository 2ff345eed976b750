"""What a Prefect server has to know for `coldpress submit`: work pool, deployment, and the automations that resume.

All are found by name and made, or changed where they differ. An automation that is right is left alone: changing it
would make Prefect forget the heartbeats it waits for, and with them the runs that died with the machine.

Crashed runs are scheduled again by `up` itself, which looks at the states that runs are in. An automation acts on an
event without looking: on a loaded server it comes minutes late, or several times, and starts what has long been done,
or what runs, on which Prefect's worker ends. It is made only for workers that `coldpress up` doesn't watch.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from ..storage.errors import ColdpressError

if TYPE_CHECKING:
    from uuid import UUID

    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.responses import DeploymentResponse
    from prefect.events import AutomationCore

FLOW = "coldpress"
POOL = "coldpress"
ENTRYPOINT = "coldpress.flows.submitted.recipe_run"
MAX_ATTEMPTS = 20
HEARTBEAT_SECONDS = 30  # Prefect's least
MISSED_HEARTBEATS = 3
SECONDS_TO_START = 120
SECONDS_UNTIL_SCHEDULED = 4  # the worker reports a crash twice, and ends when it gets the run again in between
GOES_ON = "goes on from what it has finished"

NORMAL = "normal"  # what waits in the pool's own queue
PRIORITIES = ("high", NORMAL, "low")  # the others have queues of these names

_JOB_VARIABLES = {
    # Prefect's own command is a process that starts another; killing the first would leave the second.
    "command": "python -m prefect.engine",
    # Through a pipe to the worker, which breaks with it: the next line of the log would end the run. The lines reach
    # the dashboard all the same.
    "stream_output": False,
}
_CRASHED = ("Crashed", "Pre-empted")


@dataclass(frozen=True)
class Submitted:
    """What the server has. run: the run's id in the store, or the name of a schedule. id: its id on the server.

    idle: nobody is there who would start it.
    """

    run: str
    id: UUID
    url: str | None
    idle: bool = False


def prepare_server(client: SyncPrefectClient, pool: str, heartbeat: int) -> None:
    """Make sure of the work pool, the deployment `coldpress/<pool>` and the automations. Does nothing twice."""
    _ensure_pool(client, pool)
    flow_id = client.create_flow_from_name(FLOW)
    _ensure_deployment(client, flow_id, pool)
    prepare_queues(client, pool)
    prepare_automations(client, heartbeat)
    for automation in client.read_automations_by_name(scheduling_again(flow_id).name):
        client.delete_automation(automation.id)  # `up` does that itself from now on


def prepare_automations(client: SyncPrefectClient, heartbeat: int, *, scheduling: bool = False) -> None:
    """Make sure of the automations. scheduling: also of that for workers that `coldpress up` doesn't watch."""
    flow_id = client.create_flow_from_name(FLOW)
    for automation in [*automations(flow_id, heartbeat), *([scheduling_again(flow_id)] if scheduling else [])]:
        ensure_automation(client, automation)


def _ensure_pool(client: SyncPrefectClient, pool: str) -> None:
    from prefect.client.schemas.actions import WorkPoolCreate
    from prefect.exceptions import ObjectNotFound

    try:
        client.read_work_pool(pool)
    except ObjectNotFound:
        client.create_work_pool(WorkPoolCreate(name=pool, type="process"))


def prepare_queues(client: SyncPrefectClient, pool: str) -> None:
    """Queues for priorities: workers take from `high` first, then from the pool's own queue, then from `low`.

    Raises ColdpressError when there is no such pool.
    """
    from prefect.exceptions import ObjectNotFound

    try:
        client.read_work_pool(pool)
    except ObjectNotFound as error:
        raise ColdpressError(f"the server has no work pool '{pool}'; `prefect work-pool create` makes one") from error
    answer = client.request(
        "POST", "/work_pools/{work_pool_name}/queues/filter", path_params={"work_pool_name": pool}, json={}
    )
    present = {queue["name"] for queue in answer.json()}
    for name, place in (("high", {"priority": 1}), ("low", {})):  # without a priority it comes last
        if name not in present:
            document = {"name": name, "description": f"coldpress submit --priority {name}", **place}
            client.request(
                "POST", "/work_pools/{work_pool_name}/queues", path_params={"work_pool_name": pool}, json=document
            )


def schedule(
    client: SyncPrefectClient,
    deployment: DeploymentResponse,
    recipe: str,
    cron: str,
    parameters: dict[str, Any],
    tags: list[str],
    queue: str | None,
) -> Submitted:
    """A deployment of its own for a recipe that runs again and again; the times are in UTC."""
    from prefect.client.schemas.actions import DeploymentScheduleCreate
    from prefect.client.schemas.schedules import CronSchedule
    from prefect.utilities.urls import url_for
    from pydantic import ValidationError

    try:
        times = CronSchedule(cron=cron, timezone="UTC")
    except ValidationError as error:
        raise ColdpressError(
            f"--cron {cron!r} is no schedule; write it like '0 3 * * *', at three each night"
        ) from error
    name = f"{deployment.name} {recipe}"
    made = client.create_deployment(
        deployment.flow_id,
        name=name,
        work_pool_name=deployment.work_pool_name,
        work_queue_name=queue,
        entrypoint=ENTRYPOINT,
        schedules=[DeploymentScheduleCreate(schedule=times, active=True)],
        parameters=parameters,
        tags=tags,
        description=f"Runs {recipe} at '{cron}' (UTC).",
        job_variables=deployment.job_variables,
        parameter_openapi_schema=deployment.parameter_openapi_schema,
        enforce_parameter_schema=True,
    )
    return Submitted(f"{FLOW}/{name}", made, url_for("deployment", made))


def _ensure_deployment(client: SyncPrefectClient, flow_id: UUID, pool: str) -> None:
    from prefect.utilities.callables import parameter_schema

    from .submitted import recipe_run

    client.create_deployment(
        flow_id,
        name=pool,
        work_pool_name=pool,
        entrypoint=ENTRYPOINT,
        description="Runs recipes sent with `coldpress submit`, and goes on with them after a crash.",
        job_variables=_JOB_VARIABLES,
        parameter_openapi_schema=parameter_schema(recipe_run).model_dump_for_openapi(),
        enforce_parameter_schema=True,
    )


def automations(flow_id: UUID, heartbeat: int) -> list[AutomationCore]:
    """Silent and stuck runs are Crashed, hopeless ones are given up."""
    from prefect.events import AutomationCore

    silence = MISSED_HEARTBEATS * heartbeat
    return [
        AutomationCore(
            name="coldpress: a silent run has crashed",
            description="A run died together with its worker when no heartbeat comes.",
            trigger=trigger(
                flow_id,
                after=events("Running", "heartbeat"),
                expect=events("Running", "heartbeat", "AwaitingRetry", "Completed", "Failed", "Cancelled"),
                absent_for=silence,
            ),
            actions=[_change("CRASHED", f"no heartbeat for {silence} seconds")],
        ),
        AutomationCore(
            name="coldpress: a run that does not start has crashed",
            description="A run's worker died after taking it and before starting it.",
            trigger=trigger(
                flow_id,
                after=events("Pending"),
                expect=events("Running", "AwaitingRetry", "Completed", "Failed", "Cancelled"),
                absent_for=SECONDS_TO_START,
            ),
            actions=[_change("CRASHED", f"not started in {SECONDS_TO_START} seconds")],
        ),
        AutomationCore(
            name="coldpress: a run that crashes again and again is given up",
            description="So that a worker on which nothing can start does not try for ever.",
            trigger=trigger(flow_id, expect=events("AwaitingRetry"), threshold=MAX_ATTEMPTS, within=3600),
            actions=[_change("FAILED", f"given up: it crashed {MAX_ATTEMPTS} times within an hour")],
        ),
    ]


def scheduling_again(flow_id: UUID) -> AutomationCore:
    """A crashed run is scheduled again."""
    from prefect.events import AutomationCore

    return AutomationCore(
        name="coldpress: a crashed run is scheduled again",
        description="A run that was killed, or pre-empted, goes on from what it has finished.",
        trigger=trigger(flow_id, expect=events(*_CRASHED)),
        actions=[_change("SCHEDULED", GOES_ON, name="AwaitingRetry")],
    )


def events(*names: str) -> set[str]:
    """The events of runs coming into states of these names."""
    return {f"prefect.flow-run.{name}" for name in names}


def _change(state: str, message: str, name: str | None = None) -> Any:
    from prefect.client.schemas.objects import StateType
    from prefect.events.actions import ChangeFlowRunState

    return ChangeFlowRunState(state=StateType(state), name=name, message=message, force=False)


def trigger(
    flow_id: UUID,
    *,
    expect: set[str],
    after: set[str] | None = None,
    absent_for: int | None = None,
    threshold: int = 1,
    within: int = 0,
) -> Any:
    """A trigger on each of our runs by itself: on events that come, or (absent_for) that don't come for so long."""
    from prefect.events import EventTrigger, ResourceSpecification
    from prefect.events.schemas.automations import Posture

    return EventTrigger(
        match=ResourceSpecification({"prefect.resource.id": "prefect.flow-run.*"}),
        match_related=ResourceSpecification(
            {"prefect.resource.id": f"prefect.flow.{flow_id}", "prefect.resource.role": "flow"}
        ),
        for_each={"prefect.resource.id"},
        after=after or set(),
        expect=expect,
        posture=Posture.Reactive if absent_for is None else Posture.Proactive,
        threshold=threshold,
        within=timedelta(seconds=within if absent_for is None else absent_for),
    )


def ensure_automation(client: SyncPrefectClient, wanted: AutomationCore) -> None:
    """Make an automation, or change the one of its name if it differs."""
    found = client.read_automations_by_name(wanted.name)
    if not found:
        client.create_automation(wanted)
        return
    first, *doubles = found
    if _content(first) != _content(wanted):
        client.update_automation(first.id, wanted)
    for double in doubles:
        client.delete_automation(double.id)


def _content(automation: AutomationCore) -> Any:
    """What is compared. Whether it is enabled is the user's."""
    content = automation.model_dump(mode="json", include={"name", "description", "trigger", "actions"})
    for key in ("after", "expect", "for_each"):
        content["trigger"][key] = sorted(content["trigger"][key])
    content["trigger"].pop("id", None)
    return content


def schedule_crashed(client: SyncPrefectClient, since: dict[UUID, float]) -> None:
    """Schedule the runs that are Crashed, or Pre-empted, just now.

    since: of their states, when they were first seen here, by a clock of this process; kept from call to call.
    """
    import httpx
    from prefect.client.schemas.filters import (
        FlowFilter,
        FlowFilterName,
        FlowRunFilter,
        FlowRunFilterState,
        FlowRunFilterStateName,
    )
    from prefect.exceptions import ObjectNotFound
    from prefect.states import AwaitingRetry

    crashed = FlowRunFilter(state=FlowRunFilterState(name=FlowRunFilterStateName(any_=list(_CRASHED))))
    ours = FlowFilter(name=FlowFilterName(any_=[FLOW]))
    now = time.monotonic()
    found = {
        flow_run.state.id: flow_run.id
        for flow_run in client.read_flow_runs(flow_filter=ours, flow_run_filter=crashed)
        if flow_run.deployment_id is not None and flow_run.state is not None
    }
    before = dict(since)
    since.clear()
    since.update({state: before.get(state, now) for state in found})
    for state, run in found.items():
        if now - since[state] < SECONDS_UNTIL_SCHEDULED:
            continue
        with contextlib.suppress(httpx.HTTPError, ObjectNotFound):  # it is tried again, or was deleted; others wait
            current = client.read_flow_run(run).state
            if current is not None and current.id == state:  # and no other `up` was faster
                client.set_flow_run_state(run, AwaitingRetry(message=GOES_ON))
