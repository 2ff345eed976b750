"""`coldpress up` and `submit`, with real processes killed under them: what was begun is finished without a hand."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
from coldpress.storage.artifacts import Artifact
from coldpress.storage.inspect import verify
from coldpress.storage.store import Store
from runs import committed, environment

COLDPRESS = [sys.executable, "-m", "coldpress.flows.cli"]


class Up:
    """`coldpress up` with a PREFECT_HOME of its own, and what one does to it."""

    def __init__(self, folder: Path, **settings: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.folder, self.log = folder, folder / "up.log"
        self.environment = environment(str(folder), **settings)
        self.start()

    def start(self) -> None:
        """Returns when it takes runs."""
        with self.log.open("w") as output:
            self.process = psutil.Popen(
                [*COLDPRESS, "up", "--port", str(self.port)],
                cwd=self.folder,
                env=self.environment,
                stdout=output,
                stderr=output,
            )
        eventually(lambda: "started!" in self.log.read_text() or self.process.poll() is not None, 60)
        assert self.process.poll() is None, self.log.read_text()

    @property
    def environment_of_client(self) -> dict[str, str]:
        return {**self.environment, "PREFECT_API_URL": f"http://127.0.0.1:{self.port}/api"}

    def processes(self) -> list[psutil.Process]:
        return [self.process, *self.process.children(recursive=True)]

    def those_that_run(self, words: str) -> list[psutil.Process]:
        """The processes whose command line has the words."""
        found = []
        for process in self.process.children(recursive=True):
            try:
                if words in " ".join(process.cmdline()):
                    found.append(process)
            except psutil.NoSuchProcess:
                continue
        return found

    def submit(self, recipe: Path, *options: str) -> str:
        """The flow run's id."""
        said = subprocess.run(
            [*COLDPRESS, "submit", str(recipe), *options],
            cwd=recipe.parent,
            env=self.environment_of_client,
            capture_output=True,
            text=True,
            check=False,
        )
        assert said.returncode == 0, said.stderr
        found = re.search(r"on the server (\S+)", said.stdout)
        assert found is not None
        return found[1]

    def ask(self, method: str, path: str, **document: Any) -> Any:
        import httpx

        address = f"http://127.0.0.1:{self.port}/api{path}"
        return httpx.request(method, address, json=document or None, timeout=30).raise_for_status().json()

    def state(self, run: str) -> str:
        return str(self.ask("GET", f"/flow_runs/{run}")["state_name"])

    def states(self, run: str) -> list[str]:
        """The names of all states the run has been in."""
        found = self.ask("GET", f"/flow_run_states/?flow_run_id={run}")
        return [state["name"] for state in sorted(found, key=lambda state: str(state["timestamp"]))]

    def task_runs(self, run: str) -> list[tuple[str, str]]:
        """(stage, state) of each task run, in the order in which they began."""
        query = {"flow_runs": {"id": {"any_": [run]}}, "sort": "EXPECTED_START_TIME_ASC", "limit": 200}
        return [(entry["name"], entry["state_name"]) for entry in self.ask("POST", "/task_runs/filter", **query)]


def eventually(condition: Callable[[], bool], seconds: float, pause: float = 0.05) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, condition
        time.sleep(pause)


def gone(processes: Sequence[psutil.Process], seconds: float) -> bool:
    _, alive = psutil.wait_procs(processes, timeout=seconds)
    return not alive


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


def end(up: Up) -> None:
    started = up.processes()
    up.process.send_signal(signal.SIGTERM)
    try:
        assert gone(started, 60), [process for process in started if process.is_running()]
    finally:
        for process in started:
            if process.is_running():
                process.kill()


def mid_stage(up: Up, store: Path, node: str = "pruned", blocks: int = 3) -> psutil.Process:
    """Waits until the stage has done so many blocks; returns the flow's process."""
    eventually(lambda: committed(str(store), node) >= blocks, 120, pause=0.002)
    (engine,) = up.those_that_run("prefect.engine")
    return engine


def ids(store: Path) -> dict[str, str]:
    return {name: artifact.id for name, artifact in Store(str(store)).refs().items()}


def undisturbed_ids(recipe: Path, folder: Path) -> dict[str, str]:
    """What the recipe's stages give when nothing comes between."""
    from coldpress.flows.recipe import load_recipe
    from coldpress.tasks.stage import Run, compute

    checked, run = load_recipe(str(recipe)), Run(Store(str(folder / "undisturbed")))
    made: dict[str, Artifact] = {}
    for node in checked.nodes:
        inputs = {role: made[name] for role, name in node.inputs.items()}
        made[node.name] = compute(run, node.stage, node.parameters, inputs).artifact
    return {f"{checked.name}/{name}": artifact.id for name, artifact in made.items()}


def test_a_killed_flow_goes_on_from_its_journal_without_a_hand_and_ends_in_the_same_artifacts(
    up: Up, recipe: Path, tmp_path: Path
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
        *[("base", "Cached"), ("calibration", "Cached"), ("pruned", "Completed"), ("gptq", "Completed")],
    ]
    (record,) = Store(str(tmp_path / "killed")).runs().values()
    assert {stage["name"]: stage["state"] for stage in record["stages"]}["pruned"] == "resumed"
    assert ids(tmp_path / "killed") == undisturbed_ids(recipe, tmp_path)
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
    assert gone(processes, 30), [process for process in processes if process.is_running()]
    assert up.process.returncode == 0


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
    assert gone(processes, 60), [process for process in processes if process.is_running()]
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
