"""The Wanda stage on SmolLM2 with 16 x 512 calibration tokens, in float32 and bfloat16.

The floor of a layer-wise method is two forward passes through the blocks; the stage is measured against two plain
ones by `transformers`, and against the published loop written anew. The stage counts as a user meets it, in the
computing process of a run: reading and verifying the checkpoint, pruning, writing the result to the store. The others
start with the dense model loaded and write nothing. A last row says how many weights only one of both methods removes;
one near-tie that rounding lets fall the other way moves what later blocks see, so that on some processors the same
plain script in float32 and in float64 differs in as many. What the masks must equal: `tests/tasks/test_smollm2.py`.
"""

from __future__ import annotations

import shutil
import uuid
from typing import Any

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

    from . import published as reference
    from .smollm2 import CALIBRATION, fresh_copy, import_model, import_windows, run_stage

    base, worker = Store("base"), Worker("cpu")
    models = {dtype: import_model(worker, base, dtype) for dtype in ("float32", "bfloat16")}
    calibration = import_windows(worker, base, models["float32"], CALIBRATION)
    with ArtifactReader(base, calibration) as reader:
        windows = reader.tensors(["input_ids"])["input_ids"].long()
    list(export(base, models["float32"], "dense"))

    def load() -> Any:
        return AutoModelForCausalLM.from_pretrained("dense", dtype=torch.float32).eval()

    dense = load()
    pruned: dict[str, torch.Tensor] = {}
    differing = [0, 1]

    def stage(dtype: str) -> float:
        store = fresh_copy(base, f"copy-{uuid.uuid4().hex}")
        inputs = {"model": models[dtype], "calibration": calibration}
        action = run_stage(worker, store, "prune/wanda", inputs, sparsity=0.5)
        if dtype == "float32" and not pruned:
            with ArtifactReader(store, action.artifact) as reader:
                pruned.update(reader.tensors(reader.manifest.masks))
        shutil.rmtree(store.url)
        return float(action.provenance["seconds"])

    @torch.no_grad()
    def forward_passes() -> None:
        for _ in range(2):
            for window in windows:
                dense.model(window[None], use_cache=False)

    def published() -> float:
        model = load()
        seconds = timed(lambda: reference.prune(model, windows, 0.5))
        weights = {name: model.get_parameter(name) for name in pruned}
        differing[0] = sum(int(((weights[name] == 0) != (pruned[name] == 0)).sum()) for name in pruned)
        differing[1] = sum(weight.numel() for weight in pruned.values())
        return seconds

    with torch.no_grad():
        dense.model(windows[:1], use_cache=False)  # the first call sets up thread pools and kernels
    seconds = in_turns(
        ROUNDS,
        {
            "float32": lambda: stage("float32"),
            "two passes": lambda: timed(forward_passes),
            "published": published,
            "bfloat16": lambda: stage("bfloat16"),
        },
    )
    worker.kill()
    best = {name: min(values) for name, values in seconds.items()}
    return [
        ratio("Wanda stage, float32 / two plain forward passes", best["float32"], best["two passes"], 1.1),
        ratio("Wanda stage, float32 / published loop", best["float32"], best["published"], 0.75),
        ratio("Wanda stage, bfloat16 / float32", best["bfloat16"], best["float32"], 0.6),
        Row("weights on which stage and published loop differ", 100 * differing[0] / differing[1], "%", 0.1),
    ]
