"""What journals and leases cost: Wanda and GPTQ on SmolLM2 in bfloat16 with them, as in every run, and without.

The faster a stage, the more the same journal weighs: bfloat16 is the unfavourable case. Each side computes in this
process, in turns, in a store of its own; the best of several rounds counts.
"""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest import mock

from .measuring import Row, in_turns, ratio, timed

ROUNDS = 4
STAGES: Mapping[str, tuple[str, dict[str, Any]]] = {
    "Wanda": ("prune/wanda", {"sparsity": 0.5}),
    "GPTQ": ("quantize/gptq", {"bits": 4, "group_size": 64}),
}


def measure() -> list[Row]:
    """All rows of this benchmark."""
    from coldpress.flows.worker import Worker
    from coldpress.storage.digests import digest_of
    from coldpress.storage.journal import Journal
    from coldpress.storage.leases import Claim, Heartbeat
    from coldpress.storage.store import Store
    from coldpress.tasks.catalogue import stage_named
    from coldpress.tasks.stage import Run, compute, preimage

    from .smollm2 import CALIBRATION, fresh_copy, import_model, import_windows

    base, worker = Store("base"), Worker("cpu")
    model = import_model(worker, base, "bfloat16")
    inputs = {"model": model, "calibration": import_windows(worker, base, model, {**CALIBRATION, "samples": 8})}
    worker.kill()
    about = {"run": "bench", "recipe": "bench", "node": "bench", "inputs": {}}

    @contextmanager
    def without_journals() -> Iterator[None]:
        def remember(self: Journal, record: Mapping[str, Any]) -> None:
            self.steps.append(dict(record))

        with mock.patch.object(Journal, "commit", remember), mock.patch.object(Journal, "save_state"):
            yield

    def stage(name: str, journals: bool) -> float:
        store = fresh_copy(base, f"copy-{uuid.uuid4().hex}")
        entry = stage_named(STAGES[name][0])
        parameters = entry.parameters(**STAGES[name][1])

        def as_in_a_run() -> None:
            lease = Claim(store, digest_of(preimage(entry, parameters, inputs)), about).acquire()
            assert lease is not None
            with Heartbeat(store, lease, about):
                compute(Run(store), entry, parameters, inputs, about, lease)

        if journals:
            seconds = timed(as_in_a_run)
        else:
            with without_journals():
                seconds = timed(lambda: compute(Run(store), entry, parameters, inputs))
        shutil.rmtree(store.url)
        return seconds

    rows = []
    for name in STAGES:
        stage(name, True)  # the first call sets up thread pools and kernels
        seconds = in_turns(ROUNDS, {"with": lambda: stage(name, True), "without": lambda: stage(name, False)})  # noqa: B023
        best = {side: min(values) for side, values in seconds.items()}
        rows.append(ratio(f"{name} with journals and leases / without", best["with"], best["without"], 1.05))
    return rows
