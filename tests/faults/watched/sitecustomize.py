"""On the PYTHONPATH of runs: makes their computing processes slow, and writes down what each of them does.

Each takes a pause at every step of progress, so that kills land inside stages and not only between them. A line of the
log `$WATCHED/log` is {"event", "pid", "run", "node", "device", "key"}; events are

    computes     a stage begins
    shared       … while another process computes on the same device, or the same stage
    publishing   a stage is done and its action is about to be written
    published    it is written
    beaten       it was there already

While there is a file `$WATCHED/hold` no stage gets past its fifth step.

Who computes holds a lock on a file of the device and on one of the stage: the kernel frees it the moment its process
dies, so nobody who is dead is ever counted.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from coldpress.storage.leases import Lease
    from coldpress.storage.store import Action, Store
    from coldpress.tasks.stage import Parameters, Run, Stage

HELD_AT = 5  # steps done


def watch(folder: Path, pause: float) -> None:
    """Wrap what computes a stage and what publishes it."""
    from coldpress.storage.store import Store
    from coldpress.tasks import stage as stages

    compute, record = stages.compute, Store.record
    about: dict[str, Any] = {}

    def write(event: str, **more: Any) -> None:
        line = {"event": event, "pid": os.getpid(), **about, **more}
        with (folder / "log").open("a") as file:
            file.write(json.dumps(line) + "\n")  # one write to the end of the file: lines don't mix

    @contextlib.contextmanager
    def alone(name: str) -> Iterator[None]:
        with (folder / name).open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                write("shared", what=name)
            yield

    def slowly(progress: Callable[[str, int, int], None]) -> Callable[[str, int, int], None]:
        def told(what: str, done: int, total: int) -> None:
            progress(what, done, total)
            time.sleep(pause)
            while done == HELD_AT and (folder / "hold").exists():
                time.sleep(0.1)

        return told

    def watched_compute(
        run: Run, entry: Stage, parameters: Parameters, inputs: Any, context: Mapping[str, Any], lease: Lease
    ) -> Action:
        device = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        about.update(run=context["run"], node=context["node"], device=device, key=lease.key)
        write("computes")
        with contextlib.ExitStack() as locks:
            locks.enter_context(alone(f"stage-{lease.key}"))
            if device:
                locks.enter_context(alone(f"device-{device}"))
            return compute(replace(run, progress=slowly(run.progress)), entry, parameters, inputs, context, lease)

    def watched_record(store: Store, action: Action) -> Action:
        write("publishing", key=action.key)
        counts = record(store, action)
        write("published" if counts is action else "beaten", key=action.key)
        return counts

    stages.compute = watched_compute  # type: ignore[assignment]
    Store.record = watched_record  # type: ignore[method-assign]


if "coldpress.flows.worker" in sys.orig_argv and "WATCHED" in os.environ:
    watch(Path(os.environ["WATCHED"]), float(os.environ["WATCHED_PAUSE"]))
