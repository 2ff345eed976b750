"""A run of the command line whose store is on S3, where every fifth request fails or hangs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import uuid
from collections.abc import Callable
from pathlib import Path

import fsspec
import pytest
from coldpress.storage.inspect import verify
from coldpress.storage.store import Store

from tests.faults.flaky_proxy import FlakyProxy

RECIPE = """\
name: flaky
model: {{source: "{model}"}}
data:
  calibration: {{source: "{text}", samples: 6, length: 64}}
stages:
  pruned: {{use: prune, method: wanda, model: base, calibration: calibration, sparsity: 0.5}}
  gptq: {{use: quantize, method: gptq, model: pruned, calibration: calibration, group_size: 32}}
"""


@pytest.fixture
def recipe(tiny_model_folder: Callable[..., str], text_file: str, tmp_path: Path) -> Path:
    path = tmp_path / "flaky.yaml"
    path.write_text(RECIPE.format(model=tiny_model_folder("llama"), text=text_file))
    return path


def start(recipe: Path, store: str, **environment: str) -> subprocess.Popen[str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("PREFECT_", "COLDPRESS_"))}
    home = str(recipe.parent)
    return subprocess.Popen(
        [sys.executable, "-m", "coldpress.flows.cli", "run", str(recipe), "--store", store, "--json"],
        cwd=home,
        env={**kept, "HOME": home, "PREFECT_HOME": f"{home}/prefect-{uuid.uuid4().hex}", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> dict[str, tuple[str, str]]:
    """State and artifact of each stage, when the run has ended well."""
    output, said = process.communicate(timeout=200)
    assert process.returncode == 0, said
    return {stage["name"]: (stage["state"], stage["artifact"]) for stage in json.loads(output)["stages"]}


def test_a_run_ends_well_though_a_fifth_of_the_requests_fail_or_hang(
    recipe: Path, tmp_path: Path, proxy: FlakyProxy, s3_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = {
        "AWS_ENDPOINT_URL": proxy.url,
        "COLDPRESS_REMOTE_TIMEOUT_SECONDS": "1",
        "COLDPRESS_CACHE": str(tmp_path / "cache"),
    }
    proxy.fail(0.2)
    runs = start(recipe, str(tmp_path / "near")), start(recipe, s3_url, **environment)
    near, far = map(finish, runs)
    assert far == near
    assert {state for state, _ in far.values()} == {"computed"}
    assert set(proxy.fates) == {"pass", "503", "dropped", "lost", "hang"}

    again = finish(start(recipe, s3_url, **environment))
    assert again == {name: ("cached", artifact) for name, (_, artifact) in near.items()}
    monkeypatch.setitem(fsspec.config.conf, "s3", {"endpoint_url": proxy.url})
    proxy.fate = lambda method, path: "pass"
    assert verify(Store(s3_url)) == []
    assert list(Store(s3_url).files.list("journals")) == []
