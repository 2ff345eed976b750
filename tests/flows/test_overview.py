"""What `coldpress status` and the page on the dashboard say: devices, who waits for whom, what is stuck."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from coldpress.flows import overview
from coldpress.flows.deployment import prepare_server
from coldpress.flows.device_limits import DeviceLimits, device_note
from coldpress.flows.execution import _ProgressArtifact
from coldpress.flows.overview import Overview, StoreStatus, keep_showing, look, markdown, show
from coldpress.flows.provenance import Dashboard
from coldpress.flows.run import run_tags
from coldpress.flows.status import RunStatus, StageStatus, devices, statuses
from coldpress.flows.submit import submit
from coldpress.storage.leases import Claim, Heartbeat
from coldpress.storage.store import Store

NOW = datetime(2026, 11, 22, 12, tzinfo=UTC)


def ago(**time: float) -> str:
    return (NOW - timedelta(**time)).isoformat()


def run(name: str, state: str = "Running", **about: Any) -> RunStatus:
    usual: dict[str, Any] = {
        "recipe": "tiny",
        "user": "ann",
        "message": "",
        "attempts": 1,
        "preempted": 0,
        "crashed": 0,
    }
    usual |= {"pool": "coldpress", "moved": ago(minutes=1), "unfinished": True, "id": name}
    return RunStatus(run=name, state=state, **{**usual, **about})


def seen(*runs: RunStatus, **about: Any) -> Overview:
    usual: dict[str, Any] = {"devices": [], "stores": [], "workers": {"coldpress": 1}}
    return Overview(list(runs), now=NOW, **{**usual, **about})


def rows(found: Overview, title: str) -> list[tuple[str, ...]]:
    return [row for table in found.tables() if table.title == title for row in table.rows]


def test_who_waits_and_who_works_are_told_apart() -> None:
    working = StageStatus("gptq", "Running", 50.0, "solving 3/6, on device 0")
    waiting = StageStatus("nf4", "Running", 0.0, "waiting for run r1 on node (process 7) solving 3/6")
    found = seen(run("r1", stages=[working]), run("r2", stages=[waiting, StageStatus("base", "Completed")]))
    assert rows(found, "at work") == [("r1", "gptq", "solving 3/6, on device 0")]
    assert rows(found, "waiting") == [("r2", "nf4", "run r1 on node (process 7) solving 3/6")]
    assert [row[5] for row in rows(found, "runs")] == ["0 of 1", "1 of 2"]


def test_runs_that_seem_stuck_are_pointed_out_and_others_not() -> None:
    fine = [run("fine"), run("done", "Completed", unfinished=False, moved=ago(days=3), crashed=9)]
    stuck = [
        run("silent", moved=ago(minutes=43)),
        run("unlucky", preempted=2, crashed=1),
        run("forgotten", "Scheduled", pool="gpu", moved=ago(minutes=5)),
    ]
    assert list(seen(*fine).troubles()) == []
    assert list(seen(*fine, *stuck, workers={"coldpress": 1, "gpu": 0}).troubles()) == [
        "run silent has made no progress for 43 min; see `coldpress logs silent`",
        "run unlucky was pre-empted 2 times and crashed once",
        "run forgotten waits for a worker, and pool gpu has none; `coldpress up --no-server --pool gpu` starts one",
    ]


def test_the_page_has_the_tables_and_survives_what_is_in_them() -> None:
    text = markdown(seen(run("r1", recipe="a|b"), stores=[StoreStatus("/store", 2_500_000, 10**10)]))
    assert "| r1 | a/b | ann | coldpress | Running |" in text
    assert "- store /store: 2.5 MB, 10.0 GB free" in text


@pytest.fixture
def client(prefect_server: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    from prefect.client.orchestration import get_client

    monkeypatch.setattr("coldpress.flows.submit.server_configured", lambda: True)
    with get_client(sync_client=True) as asking:
        prepare_server(asking, "coldpress", 30)
        yield asking


def test_a_device_says_which_stage_has_it_until_the_stage_waits_again(client: Any) -> None:
    import prefect

    limits = DeviceLimits(["9"])
    lease = limits.acquire("9", lambda: None)
    assert lease is not None
    seen: list[dict[str, Any]] = []

    def look_at(run: str) -> dict[str, Any]:
        found = statuses(client, run)
        (one,) = [entry for entry in devices(client, found) if entry["device"] == "9"]
        return one

    @prefect.task(task_run_name="gptq", persist_result=False)
    def work(flow_run: str) -> None:
        shown = _ProgressArtifact(Dashboard(), "tiny", "gptq")
        shown.take("9", "beginning, on device 9")
        for _ in range(100):  # task runs reach the server as events
            seen.append(look_at(flow_run))
            if "run" in seen[-1]:
                break
        shown.describe("waiting for device 9")
        seen.append(look_at(flow_run))

    @prefect.flow(name="tiny", flow_run_name="20991231T000000-device")
    def tiny() -> None:
        work(str(prefect.runtime.flow_run.id))

    with prefect.tags(*run_tags("tiny", "cpu")):
        tiny()
    limits.release(lease)
    had, lost = seen[-2:]
    assert (had["run"], had["stage"], had["taken"]) == ("20991231T000000-device", "gptq", True)
    assert had["host"] == device_note("9")["host"]
    assert datetime.now(UTC) - datetime.fromisoformat(had["since"]) < timedelta(minutes=5)
    assert "run" not in lost


def test_leases_of_a_store_show_who_computes_what(client: Any, store: Store) -> None:
    claim = Claim(store, "ab" * 32, {"run": "r1", "recipe": "tiny", "node": "gptq", "inputs": {}})
    lease = claim.acquire()
    assert lease is not None
    with Heartbeat(store, lease, {"run": "r1", "recipe": "tiny", "node": "gptq", "inputs": {}}):
        ((name, stage, process, _),) = rows(look(client, store, limit=1), f"being computed for {store.url}")
    assert (name, stage) == ("r1", "gptq")
    assert "ended" not in process
    assert rows(look(client, store, limit=1), f"being computed for {store.url}") == []


def test_runs_of_a_schedule_that_are_not_due_do_not_hide_others(client: Any, tiny_recipe: Path, store: Store) -> None:
    from prefect.states import Scheduled

    due = submit(str(tiny_recipe), store, overrides=(), only=(), pool="coldpress", device="cpu")
    deployment = client.read_deployment_by_name("coldpress/coldpress")
    tomorrow: Any = Scheduled(scheduled_time=datetime.now(UTC) + timedelta(days=1))
    later = client.create_flow_run_from_deployment(
        deployment.id, parameters={"text": "", "store": store.url}, state=tomorrow, tags=run_tags("tiny", "cpu")
    )
    names = [entry.id for entry in statuses(client, limit=1)]
    assert str(due.id) in names
    assert str(later.id) not in names


def test_the_page_is_kept_fresh_in_place(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey

    wanted = ArtifactFilter(key=ArtifactFilterKey(any_=[overview.KEY]))
    show(client, "first")
    over = threading.Event()
    over.set()
    said: list[str] = []
    keep_showing(over, said.append)
    (kept,) = client.read_artifacts(artifact_filter=wanted)
    assert said == []
    assert str(kept.data).startswith("as of ")


def test_a_store_that_can_not_be_read_is_said_and_hides_nothing(
    client: Any, monkeypatch: pytest.MonkeyPatch, tiny_recipe: Path, store: Store, new_store: Callable[[], Store]
) -> None:
    submit(str(tiny_recipe), store, overrides=(), only=(), pool="coldpress", device="cpu")
    monkeypatch.setattr(
        overview, "stored_bytes", lambda store: (_ for _ in ()).throw(PermissionError(13, "not for you"))
    )
    assert any("not for you" in trouble for trouble in look(client, None, limit=1).troubles())
