"""What runs are doing, as the Prefect server knows it: for `coldpress status`, `cancel` and `logs`.

Runs are found by their tag, those of `coldpress run` as well as submitted ones. What a stage does, or waits for, is the
text of its progress artifact.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any
from uuid import UUID

from ..storage.errors import ColdpressError
from .device_limits import device_of
from .run import RUN_TAG, spread_tag

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.objects import Artifact, FlowRun, TaskRun
    from prefect.client.schemas.responses import OrchestrationResult

_PAGE = 200  # the most that the server answers with


@dataclass(frozen=True)
class StageStatus:
    """A stage of a run. percent, doing: of what runs: "pruning 3/24, 1 min left", or "waiting for device 0".

    device: the shared one that it has: {"host": …, "device": …, "since": …}. moved: when it last made progress.
    """

    name: str
    state: str
    percent: float | None = None
    doing: str = ""
    device: dict[str, str] | None = None
    moved: str | None = None


@dataclass(frozen=True)
class RunStatus:
    """A run. run: its id in the store. id: its id on the server. preempted, crashed: how often it was.

    moved: when it last changed its state or made progress. unfinished: whether something is still to come.
    """

    run: str
    id: str
    recipe: str
    user: str
    state: str
    message: str
    attempts: int
    preempted: int
    crashed: int
    pool: str | None
    store: str | None = None
    moved: str = ""
    unfinished: bool = False
    stages: list[StageStatus] = field(default_factory=list)

    @property
    def done(self) -> int:
        """How many stages have their result."""
        return sum(stage.state in ("Completed", "Cached", "Resumed") for stage in self.stages)

    def to_json(self) -> dict[str, Any]:
        """As `status --json` shows it."""
        return asdict(self)


def statuses(
    client: SyncPrefectClient, run: str | None = None, limit: int = 20, ended: dict[str, RunStatus] | None = None
) -> list[RunStatus]:
    """What goes on and the newest runs, or the one called so. Raises ColdpressError if there is none of that name.

    ended: runs that have, from earlier calls, which are not asked about again; those that have meanwhile are added.
    """
    if run:
        return [_status(client, find_run(client, run))]
    found = {one.id: one for one in [*_newest(client, _PAGE, unfinished=True), *_newest(client, limit)]}
    known = {} if ended is None else ended
    listed = []
    for one in sorted(found.values(), key=run_id, reverse=True):
        before = known.get(str(one.id))
        is_same = before is not None and one.state is not None and before.state == one.state.name
        listed.append(before if before is not None and is_same else _status(client, one))
    known.clear()
    known.update({entry.id: entry for entry in listed if not entry.unfinished})
    return listed


def devices(client: SyncPrefectClient, runs: Sequence[RunStatus] = ()) -> list[dict[str, Any]]:
    """The devices that runs share: {"host": …, "device": …, "taken": bool}, and of those of `runs` who has it and since
    when: "run", "stage", "since".
    """
    having = {
        (stage.device["host"], stage.device["device"]): {
            "run": run.run, "stage": stage.name, "since": stage.device["since"]
        }
        for run in runs for stage in run.stages if stage.device
    }  # fmt: skip
    found: list[dict[str, Any]] = []
    offset = 0
    while page := client.read_global_concurrency_limits(limit=_PAGE, offset=offset):
        offset += len(page)
        for limit in page:
            if place := device_of(limit.name):
                taken = limit.active_slots > 0
                holder = having.get(place, {}) if taken else {}
                found.append({"host": place[0], "device": place[1], "taken": taken, **holder})
    return sorted(found, key=lambda entry: (entry["host"], entry["device"]))


def find_run(client: SyncPrefectClient, name: str) -> FlowRun:
    """The flow run of a run's id in the store, or on the server, or the unique beginning of either.

    The parts of a run that is spread have ids that begin with its own.
    """
    from prefect.exceptions import ObjectNotFound

    try:
        return client.read_flow_run(UUID(name))
    except (ValueError, ObjectNotFound):
        pass
    known = _newest(client, _PAGE)
    fits = [flow_run for flow_run in known if run_id(flow_run).startswith(name) or str(flow_run.id).startswith(name)]
    if fits:
        first = min(fits, key=lambda flow_run: len(run_id(flow_run)))
        if all(run_id(flow_run).startswith(run_id(first)) for flow_run in fits):
            return first
        raise ColdpressError(f"'{name}' fits {len(fits)} runs; write more of its id")
    raise ColdpressError(f"the server has no run '{name}' among the last {_PAGE}; `coldpress status` shows them")


def run_id(flow_run: FlowRun) -> str:
    """What the run is called in the store."""
    if flow_run.deployment_id is not None:
        return str(flow_run.parameters.get("run") or flow_run.id)
    return flow_run.name


def workers_of(client: SyncPrefectClient, pool: str) -> int:
    """How many workers of a pool are at work, as far as the server has heard of them."""
    from prefect.client.schemas.objects import WorkerStatus

    return sum(worker.status == WorkerStatus.ONLINE for worker in client.read_workers_for_work_pool(pool))


def cancel(client: SyncPrefectClient, name: str) -> str:
    """Ask a submitted run to stop for good, its work kept; returns its id in the store. Raises ColdpressError.

    Of one that is spread all parts are.
    """
    flow_run = find_run(client, name)
    run, state = run_id(flow_run), flow_run.state
    going_on = [part for part in {flow_run.id: flow_run, **_parts(client, run)}.values() if not _has_ended(part)]
    if not going_on:
        raise ColdpressError(f"run {run} has ended already: {state.name if state else 'no state'}")
    if flow_run.deployment_id is None:
        raise ColdpressError(f"run {run} was not submitted: end it with Ctrl-C or SIGTERM where it runs")
    refused = []
    for part in going_on:
        try:
            _cancel(client, part)
        except ColdpressError as error:  # it may just have ended; the others are to stop all the same
            refused.append(error)
    if len(refused) == len(going_on):
        raise refused[0]
    return run


def _has_ended(flow_run: FlowRun) -> bool:
    state = flow_run.state
    return state is not None and state.is_final() and not state.is_crashed()


def _parts(client: SyncPrefectClient, run: str) -> dict[UUID, FlowRun]:
    """The flow runs over which a run is spread."""
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterTags

    wanted = FlowRunFilter(tags=FlowRunFilterTags(all_=[spread_tag(run)]))
    return {part.id: part for part in client.read_flow_runs(flow_run_filter=wanted, limit=_PAGE)}


def _cancel(client: SyncPrefectClient, flow_run: FlowRun) -> None:
    from prefect.states import Cancelled, Cancelling

    state = flow_run.state
    runs = state is not None and (state.is_running() or state.is_pending() or state.is_cancelling())
    message = "cancelled; all finished work is kept"
    # Nobody is there who could end what doesn't run.
    answer: OrchestrationResult[Any] = client.set_flow_run_state(
        flow_run.id,
        Cancelling() if runs else Cancelled(message=message),
        force=state is not None and state.is_crashed(),
    )
    if answer.status.value != "ACCEPT":
        reason = getattr(answer.details, "reason", answer.status)
        raise ColdpressError(f"the server did not cancel run {run_id(flow_run)}: {reason}")


def logs(client: SyncPrefectClient, name: str) -> Iterator[str]:
    """The lines of a run's log, of all attempts, oldest first."""
    from prefect.client.schemas.filters import LogFilter, LogFilterFlowRunId
    from prefect.client.schemas.sorting import LogSort

    flow_run = find_run(client, name)
    of_run = LogFilter(flow_run_id=LogFilterFlowRunId(any_=[flow_run.id]))
    offset = 0
    while page := client.read_logs(of_run, limit=_PAGE, offset=offset, sort=LogSort.TIMESTAMP_ASC):
        offset += len(page)
        for line in page:
            yield f"{line.timestamp:%Y-%m-%d %H:%M:%S} {line.message}"


def _newest(client: SyncPrefectClient, limit: int, *, unfinished: bool = False) -> list[FlowRun]:
    """The newest runs that are due: schedules have runs far into the future."""
    from prefect.client.schemas.filters import (
        FlowRunFilter,
        FlowRunFilterExpectedStartTime,
        FlowRunFilterState,
        FlowRunFilterStateType,
        FlowRunFilterTags,
    )
    from prefect.client.schemas.objects import TERMINAL_STATES
    from prefect.client.schemas.sorting import FlowRunSort

    soon: Any = datetime.now(UTC) + timedelta(seconds=60)
    ours = FlowRunFilter(
        tags=FlowRunFilterTags(all_=[RUN_TAG]),
        expected_start_time=FlowRunFilterExpectedStartTime(before_=soon),
        state=FlowRunFilterState(type=FlowRunFilterStateType(not_any_=list(TERMINAL_STATES))) if unfinished else None,
    )
    return client.read_flow_runs(flow_run_filter=ours, sort=FlowRunSort.EXPECTED_START_TIME_DESC, limit=limit)


def _status(client: SyncPrefectClient, flow_run: FlowRun) -> RunStatus:
    past = [str(state.name) for state in client.read_flow_run_states(flow_run.id)]
    stages, state, submitted = _stages(client, flow_run), flow_run.state, flow_run.deployment_id is not None
    changed = [state.timestamp.isoformat()] if state else []
    tags = dict(tag.split(":", 1) for tag in flow_run.tags if ":" in tag)
    return RunStatus(
        run=run_id(flow_run),
        id=str(flow_run.id),
        recipe=tags.get("recipe", ""),
        user=tags.get("user", ""),
        state=str(state.name) if state else "",
        message=(state.message if state else None) or "",
        attempts=flow_run.run_count,
        preempted=past.count("Pre-empted"),
        crashed=past.count("Crashed"),
        pool=flow_run.work_pool_name,
        store=flow_run.parameters.get("store"),
        moved=max([*changed, *(stage.moved for stage in stages if stage.moved)], default=""),
        unfinished=state is not None and (not state.is_final() or (state.is_crashed() and submitted)),
        stages=stages,
    )


def _stages(client: SyncPrefectClient, flow_run: FlowRun) -> list[StageStatus]:
    """The stages of all attempts, each as the last one left it."""
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
    from prefect.client.schemas.sorting import TaskRunSort

    of_run = FlowRunFilter(id=FlowRunFilterId(any_=[flow_run.id]))
    latest: dict[str, TaskRun] = {}
    offset = 0
    while page := client.read_task_runs(
        flow_run_filter=of_run, sort=TaskRunSort.EXPECTED_START_TIME_ASC, limit=_PAGE, offset=offset
    ):
        offset += len(page)
        latest.update({task_run.name: task_run for task_run in page})
    progress = _progress(client, flow_run) if flow_run.state and flow_run.state.is_running() else {}
    found = []
    for name, task_run in latest.items():
        state = str(task_run.state.name) if task_run.state else "Pending"
        began = task_run.start_time.isoformat() if task_run.start_time else None
        shown = progress.get(task_run.id) if state == "Running" else None
        if shown is None:
            found.append(StageStatus(name, state, moved=began))
            continue
        doing = (shown.description or "").removeprefix(f"{name}: ")
        device: Any = shown.metadata_ or None
        moved = shown.updated.isoformat() if shown.updated else began
        found.append(StageStatus(name, state, float(str(shown.data)), doing, device, moved))
    return found


def _progress(client: SyncPrefectClient, flow_run: FlowRun) -> dict[UUID, Artifact]:
    """Task run -> its progress artifact: percent, and what it does."""
    from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId, ArtifactFilterType

    wanted = ArtifactFilter(
        flow_run_id=ArtifactFilterFlowRunId(any_=[flow_run.id]), type=ArtifactFilterType(any_=["progress"])
    )
    found = client.read_artifacts(artifact_filter=wanted, limit=_PAGE)
    return {artifact.task_run_id: artifact for artifact in found if artifact.task_run_id is not None}
