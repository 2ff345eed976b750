"""What a person sees of a run on Prefect's dashboard, in a browser: while it computes, and when it has ended."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from coldpress.flows.recipe import load_recipe
from coldpress.storage.artifacts import Artifact
from coldpress.storage.store import Store
from coldpress.tasks.stage import Preempted, Run, compute

from tests.faults.runs import environment, kill_all, start
from tests.faults.watched.sitecustomize import HELD_AT
from tests.flows.browser import CHROMIUM, Browser

pytestmark = [pytest.mark.long, pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here")]

RECIPE = """\
name: seen
model: {{source: "{model}"}}
data:
  calibration: {{source: "{text}", samples: 3, length: 32}}
  held_out: {{source: "{text}", split: test, samples: 3, length: 32}}
  too_short: {{source: "{short}", split: test, samples: 3, length: 32}}
stages:
  pruned: {{use: prune, method: wanda, model: base, calibration: calibration, sparsity: 0.5}}
  gptq: {{use: quantize, method: gptq, model: pruned, calibration: calibration, group_size: 32}}
evaluate:
  variants: [base, gptq]
  perplexity: {{data: held_out}}
  other: {{method: perplexity, data: too_short, variants: [base]}}
"""
BLOCKS = 6
WATCHED = Path(__file__).parent.parent / "faults" / "watched"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a Prefect server with a dashboard, which the temporary servers of other tests don't have."""
    home = tmp_path_factory.mktemp("server")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-m", "prefect", "server", "start", "--port", str(port)],
        env=environment(
            str(home),
            DO_NOT_TRACK="1",
            PREFECT_SERVER_ANALYTICS_ENABLED="false",
            PREFECT_UI_API_URL="/api",  # as `coldpress up` sets it
        ),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    address = f"http://127.0.0.1:{port}"
    deadline = time.monotonic() + 600
    try:
        while not _answers(f"{address}/api/health"):
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.3)
        yield address
    finally:
        process.terminate()
        process.wait(60)


def _answers(address: str) -> bool:
    try:
        return httpx.get(address, timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    opened = Browser(tmp_path)
    yield opened
    opened.close()


@pytest.fixture
def recipe(tiny_model_folder: Callable[..., str], text_file: str, tmp_path: Path) -> Path:
    """A data entry of it has bytes enough and tokens too few, which only tokenizing can tell."""
    model = tiny_model_folder("llama", num_hidden_layers=BLOCKS)
    short = tmp_path / "short.txt"
    short.write_text("the " * 26)
    path = tmp_path / "seen.yaml"
    path.write_text(RECIPE.format(model=model, text=text_file, short=short))
    return path


def leave_begun(recipe: Path, store: Store) -> None:
    """The sources done, and `pruned` stopped after some blocks, as an earlier run might have left them."""
    made: dict[str, Artifact] = {}
    checked = load_recipe(str(recipe))
    for name in ("base", "calibration"):
        node = checked.node(name)
        inputs = {role: made[other] for role, other in node.inputs.items()}
        made[name] = compute(Run(store), node.stage, node.parameters, inputs).artifact
    steps: list[int] = []
    run = Run(store, progress=lambda what, done, total: steps.append(done), stop_asked=lambda: len(steps) >= 3)
    node = checked.node("pruned")
    with pytest.raises(Preempted):
        compute(run, node.stage, node.parameters, {role: made[name] for role, name in node.inputs.items()})


@pytest.fixture
def held(server: str, recipe: Path, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """`coldpress run` on that server, held in the middle of the resumed stage while there is a file `hold`."""
    leave_begun(recipe, Store(str(tmp_path / "store")))
    (tmp_path / "hold").touch()
    watched = {"PYTHONPATH": str(WATCHED), "WATCHED": str(tmp_path), "WATCHED_PAUSE": "0.5"}
    process = start(recipe, str(tmp_path / "store"), "--device", "cpu", PREFECT_API_URL=f"{server}/api", **watched)
    yield process
    if process.poll() is None:
        kill_all(process)


def test_the_dashboard_shows_what_a_run_does_and_did(
    server: str, browser: Browser, held: subprocess.Popen[str], tmp_path: Path
) -> None:
    def ask(path: str, **query: Any) -> Any:
        return httpx.post(f"{server}/api{path}", json=query, timeout=60).raise_for_status().json()

    def progress() -> dict[str, float]:
        found = ask("/artifacts/filter", artifacts={"type": {"any_": ["progress"]}})
        return {entry["description"]: entry["data"] for entry in found}

    deadline = time.monotonic() + 300
    while max(progress().values(), default=0) < 100 * HELD_AT / BLOCKS:
        assert time.monotonic() < deadline
        assert held.poll() is None, held.communicate()
        time.sleep(0.3)
    (run,) = ask("/flow_runs/filter")
    page = f"{server}/runs/flow-run/{run['id']}"

    # While it computes: what it is, whose and for what device; how far the stage is and how long it will take.
    browser.open(page, "Running", "recipe:seen", "user:", "device:cpu", "Cached")
    browser.picture("running")
    shown = browser.click("Artifacts", "seen-pruned-progress", "seen-base")
    browser.picture("running-artifacts")
    (doing,) = progress()
    assert re.fullmatch(rf"pruned: pruning {HELD_AT}/{BLOCKS}, \d+ s left", doing)
    assert doing in shown

    (tmp_path / "hold").unlink()
    held.communicate(timeout=300)
    assert held.returncode == 1  # one of its stages fails

    # When it has ended: how each stage did, and the report.
    browser.open(page, "Failed", "2 of 11 stages did not finish: too_short, base/other")
    browser.picture("ended")
    shown = browser.click("Task Runs", "too_short", "gptq/perplexity")
    browser.picture("ended-stages")
    for state in ("Cached", "Resumed", "Completed", "Failed", "Skipped"):
        assert state in shown
    browser.click("Artifacts", "seen-report", "report of seen", "pruned (resumed)", "gptq (computed)", "base (cached)")
    browser.picture("ended-artifacts")
    graph = httpx.get(f"{server}/api/flow_runs/{run['id']}/graph-v2", timeout=60).json()
    drawn = {node["label"]: node["state_type"] for _, node in graph["nodes"]}
    assert drawn["pruned"] == drawn["gptq"] == "COMPLETED"  # the graph itself is a picture, without words in the page
    assert drawn["too_short"] == "FAILED"

    # One stage: where it went on, and where its result came from.
    (pruned,) = ask("/task_runs/filter", task_runs={"name": {"any_": ["pruned"]}})
    browser.open(f"{server}/runs/task-run/{pruned['id']}", "pruned", "Resumed", "prune")
    browser.picture("stage")
    browser.click("Artifacts", "seen-pruned")
    browser.picture("stage-artifacts")
    (artifact,) = ask("/artifacts/filter", artifacts={"key": {"any_": ["seen-pruned"]}})
    browser.open(f"{server}/artifacts/artifact/{artifact['id']}", "prune/wanda", "from block", f"of {BLOCKS}", "cpu on")
    browser.picture("provenance")
    (report,) = ask("/artifacts/filter", artifacts={"key": {"any_": ["seen-report"]}})
    browser.open(
        f"{server}/artifacts/artifact/{report['id']}", "gptq has the best perplexity", "because too_short failed"
    )
    browser.picture("report")
