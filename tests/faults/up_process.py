"""`coldpress up` in a process of its own, asked over HTTP and by signals, for tests that kill what it runs."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
from coldpress.storage.artifacts import Artifact
from coldpress.storage.store import Store
from runs import environment

COLDPRESS = [sys.executable, "-m", "coldpress.flows.cli"]
SUBMIT_ALL = """\
import sys
from coldpress.flows.cli import main
recipes, options = sys.argv[1].split(":"), sys.argv[2:]
for recipe in recipes:
    for again in range(10):  # a server on a loaded machine says that it is too busy
        try:
            main(["submit", recipe, *options], standalone_mode=False)
        except SystemExit:
            continue
        break
"""


class Up:
    """`coldpress up` with a PREFECT_HOME of its own, and what one does to it. options: of the command line."""

    def __init__(self, folder: Path, *options: str, **settings: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.folder, self.log, self.options = folder, folder / "up.log", options
        self.environment = environment(str(folder), **settings)
        self.start()

    def start(self) -> None:
        """Returns when it takes runs."""
        with self.log.open("w") as output:
            self.process = psutil.Popen(
                [*COLDPRESS, "up", "--port", str(self.port), *self.options],
                cwd=self.folder,
                env=self.environment,
                stdout=output,
                stderr=output,
            )
        eventually(lambda: "started!" in self.log.read_text() or self.process.poll() is not None, 700)
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
        (run,) = self.submit_all([recipe], *options)
        return run

    def submit_all(self, recipes: Sequence[Path], *options: str) -> list[str]:
        """`coldpress submit` for recipes of one folder, without starting Python for each; the flow runs' ids."""
        said = subprocess.run(
            [sys.executable, "-c", SUBMIT_ALL, ":".join(map(str, recipes)), *options],
            cwd=recipes[0].parent,
            env=self.environment_of_client,
            capture_output=True,
            text=True,
            check=False,
        )
        assert said.returncode == 0, said.stderr
        found = re.findall(r"on the server (\S+)", said.stdout)
        assert len(found) == len(recipes), said.stderr
        return found

    def ask(self, method: str, path: str, **document: Any) -> Any:
        import httpx

        address = f"http://127.0.0.1:{self.port}/api{path}"
        return httpx.request(method, address, json=document or None, timeout=120).raise_for_status().json()

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
    """Whether all have ended in time. A zombie has: in a container nothing may reap it once its parent is dead."""
    deadline = time.monotonic() + seconds
    while not all(ended(process) for process in processes):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def ended(process: psutil.Process) -> bool:
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:  # between the one and the other
        return True


def end(up: Up) -> None:
    started = up.processes()
    up.process.send_signal(signal.SIGTERM)
    try:
        assert gone(started, 120), [process for process in started if not ended(process)]
    finally:
        for process in started:
            if process.is_running():
                process.kill()


def ids(store: Path | str) -> dict[str, str]:
    return {name: artifact.id for name, artifact in Store(str(store)).refs().items()}


def undisturbed_ids(recipe: Path, folder: Path) -> dict[str, str]:
    """What the recipe's stages give when nothing comes between. Recipes that share a folder share their stages."""
    from coldpress.flows.recipe import load_recipe
    from coldpress.flows.worker import Worker
    from coldpress.tasks.stage import lookup

    checked, store = load_recipe(str(recipe)), Store(str(folder / "undisturbed"))
    made: dict[str, Artifact] = {}
    worker = None
    try:
        for node in checked.nodes:
            inputs = {role: made[name] for role, name in node.inputs.items()}
            action = lookup(store, node.stage, node.parameters, inputs, "cpu")
            if action is None:
                # In a process like those of a run: on some processors the number of threads changes last digits.
                worker = worker or Worker("cpu")
                action = worker.compute(store, node.stage, node.parameters, inputs, {}, lambda *_: None)
            made[node.name] = action.artifact
    finally:
        if worker is not None:
            worker.kill()
    return {f"{checked.name}/{name}": artifact.id for name, artifact in made.items()}
