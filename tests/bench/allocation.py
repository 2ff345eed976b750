"""What RMI and OWL cost on SmolLM2 with 16 x 512 calibration tokens in float32, against one plain forward pass.

The stages count as a user meets them, in the computing process of a run; the plain pass is `transformers`' own through
the blocks, model loaded.
"""

from __future__ import annotations

import shutil
import uuid

from .measuring import Row, in_turns, ratio, timed

ROUNDS = 3


def measure() -> list[Row]:
    """All rows of this benchmark."""
    import torch
    from coldpress.flows.worker import Worker
    from coldpress.storage.artifacts import ArtifactReader
    from coldpress.storage.export import export
    from coldpress.storage.store import Store
    from transformers import AutoModelForCausalLM

    from .smollm2 import CALIBRATION, fresh_copy, import_model, import_windows, run_stage

    base, worker = Store("base"), Worker("cpu")
    model = import_model(worker, base, "float32")
    calibration = import_windows(worker, base, model, CALIBRATION)
    with ArtifactReader(base, calibration) as reader:
        windows = reader.tensors(["input_ids"])["input_ids"].long()
    list(export(base, model, "dense"))
    dense = AutoModelForCausalLM.from_pretrained("dense", dtype=torch.float32).eval()

    def stage(name: str) -> float:
        store = fresh_copy(base, f"copy-{uuid.uuid4().hex}")
        action = run_stage(worker, store, name, {"model": model, "calibration": calibration})
        shutil.rmtree(store.url)
        return float(action.provenance["seconds"])

    @torch.no_grad()
    def forward_pass() -> None:
        for window in windows:
            dense.model(window[None], use_cache=False)

    forward_pass()  # the first sets up thread pools and kernels
    seconds = in_turns(
        ROUNDS,
        {
            "pass": lambda: timed(forward_pass),
            "rmi": lambda: stage("statistics/rmi"),
            "owl": lambda: stage("statistics/owl"),
        },
    )
    worker.kill()
    best = {name: min(values) for name, values in seconds.items()}
    return [
        ratio("RMI, float32 / one plain forward pass", best["rmi"], best["pass"], 1.1),
        ratio("OWL, float32 / one plain forward pass", best["owl"], best["pass"]),
    ]
