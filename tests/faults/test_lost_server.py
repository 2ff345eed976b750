"""A Prefect server that is killed in the middle of a run: every stage is done, and the run ends by itself."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from coldpress.storage.inspect import verify
from coldpress.storage.store import Store
from runs import a_server, environment


@pytest.mark.long
def test_a_server_that_is_killed_costs_what_the_dashboard_shows(
    recipe: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    store = Store(str(tmp_path / "store"))
    command = [sys.executable, "-m", "coldpress.flows.cli", "run", str(recipe), "--store", store.url, "--json"]
    with a_server(str(tmp_path_factory.mktemp("server"))) as (address, server):
        run = subprocess.Popen(
            command,
            cwd=tmp_path,
            env=environment(str(tmp_path), PREFECT_API_URL=address),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        deadline = time.monotonic() + 120
        while not list(store.actions("source/model")):
            assert time.monotonic() < deadline
            assert run.poll() is None
            time.sleep(0.02)
        server.kill()
        printed, said = run.communicate(timeout=240)
    assert run.returncode == 0, said
    assert {stage["state"] for stage in json.loads(printed)["stages"]} == {"computed"}
    assert "the Prefect server could not be told how the run ended" in said
    assert "Traceback" not in said
    assert verify(store) == []
