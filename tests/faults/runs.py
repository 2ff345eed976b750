"""Runs of the command line in processes of their own, on a tiny model, to be killed and stopped."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from glob import glob
from pathlib import Path
from typing import Any

import psutil

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


def environment(home: str, **more: str | None) -> dict[str, str]:
    """As a user with that home has it, without the settings of whoever runs the tests. None takes a variable out."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("PREFECT_", "COLDPRESS_"))}
    wanted = {**kept, "HOME": home, "PREFECT_HOME": f"{home}/prefect", **more}
    return {key: value for key, value in wanted.items() if value is not None}


def start(recipe: Path, store: str, *options: str, **more: str | None) -> subprocess.Popen[str]:
    """`coldpress run` in a process of its own; `more` goes into its environment."""
    return subprocess.Popen(
        [sys.executable, "-m", "coldpress.flows.cli", "run", str(recipe), "--store", store, "--json", *options],
        cwd=recipe.parent,
        env=environment(str(recipe.parent), **more),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> dict[str, Any]:
    """The JSON document of a run that must end well."""
    output, said = process.communicate(timeout=300)
    assert process.returncode == 0, said
    document: dict[str, Any] = json.loads(output)
    return document


def states(document: dict[str, Any]) -> dict[str, str]:
    return {stage["name"]: stage["state"] for stage in document["stages"]}


def artifacts(document: dict[str, Any]) -> dict[str, str]:
    return {stage["name"]: stage["artifact"] for stage in document["stages"]}


def kill_all(process: subprocess.Popen[str]) -> None:
    """`kill -9` for the run and for what it started."""
    for victim in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
        victim.kill()
    process.communicate()


def wait_for(process: subprocess.Popen[str], moment: Callable[[], bool]) -> None:
    """Returns when the moment has come, or the process has ended."""
    deadline = time.monotonic() + 200
    while not moment() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.002)


def committed(store: str, node: str) -> int:
    """Blocks in the journal of a node."""
    most = 0
    for path in map(Path, glob(f"{store}/journals/*/*/head")):  # Path.glob fails at a journal that goes meanwhile
        try:
            head = json.loads(path.read_text())
        except FileNotFoundError:  # the stage is done
            continue
        if head["context"].get("node") == node:  # one that a stage asked for itself has no node
            most = max(most, len(head["steps"]) + len(glob(f"{path.parent}/steps/*")))
    return most


def holders(store: str) -> set[int]:
    """Process numbers of the runs that hold a lease."""
    return {json.loads(path.read_text())["pid"] for path in Path(store).glob("leases/*/*")}


@contextmanager
def a_server(home: str) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """A Prefect server on a free port, ready: its API's address, and its process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    quiet = {"DO_NOT_TRACK": "1", "PREFECT_SERVER_ANALYTICS_ENABLED": "false"}
    process = subprocess.Popen(
        [sys.executable, "-m", "prefect", "server", "start", "--port", str(port)],
        env=environment(home, **quiet),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    address = f"http://127.0.0.1:{port}/api"
    deadline = time.monotonic() + 120
    while True:
        try:
            urllib.request.urlopen(f"{address}/health", timeout=2).close()
            break
        except (urllib.error.URLError, OSError):
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.3)
    yield address, process
    process.terminate()
    process.wait(30)
