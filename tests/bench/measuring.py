"""What benchmarks share: the rows of the table, functions run in fresh processes, and timing in turns."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


class ProcessFailed(Exception):
    """A benchmark's process ended with an error; the message ends with the last it said."""


@dataclasses.dataclass(frozen=True)
class Row:
    """A line of the table. bound: the value is to be at most this; None for a figure that is only given."""

    claim: str
    value: float
    unit: str
    bound: float | None = None
    detail: str = ""

    @property
    def met(self) -> bool:
        """Whether the value keeps to its bound (NaN does not)."""
        return self.bound is None or self.value <= self.bound


def ratio(claim: str, ours: float, theirs: float, bound: float | None = None, detail: str = "") -> Row:
    """A row for ours / theirs, both given in the detail."""
    return Row(claim, ours / theirs, "x", bound, detail or f"{ours:.2f} s / {theirs:.2f} s")


def in_fresh_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """What `function(*arguments)` returns in a Python process of its own; arguments and result pass as JSON.

    What the process prints goes to a file in the working directory. Raises ProcessFailed.
    """
    name = uuid.uuid4().hex
    answer, log = Path(f"{name}.json").resolve(), Path(f"{name}.log").resolve()
    target = f"{function.__module__}:{function.__qualname__}"
    command = [sys.executable, "-m", f"{__package__}.process", target, json.dumps(arguments), str(answer)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with log.open("wb") as said:
        status = subprocess.run(command, stdout=said, stderr=subprocess.STDOUT, env=environment, check=False).returncode
    if status:
        last = log.read_text(errors="replace")[-4000:]
        raise ProcessFailed(f"{target} ended with status {status}:\n{last}")
    return json.loads(answer.read_text())


def timed(function: Callable[[], Any]) -> float:
    """Seconds that a call takes."""
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def in_turns(rounds: int, sides: Mapping[str, Callable[[], float]]) -> dict[str, list[float]]:
    """Each side's seconds, round after round (A B A B …). A side returns its seconds, preparation left out."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            seconds[name].append(side())
    return seconds
