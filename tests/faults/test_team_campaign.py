"""Twenty submitted recipes on two pretended devices, while for ten minutes something is killed every thirty seconds.

Recipes share a store and stages: all of them the model, the texts and an evaluation, five each a pruned model. What
each computing process does it writes down itself (`watched/sitecustomize.py`), which is the evidence that every stage
was published once and that no two were computed on one device at the same time.
"""

from __future__ import annotations

import json
import os
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from coldpress.flows.device_limits import limit_name
from coldpress.storage.inspect import verify
from coldpress.storage.store import Store
from up_process import Up, end, eventually, ids, undisturbed_ids

pytestmark = pytest.mark.long

KILLS = int(os.environ.get("COLDPRESS_TEST_CAMPAIGN_KILLS", "20"))
SECONDS_BETWEEN_KILLS = 30.0  # or more, until a stage has begun since the last one: on a loaded machine that takes
PAUSE = 1.0  # seconds of a stage at each block, which a loaded machine only lengthens
SECONDS_TO_BEGIN, SECONDS_TO_FINISH = 600.0, 3000.0  # a stage after a kill; all runs after the last one
BLOCKS = 10
RECIPE = """\
name: {name}
model: {{source: "{model}"}}
data:
  calibration: {{source: "{text}", samples: 4, length: 32}}
  held_out: {{source: "{text}", split: test, samples: 4, length: 32}}
stages:
  pruned: {{use: prune, method: {pruning}, model: base, {calibration}sparsity: 0.5}}
  quantized: {{use: quantize, {quantizing}, model: pruned}}
evaluate:
  variants: [base, pruned, quantized]
  perplexity: {{data: held_out}}
"""
CALIBRATED = "calibration: calibration, "
PRUNING = {"magnitude": "", "wanda": CALIBRATED, "sparsegpt": CALIBRATED, "wanda-cumulative": CALIBRATED}
QUANTIZING = (
    "method: nf4",
    "method: rtn, bits: 4, group_size: 32",
    "method: rtn, bits: 8, group_size: 32",
    "method: gptq, bits: 4, group_size: 32, calibration: calibration",
    "method: gptq, bits: 3, group_size: 32, calibration: calibration",
)


@pytest.fixture
def recipes(tiny_model_folder: Callable[..., str], text_file: str, tmp_path: Path) -> list[Path]:
    """Twenty: each way to prune with each way to quantize, in an order that mixes them."""
    model = tiny_model_folder("llama", num_hidden_layers=BLOCKS)
    made = []
    for quantizing in QUANTIZING:
        for pruning, calibration in PRUNING.items():
            name = f"team-{len(made):02}"
            filled = {"name": name, "pruning": pruning, "calibration": calibration, "quantizing": quantizing}
            made.append(tmp_path / f"{name}.yaml")
            made[-1].write_text(RECIPE.format(**filled, model=model, text=text_file))
    return made


@pytest.fixture
def up(tmp_path: Path) -> Iterator[Up]:
    (tmp_path / "log").touch()
    watched = {"PYTHONPATH": str(Path(__file__).with_name("watched")), "WATCHED": str(tmp_path)}
    started = Up(tmp_path, "--devices", "0,1", "--limit", "4", **watched, WATCHED_PAUSE=str(PAUSE))
    yield started
    end(started)


class Killer:
    """Kills, at random, what `coldpress up` runs."""

    def __init__(self, up: Up) -> None:
        self._up = up
        self._chance = random.Random(0)
        self._robbed: set[int] = set()
        self.killed: Counter[str] = Counter()

    def kill_something(self) -> str | None:
        """What was killed; None when nothing runs just now."""
        kinds = {
            "a computing process": "coldpress.flows.worker",
            "a flow's process": "prefect.engine",
            "the worker": "worker start",
            "all of a run": "prefect.engine",
        }
        for kind in self._chance.sample(list(kinds), len(kinds)):
            with suppress(psutil.NoSuchProcess):  # it has just ended by itself: something else, then
                candidates = [process for process in self._up.those_that_run(kinds[kind]) if self._may_die(process)]
                if candidates:
                    victim = self._chance.choice(candidates)
                    self._robbed.add(victim.ppid())
                    for process in [*(victim.children(recursive=True) if kind == "all of a run" else ()), victim]:
                        process.kill()
                    self.killed[kind] += 1
                    return kind
        return None

    def _may_die(self, process: psutil.Process) -> bool:
        """A stage whose computing process dies twice has failed, and is to: one for each attempt at a run."""
        return "coldpress.flows.worker" not in process.cmdline() or process.ppid() not in self._robbed

    def kill_server(self) -> None:
        """The database stays; `up` starts it again."""
        (server,) = self._up.those_that_run("server start")
        server.kill()
        self.killed["the server"] += 1


def test_a_team_s_runs_all_end_well_whatever_is_killed(
    up: Up, recipes: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def say(text: str) -> None:
        with capsys.disabled():
            print(f"{time.monotonic() - began:6.0f} s  {text}", flush=True)

    def states() -> dict[str, str]:
        runs = up.ask("POST", "/flow_runs/filter", limit=200, flows={"name": {"any_": ["coldpress"]}})
        return {run["id"]: run["state_name"] for run in runs}

    def all_done() -> bool:
        with suppress(httpx.HTTPError):  # while the server is away
            return set(states().values()) <= {"Completed", "Failed", "Cancelled"}
        return False

    def log() -> list[dict[str, Any]]:
        return [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]

    def events(name: str) -> list[dict[str, Any]]:
        return [line for line in log() if line["event"] == name]

    began = time.monotonic()
    up.submit_all(recipes, "--store", "shared", "--device", "cpu")
    assert len(states()) == len(recipes)
    say(f"{len(recipes)} recipes are submitted")
    killer = Killer(up)
    while killer.killed.total() < KILLS:
        begun = len(log())
        time.sleep(SECONDS_BETWEEN_KILLS)
        eventually(lambda begun=begun: len(log()) > begun or all_done(), SECONDS_TO_BEGIN, pause=1)
        if all_done():
            break
        if killer.killed.total() >= KILLS // 2 and not killer.killed["the server"]:
            killer.kill_server()
        else:
            killer.kill_something()
        say(f"killed so far: {dict(killer.killed)}")
    assert killer.killed.total() > KILLS // 2, "the runs were done too soon"
    say(f"killed {dict(killer.killed)}; now {Counter(states().values())}")
    eventually(all_done, SECONDS_TO_FINISH, pause=2)
    say(f"in the end {Counter(states().values())}")

    # No run is lost, and each has what it would have had undisturbed.
    assert Counter(states().values()) == {"Completed": len(recipes)}
    store = Store(str(tmp_path / "shared"))
    wanted: dict[str, str] = {}
    for recipe in recipes:
        wanted.update(undisturbed_ids(recipe, tmp_path))
    assert ids(tmp_path / "shared") == wanted
    assert verify(store) == []
    assert len(store.runs()) == len(recipes)
    assert {stage["state"] for run in store.runs().values() for stage in run["stages"]} <= {
        *("cached", "computed", "resumed")
    }

    # Each stage was published once, by one of the runs. Killed between writing it and saying so, a process has not
    # said so; whoever came next must then have found it.
    actions = {action.key: action for action in store.actions()}
    assert events("beaten") == []
    published = Counter(line["key"] for line in events("published"))
    assert set(published.values()) == {1}
    assert set(published) <= set(actions) == {line["key"] for line in events("publishing")}
    assert {action.provenance["run"] for action in actions.values()} <= set(store.runs())
    began_in_log = Counter(line["key"] for line in events("computes"))
    resumed = sum("resumed" in action.provenance for action in actions.values())
    say(f"{len(actions)} stages, each published once, begun {began_in_log.total()} times, {resumed} resumed inside")
    assert resumed > 0

    # No two at once on a device, or at a stage; no device is lost, nor anything left behind.
    assert {line["device"] for line in events("computes")} == {"", "0", "1"}
    assert events("shared") == []

    def active() -> list[int]:
        return [up.ask("GET", f"/v2/concurrency_limits/{limit_name(device)}")["active_slots"] for device in "01"]

    eventually(lambda: active() == [0, 0], 120, pause=1)
    assert list((tmp_path / "shared").glob("journals/*")) == []
    # Of who was killed after publishing a lease stays, which keeps nobody waiting; `gc` removes it.
    assert {path.parent.name for path in (tmp_path / "shared").glob("leases/*/*")} <= set(actions)
