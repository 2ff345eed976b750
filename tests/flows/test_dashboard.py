"""What a person sees of a run on Prefect's dashboard, in a browser: while it computes, and when it has ended."""

from __future__ import annotations

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

from tests.faults.runs import environment, start
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


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a Prefect server with a dashboard, which the temporary servers of other tests don't have."""
    home = tmp_path_factory.mktemp("server")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-m", "prefect", "server", "start", "--port", str(port)],
        env=environment(str(home), DO_NOT_TRACK="1", PREFECT_SERVER_ANALYTICS_ENABLED="false"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    address = f"http://127.0.0.1:{port}"
    deadline = time.monotonic() + 300
    while not _answers(f"{address}/api/health"):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.3)
    yield address
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


def test_the_dashboard_shows_what_a_run_does_and_did(
    server: str, browser: Browser, recipe: Path, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    leave_begun(recipe, Store(str(store)))

    def ask(path: str, **query: Any) -> Any:
        return httpx.post(f"{server}/api{path}", json=query, timeout=60).raise_for_status().json()

    (tmp_path / "hold").touch()
    watched = {"PYTHONPATH": str(Path(__file__).parent.parent / "faults" / "watched"), "WATCHED": str(tmp_path)}
    process = start(
        recipe, str(store), "--device", "cpu", PREFECT_API_URL=f"{server}/api", WATCHED_PAUSE="0.2", **watched
    )
    deadline = time.monotonic() + 200
    while not (found := ask("/artifacts/filter", artifacts={"type": {"any_": ["progress"]}})) or found[0]["data"] < 40:
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()
        time.sleep(0.3)
    (run,) = ask("/flow_runs/filter")
    page = f"{server}/runs/flow-run/{run['id']}"
    for n, tab in enumerate(["", "?tab=Task+Runs", "?tab=Artifacts", "?tab=Details"]):
        print(tab, browser.open(page + tab, "seen"))
        time.sleep(8)
        print(browser.ask("document.body.innerText"))
        browser.picture(f"running{n}")
    (tmp_path / "hold").unlink()
    print(process.communicate(timeout=300))
    for n, tab in enumerate(["", "?tab=Task+Runs", "?tab=Artifacts", "?tab=Details", "?tab=Parameters"]):
        print(tab, browser.open(page + tab, "seen"))
        time.sleep(8)
        print(browser.ask("document.body.innerText"))
        browser.picture(f"ended{n}")
    tasks = ask("/task_runs/filter")
    for task in tasks:
        print(task["name"], task["state_name"], task["state"]["message"], task["tags"])
    pruned = next(t for t in tasks if t["name"] == "pruned")
    for n, tab in enumerate(["", "?tab=Artifacts"]):
        print(tab, browser.open(f"{server}/runs/task-run/{pruned['id']}{tab}", "pruned"))
        time.sleep(8)
        print(browser.ask("document.body.innerText"))
        browser.picture(f"task{n}")
    assert 0
