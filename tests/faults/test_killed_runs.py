"""Runs of the command line whose processes are really killed, or asked to stop, in the middle of a stage."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from coldpress.storage.inspect import verify
from coldpress.storage.store import Store

BLOCKS = 24
RECIPE = """\
name: killed
model: {{source: "{model}"}}
data:
  calibration: {{source: "{text}", samples: 6, length: 64}}
stages:
  pruned: {{use: prune, method: wanda, model: base, calibration: calibration, sparsity: 0.5}}
  gptq: {{use: quantize, method: gptq, model: pruned, calibration: calibration, group_size: 32}}
"""


@pytest.fixture
def recipe(tiny_model_folder: Callable[..., str], text_file: str, tmp_path: Path) -> Path:
    path = tmp_path / "killed.yaml"
    path.write_text(RECIPE.format(model=tiny_model_folder("llama", num_hidden_layers=BLOCKS), text=text_file))
    return path


def start(recipe: Path, store: str) -> subprocess.Popen[str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("PREFECT_", "COLDPRESS_"))}
    home = str(recipe.parent)
    return subprocess.Popen(
        [sys.executable, "-m", "coldpress.flows.cli", "run", str(recipe), "--store", store, "--json"],
        cwd=home,
        env={**kept, "HOME": home, "PREFECT_HOME": f"{home}/prefect"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(process: subprocess.Popen[str], moment: Callable[[], bool]) -> None:
    """Returns when the moment has come, or the process has ended."""
    deadline = time.monotonic() + 200
    while not moment() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.002)


def committed(store: str, node: str) -> int:
    """Blocks in the journal of a node."""
    for head in Path(store).glob("journals/*/preimage"):
        try:
            if json.loads(head.read_text())["context"]["node"] == node:
                return len(list(head.parent.glob("steps/*")))
        except FileNotFoundError:  # the stage is done
            continue
    return 0


def kill_all(process: subprocess.Popen[str]) -> None:
    """`kill -9` for the run and for what it started."""
    for victim in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
        victim.kill()
    process.communicate()


def finish(process: subprocess.Popen[str]) -> dict[str, Any]:
    output, said = process.communicate(timeout=300)
    assert process.returncode == 0, said
    document: dict[str, Any] = json.loads(output)
    return document


def test_killed_runs_go_on_from_their_last_block_and_end_in_the_same_artifacts(recipe: Path, tmp_path: Path) -> None:
    store = str(tmp_path / "killed")
    chance = random.Random(0)
    for node in ("pruned", "gptq"):
        blocks = chance.randrange(1, BLOCKS // 2)
        process = start(recipe, store)
        wait_for(process, lambda node=node, blocks=blocks: committed(store, node) >= blocks)  # type: ignore[misc]
        assert process.poll() is None, process.communicate()
        kill_all(process)
        assert verify(Store(store)) == []
    after = finish(start(recipe, store))
    assert verify(Store(store)) == []
    states = {stage["name"]: stage["state"] for stage in after["stages"]}
    assert states == {"base": "cached", "calibration": "cached", "pruned": "cached", "gptq": "resumed"}
    for stage in ("prune/wanda", "quantize/gptq"):
        (action,) = Store(store).actions(stage)
        assert 0 < action.provenance["resumed"]["from_block"] <= BLOCKS

    undisturbed = finish(start(recipe, str(tmp_path / "undisturbed")))
    assert {stage["state"] for stage in undisturbed["stages"]} == {"computed"}
    ids = [{stage["name"]: stage["artifact"] for stage in run["stages"]} for run in (after, undisturbed)]
    assert ids[0] == ids[1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_asked_to_stop_is_pre_empted_and_goes_on_later(
    recipe: Path, tmp_path: Path, number: signal.Signals
) -> None:
    store = str(tmp_path / "stopped")
    process = start(recipe, store)
    wait_for(process, lambda: committed(store, "pruned") >= 3)
    process.send_signal(number)
    time.sleep(0.01)
    process.send_signal(number)  # as launchers do: to the process, and to its group
    output, said = process.communicate(timeout=60)
    assert process.returncode == 128 + number, said
    assert "the same command goes on from there" in said
    states = {stage["name"]: stage["state"] for stage in json.loads(output)["stages"]}
    assert states == {"base": "computed", "calibration": "computed", "pruned": "pre-empted", "gptq": "skipped"}
    assert verify(Store(store)) == []

    again = finish(start(recipe, store))
    assert {stage["name"]: stage["state"] for stage in again["stages"]}["pruned"] == "resumed"
    note = next(Store(store).actions("prune/wanda")).provenance["resumed"]
    assert note["from_block"] >= 3
    assert note["recomputed_blocks"] == 0
