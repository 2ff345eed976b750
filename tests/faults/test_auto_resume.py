"""`coldpress up` and `submit`, with real processes killed under them: what was begun is finished without a hand."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from coldpress.storage.inspect import verify
from coldpress.storage.store import Store
from runs import committed
from up_process import Up, end, ended, eventually, gone, ids, undisturbed_ids


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    started = Up(tmp_path_factory.mktemp("up"))
    yield started
    if started.process.poll() is None:
        end(started)


@pytest.fixture
def up(shared: Up) -> Up:
    """One for all tests, started again for those that come after a test that ended it."""
    if shared.process.poll() is not None:
        shared.start()
    return shared


def mid_stage(up: Up, store: Path, node: str = "pruned", blocks: int = 3) -> psutil.Process:
    """Waits until the stage has done so many blocks; returns the flow's process."""
    eventually(lambda: committed(str(store), node) >= blocks, 120, pause=0.002)
    (engine,) = up.those_that_run("prefect.engine")
    return engine


def test_a_killed_flow_goes_on_from_its_journal_without_a_hand_and_ends_in_the_same_artifacts(
    up: Up, recipe: Path, undisturbed: Path, tmp_path: Path
) -> None:
    run = up.submit(recipe, "--store", "killed")  # relative: to where it was submitted, not to where it runs
    engine = mid_stage(up, tmp_path / "killed")
    computing = engine.children(recursive=True)
    engine.kill()
    assert computing
    assert gone(computing, 2.0)  # what computes does not outlive its flow
    eventually(lambda: up.state(run) == "Completed", 60)
    assert up.ask("GET", f"/flow_runs/{run}")["run_count"] == 2
    (action,) = Store(str(tmp_path / "killed")).actions("prune/wanda")
    assert action.provenance["resumed"]["from_block"] >= 3
    assert action.provenance["attempt"] == 2

    # Both attempts are there to be seen, with nothing that seems to run for ever.
    eventually(lambda: ("gptq", "Completed") in up.task_runs(run), 20)
    assert up.task_runs(run) == [
        *[("base", "Completed"), ("calibration", "Completed"), ("pruned", "Crashed")],
        *[("base", "Cached"), ("calibration", "Cached"), ("pruned", "Resumed"), ("gptq", "Completed")],
    ]
    (record,) = Store(str(tmp_path / "killed")).runs().values()
    assert {stage["name"]: stage["state"] for stage in record["stages"]}["pruned"] == "resumed"
    assert ids(tmp_path / "killed") == undisturbed_ids(recipe, undisturbed)
    assert verify(Store(str(tmp_path / "killed"))) == []


def test_a_cancelled_run_stays_cancelled(up: Up, recipe: Path, tmp_path: Path) -> None:
    run = up.submit(recipe, "--store", "cancelled")
    engine = mid_stage(up, tmp_path / "cancelled")
    processes = [engine, *engine.children(recursive=True)]
    up.ask("POST", f"/flow_runs/{run}/set_state", state={"type": "CANCELLING"})
    assert gone(processes, 30)
    eventually(lambda: up.state(run) == "Cancelled", 20)
    time.sleep(4)  # longer than a crashed run needs to be scheduled again
    assert up.state(run) == "Cancelled"
    assert "AwaitingRetry" not in up.states(run)


def test_sigterm_ends_everything_and_keeps_what_was_done(up: Up, recipe: Path, tmp_path: Path) -> None:
    up.submit(recipe, "--store", "stopped")
    mid_stage(up, tmp_path / "stopped", "gptq")
    stop_in_good_order(up)
    assert committed(str(tmp_path / "stopped"), "gptq") >= 3


def stop_in_good_order(up: Up) -> None:
    processes = up.processes()
    assert len(processes) >= 5  # the supervisor, server, worker, flow, and what computes
    up.process.send_signal(signal.SIGTERM)
    assert gone(processes, 30), [process for process in processes if not ended(process)]
    assert up.process.wait(1) == 0


@pytest.mark.long
def test_what_sigterm_stopped_goes_on_with_the_next_up(up: Up, recipe: Path, tmp_path: Path) -> None:
    run = up.submit(recipe, "--store", "stopped")
    mid_stage(up, tmp_path / "stopped", "gptq")
    stop_in_good_order(up)
    up.start()
    eventually(lambda: up.state(run) == "Completed", 60)
    assert "Pre-empted" in up.states(run)
    (action,) = Store(str(tmp_path / "stopped")).actions("quantize/gptq")
    assert action.provenance["resumed"]["recomputed_blocks"] == 0


@pytest.mark.long
def test_a_worker_that_dies_with_its_flow_is_noticed_by_the_missing_heartbeat(
    up: Up, recipe: Path, tmp_path: Path
) -> None:
    run = up.submit(recipe, "--store", "silent")
    engine = mid_stage(up, tmp_path / "silent")
    (worker,) = up.those_that_run("worker start")
    for victim in (worker, engine):
        victim.kill()
    eventually(lambda: up.state(run) == "Completed", 200)
    assert up.ask("GET", f"/flow_runs/{run}")["run_count"] == 2
    assert "started!" in up.log.read_text().split("the worker ended (killed by SIGKILL)")[1]


@pytest.mark.long
def test_a_worker_that_dies_alone_leaves_a_flow_that_ends_itself_and_goes_on(
    up: Up, recipe: Path, tmp_path: Path
) -> None:
    run = up.submit(recipe, "--store", "orphaned")
    mid_stage(up, tmp_path / "orphaned")
    (worker,) = up.those_that_run("worker start")
    worker.kill()
    eventually(lambda: up.state(run) == "Completed", 60)
    assert "Pre-empted" in up.states(run)


@pytest.mark.long
def test_a_machine_that_loses_power_goes_on_with_the_next_up(up: Up, recipe: Path, tmp_path: Path) -> None:
    run = up.submit(recipe, "--store", "dark")
    mid_stage(up, tmp_path / "dark")
    processes = up.processes()
    for process in processes:
        process.kill()
    assert gone(processes, 10)
    up.start()
    eventually(lambda: up.state(run) == "Completed", 200)
    assert up.ask("GET", f"/flow_runs/{run}")["run_count"] == 2


@pytest.mark.long
def test_a_supervisor_that_is_killed_takes_everything_with_it(up: Up, recipe: Path, tmp_path: Path) -> None:
    up.submit(recipe, "--store", "headless")
    mid_stage(up, tmp_path / "headless")
    processes = up.processes()
    up.process.kill()
    assert gone(processes, 60), [process for process in processes if not ended(process)]
    up.start()


@pytest.mark.long
def test_a_run_that_dies_again_and_again_is_given_up(
    recipe: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    up = Up(tmp_path_factory.mktemp("capped"), COLDPRESS_MAX_ATTEMPTS="2")
    try:
        run = up.submit(recipe, "--store", "doomed")
        for node in ("pruned", "gptq"):
            mid_stage(up, tmp_path / "doomed", node).kill()
        eventually(lambda: up.state(run) == "Failed", 60)
        assert "given up after 2 attempts" in up.ask("GET", f"/flow_runs/{run}")["state"]["message"]
        time.sleep(10)
        assert up.state(run) == "Failed"
    finally:
        end(up)
