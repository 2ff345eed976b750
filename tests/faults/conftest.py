"""Fixtures of the fault tests: a recipe on a tiny model, and a Prefect server that runs can share."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from runs import BLOCKS, RECIPE, environment


@pytest.fixture
def recipe(tiny_model_folder: Callable[..., str], text_file: str, tmp_path: Path) -> Path:
    path = tmp_path / "killed.yaml"
    path.write_text(RECIPE.format(model=tiny_model_folder("llama", num_hidden_layers=BLOCKS), text=text_file))
    return path


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The API address of a Prefect server that all runs of the tests can share."""
    with a_server(str(tmp_path_factory.mktemp("server"))) as (address, _):
        yield address


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
