"""How long `coldpress` takes when there is nothing to compute.

The shipped recipe runs once in an empty folder; then the same command is timed again, without a Prefect server and
with one that is already running. `coldpress --help` is timed too. Seconds are wall time of the whole process, as a
user waits for it; the median of several.
"""

from __future__ import annotations

import os
import socket
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from .measuring import Row, timed

RECIPE = "smollm2-branching"
ROUNDS = 5


def measure() -> list[Row]:
    """All rows of this benchmark."""
    from coldpress.storage.store import Store

    first = _run("run", RECIPE)
    again = [_run("run", RECIPE) for _ in range(ROUNDS)]
    with _server() as url:
        served = [_run("run", RECIPE, PREFECT_API_URL=url) for _ in range(ROUNDS)]
    shown = [_run("--help") for _ in range(ROUNDS)]

    runs = list(Store(".coldpress").runs().values())
    assert len(runs) == 1 + 2 * ROUNDS
    for run in runs[1:]:
        assert {stage["state"] for stage in run["stages"]} == {"cached"}, "a stage was computed again"
    nodes = len(runs[0]["stages"])
    return [
        Row("coldpress --help", statistics.median(shown), "s", 1.0),
        Row(f"cached run of {nodes} stages, no server", statistics.median(again), "s", 3.0, _spread(again)),
        Row("cached run, server running", statistics.median(served), "s", 5.0, _spread(served)),
        Row("the first run, everything computed", first, "s"),
    ]


def _run(*arguments: str, **environment: str) -> float:
    command = [str(Path(sys.executable).with_name("coldpress")), *arguments]
    return timed(lambda: subprocess.run(command, env={**os.environ, **environment}, check=True))


def _spread(seconds: list[float]) -> str:
    return f"{min(seconds):.2f} to {max(seconds):.2f} s"


@contextmanager
def _server() -> Iterator[str]:
    """A Prefect server on a free port, ready; yields its API's URL."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    prefect = str(Path(sys.executable).with_name("prefect"))
    environment: Mapping[str, str] = {**os.environ, "PREFECT_HOME": str(Path("prefect-server").resolve())}
    command = [prefect, "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    process = subprocess.Popen(command, env=environment)
    url = f"http://127.0.0.1:{port}/api"
    try:
        for _ in range(120):
            try:
                with urllib.request.urlopen(f"{url}/health", timeout=5):
                    break
            except (urllib.error.URLError, OSError):
                assert process.poll() is None, "the Prefect server ended"
                time.sleep(1)
        else:
            raise AssertionError("the Prefect server did not start within two minutes")
        yield url
    finally:
        process.terminate()
        process.wait()
