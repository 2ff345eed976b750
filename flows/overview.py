"""What goes on, in tables: for `coldpress status`, and for the page on the dashboard that `coldpress up` keeps fresh.

Which stage has which device and who waits for whom is what runs tell the server; which stages are being computed for a
store, by runs that no server knows too, is what its leases say.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import httpx

from ..storage.errors import ColdpressError
from ..storage.inspect import stored_bytes
from ..storage.leases import holders
from ..storage.store import Store
from .status import RunStatus, devices, statuses, workers_of

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient

KEY = "coldpress-status"  # of the artifact on the dashboard
SECONDS_BETWEEN_PAGES = 60.0
_SHARE_OF_TIME = 0.1  # that making the page may take
MINUTES_WITHOUT_PROGRESS = 30
INTERRUPTIONS = 3  # from so many on a run is pointed out
_SECONDS_WITHOUT_WORKER = 30


@dataclass(frozen=True)
class Table:
    """Rows of text under titles."""

    title: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]


@dataclass
class StoreStatus:
    """A store: bytes that it holds, bytes free beside them where that has a limit, the leases of what is computed."""

    url: str
    bytes: int = 0
    free: int | None = None
    leases: list[dict[str, Any]] = field(default_factory=list)
    problem: str | None = None


@dataclass
class Overview:
    """All of it. workers: pool -> how many are at work there. now: what times are counted back from."""

    runs: list[RunStatus]
    devices: list[dict[str, Any]]
    stores: list[StoreStatus]
    workers: Mapping[str, int]
    now: datetime

    def to_json(self) -> dict[str, Any]:
        """As `status --json` prints it."""
        leases = [{"store": store.url, **lease} for store in self.stores for lease in store.leases]
        return {
            "runs": [run.to_json() for run in self.runs],
            "devices": self.devices,
            "store": next({"url": one.url, "bytes": one.bytes, "free_bytes": one.free} for one in self.stores),
            "leases": leases,
            "troubles": list(self.troubles()),
        }

    def tables(self) -> Iterator[Table]:
        """Those that have rows."""
        everything = (self._runs(), self._at_work(), self._devices(), self._waiting(), *self._leases())
        yield from (table for table in everything if table.rows)

    def troubles(self) -> Iterator[str]:
        """Runs that seem stuck, and why, a sentence each."""
        for run in (run for run in self.runs if run.unfinished):
            still = _seconds(run.moved, self.now)
            if run.state == "Running" and still > 60 * MINUTES_WITHOUT_PROGRESS:
                yield f"run {run.run} has made no progress for {_ago(still)}; see `coldpress logs {run.run}`"
            if run.preempted + run.crashed >= INTERRUPTIONS:
                yield f"run {run.run} was pre-empted {_times(run.preempted)} and crashed {_times(run.crashed)}"
            idle = run.pool is not None and self.workers.get(run.pool) == 0 and run.state not in ("Running", "Pending")
            if idle and still > _SECONDS_WITHOUT_WORKER:
                yield f"run {run.run} waits for a worker, and pool {run.pool} has none; {starts_worker(str(run.pool))}"
        for store in self.stores:
            if store.problem:
                yield f"store {store.url}: {store.problem}"

    def messages(self) -> Iterator[str]:
        """What there is to say of runs that neither run nor are done."""
        for run in self.runs:
            if run.message and run.state not in ("Running", "Completed", "Pending"):
                yield f"run {run.run}: {run.message}"

    def summary(self) -> Iterator[str]:
        """A line for each store."""
        for store in self.stores:
            free = "" if store.free is None else f", {store.free / 1e9:.1f} GB free"
            yield f"store {store.url}: {store.bytes / 1e6:.1f} MB{free}"

    def _runs(self) -> Table:
        columns = ("run", "recipe", "user", "pool", "state", "done", "moved", "stopped")
        return Table("runs", columns, [self._run(run) for run in self.runs])

    def _run(self, run: RunStatus) -> tuple[str, ...]:
        interrupted = f"{run.preempted + run.crashed} x" if run.preempted + run.crashed else ""
        moved = _ago(_seconds(run.moved, self.now))
        done = f"{run.done} of {len(run.stages)}" if run.stages else ""
        return (run.run, run.recipe, run.user, run.pool or "-", run.state, done, moved, interrupted)

    def _at_work(self) -> Table:
        rows = [
            (run.run, stage.name, stage.doing or "begins")
            for run, stage in self._running()
            if not stage.doing.startswith("waiting")
        ]
        return Table("at work", ("run", "stage", "does"), rows)

    def _waiting(self) -> Table:
        rows = [
            (run.run, stage.name, stage.doing.removeprefix("waiting ").removeprefix("for "))
            for run, stage in self._running()
            if stage.doing.startswith("waiting")
        ]
        return Table("waiting", ("run", "stage", "for"), rows)

    def _running(self) -> Iterator[tuple[RunStatus, Any]]:
        return ((run, stage) for run in self.runs for stage in run.stages if stage.state == "Running")

    def _devices(self) -> Table:
        rows = []
        for device in self.devices:
            since = _ago(_seconds(device["since"], self.now)) if "since" in device else ""
            by = device.get("run", "a run that this server doesn't show" if device["taken"] else "free")
            rows.append((device["host"], device["device"], by, device.get("stage", ""), since))
        return Table("devices", ("host", "device", "taken by", "stage", "for"), rows)

    def _leases(self) -> Iterator[Table]:
        for store in self.stores:
            rows = []
            for lease in store.leases:
                process = f"{lease['host']} {lease['pid']}{' (ended)' if lease['dead'] else ''}"
                rows.append((lease["run"], lease["node"], process, lease["doing"]))
            yield Table(f"being computed for {store.url}", ("run", "stage", "process", "does"), rows)


def starts_worker(pool: str) -> str:
    """What to do about a pool without workers."""
    option = "" if pool == "coldpress" else f" --pool {pool}"
    return f"`coldpress up --no-server{option}` starts one"


def look(
    client: SyncPrefectClient,
    store: Store | None,
    run: str | None = None,
    limit: int = 20,
    ended: dict[str, RunStatus] | None = None,
) -> Overview:
    """What goes on and the newest runs, or one run. store: to look into; without one those of the runs.

    ended: as for `statuses`.

    Raises ColdpressError for an unknown run, and when `store` can't be read.
    """
    runs = statuses(client, run, limit, ended)
    urls = sorted({one.store for one in runs if one.store and not one.store.startswith("memory://")})
    pools = {one.pool for one in runs if one.pool is not None and one.unfinished}
    workers = {pool: workers_of(client, pool) for pool in pools}
    seen = [_try_store(url) for url in urls] if store is None else [_store(store)]
    return Overview(runs, devices(client, runs), seen, workers, datetime.now(UTC))


def _store(store: Store) -> StoreStatus:
    return StoreStatus(store.url, stored_bytes(store), store.files.free_bytes(), holders(store))


def _try_store(url: str) -> StoreStatus:
    try:
        return _store(Store(url))
    except (ColdpressError, OSError) as error:
        return StoreStatus(url, problem=str(error))


def markdown(overview: Overview) -> str:
    """The page on the dashboard."""
    lines = [f"as of {overview.now:%Y-%m-%d %H:%M} UTC", ""]
    lines += [f"- **{trouble}**" for trouble in overview.troubles()]
    lines += [f"- {message}" for message in overview.messages()]
    for table in overview.tables():
        rows = [table.columns, ("---",) * len(table.columns), *table.rows]
        cells = (" | ".join(str(cell).replace("|", "/") for cell in row) for row in rows)
        lines += ["", f"### {table.title}", "", *(f"| {row} |" for row in cells)]
    return "\n".join([*lines, "", *(f"- {line}" for line in overview.summary())])


def show(client: SyncPrefectClient, text: str) -> None:
    """Put the page on the dashboard, in place of the one before: a new version each minute would fill the data base."""
    from prefect.client.schemas.actions import ArtifactCreate
    from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey
    from prefect.client.schemas.sorting import ArtifactSort

    wanted = ArtifactFilter(key=ArtifactFilterKey(any_=[KEY]))
    found = client.read_artifacts(artifact_filter=wanted, sort=ArtifactSort.UPDATED_DESC, limit=1)
    if found:
        # Not by the client's method, which also sends the text as an event.
        client.request("PATCH", "/artifacts/{id}", path_params={"id": found[0].id}, json={"data": text})
    else:
        client.create_artifact(ArtifactCreate(key=KEY, type="markdown", data=text, description="what goes on"))


def keep_showing(stop: threading.Event, say: Any) -> None:
    """Refresh the page once a minute, less often where that would take much of the time, until `stop`."""
    from prefect.client.orchestration import get_client

    complained = ""
    ended: dict[str, RunStatus] = {}
    with get_client(sync_client=True) as client:
        while True:
            began = time.monotonic()
            try:
                show(client, markdown(look(client, None, limit=10, ended=ended)))
                complained = ""
            except (httpx.HTTPError, ColdpressError) as error:  # the server is away; the next time, then
                if str(error) != complained:
                    complained = str(error)
                    say(f"the status page is not fresh: {error}")
            if stop.wait(max(SECONDS_BETWEEN_PAGES, (time.monotonic() - began) / _SHARE_OF_TIME)):
                return


def _seconds(since: str, now: datetime) -> float:
    return (now - datetime.fromisoformat(since)).total_seconds() if since else 0.0


def _ago(seconds: float) -> str:
    """ "50 s", "12 min", "3.5 h", "2.1 d"."""
    if seconds < 100:
        return f"{max(seconds, 0):.0f} s"
    if seconds < 6000:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.1f} d"


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"
