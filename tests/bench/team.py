"""What a Prefect server costs: a cached stage, a recipe of a hundred tiny stages, and the time from `submit` to work.

`coldpress up` runs on a free port with an idle worker. The recipe prunes one random model of two small blocks to a
hundred sparsities, so that nearly all of its time is management. Seconds are wall time of the whole command; what a
cached stage costs is the difference between the same cached run with the server and without one.
"""

from __future__ import annotations

import os
import re
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from .measuring import Row, timed

STAGES = 100
ROUNDS = 3
_COLDPRESS = str(Path(sys.executable).with_name("coldpress"))


def measure() -> list[Row]:
    """All rows of this benchmark."""
    _save_model("model")
    sparsities = ", ".join(f"{0.3 + number / 1000:.3f}" for number in range(STAGES))
    Path("tiny.yaml").write_text(
        "name: tiny\nmodel: {source: model}\nstages:\n"
        f"  pruned: {{use: prune, method: magnitude, model: base, matrix: {{sparsity: [{sparsities}]}}}}\n"
        "evaluate: {variants: []}\n"
    )
    with _up() as url:
        computed = _run("run", "tiny.yaml", PREFECT_API_URL=url)
        served = [_run("run", "tiny.yaml", PREFECT_API_URL=url) for _ in range(ROUNDS)]
        begun = [_seconds_until_work(url, number) for number in range(ROUNDS)]
    alone = [_run("run", "tiny.yaml") for _ in range(ROUNDS)]
    per_stage = (statistics.median(served) - statistics.median(alone)) / (STAGES + 1) * 1000
    detail = f"{statistics.median(served):.1f} s with, {statistics.median(alone):.1f} s without"
    return [
        Row("Prefect per cached stage, server running", per_stage, "ms", 150, detail),
        Row(f"{STAGES} tiny stages computed, server running", computed, "s", 60),
        Row("submit until the first stage runs, idle worker", statistics.median(begun), "s", 10, _spread(begun)),
    ]


def _seconds_until_work(url: str, number: int) -> float:
    """From the start of the command to the start of a stage, in another store each time."""
    began = time.time()
    command = [_COLDPRESS, "submit", "tiny.yaml", "--store", f"submitted-{number}", "--device", "cpu"]
    environment = {**os.environ, "PREFECT_API_URL": url}
    said = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    (run,) = re.findall(r"on the server (\S+)", said)
    while True:
        query = {"flow_runs": {"id": {"any_": [run]}}, "sort": "EXPECTED_START_TIME_ASC", "limit": 1}
        found = httpx.post(f"{url}/task_runs/filter", json=query, timeout=60).raise_for_status().json()
        if found and found[0]["start_time"]:
            seconds = time.time() - began
            subprocess.run([_COLDPRESS, "cancel", run], env=environment, check=True)
            _wait_for_end(url, run)
            return seconds
        time.sleep(0.1)


def _wait_for_end(url: str, run: str) -> None:
    while True:
        state = httpx.get(f"{url}/flow_runs/{run}", timeout=60).raise_for_status().json()["state_name"]
        if state in ("Cancelled", "Completed"):
            return
        time.sleep(0.5)


def _run(*arguments: str, **environment: str) -> float:
    command = [_COLDPRESS, *arguments]
    return timed(lambda: subprocess.run(command, env={**os.environ, **environment}, check=True))


def _spread(seconds: list[float]) -> str:
    return f"{min(seconds):.1f} to {max(seconds):.1f} s"


def _save_model(folder: str) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=256, **sizes)).save_pretrained(folder)


@contextmanager
def _up() -> Iterator[str]:
    """`coldpress up` with one idle worker; yields its API's URL."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = Path("up.log")
    with log.open("w") as output:
        process = subprocess.Popen(
            [_COLDPRESS, "up", "--port", str(port)],
            env={**os.environ, "PREFECT_HOME": str(Path("prefect-up").resolve())},
            stdout=output,
            stderr=output,
        )
    try:
        while "started!" not in log.read_text():
            assert process.poll() is None, log.read_text()
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/api"
    finally:
        process.terminate()
        process.wait()
