"""Perplexity of SmolLM2 on 24 x 512 tokens: the stage, in the computing process of a run, against a plain loop.

The stage counts as a user meets it: reading and verifying the checkpoint, scoring, writing the result. The loop starts
with the model loaded by `transformers` and sends it a window at a time.
"""

from __future__ import annotations

import json
import math
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

    from .smollm2 import HELD_OUT, fresh_copy, import_model, import_windows, run_stage

    base, worker = Store("base"), Worker("cpu")
    sides: dict[str, Any] = {}
    found: dict[str, float] = {}
    for dtype in ("float32", "bfloat16"):
        model = import_model(worker, base, dtype)
        data = import_windows(worker, base, model, HELD_OUT)
        with ArtifactReader(base, data) as reader:
            windows = reader.tensors(["input_ids"])["input_ids"].long()
        list(export(base, model, dtype))
        whole = AutoModelForCausalLM.from_pretrained(dtype, dtype=getattr(torch, dtype)).eval()

        def stage(dtype: str = dtype, model: Any = model, data: Any = data) -> float:
            store = fresh_copy(base, f"copy-{uuid.uuid4().hex}")
            action = run_stage(worker, store, "evaluate/perplexity", {"model": model, "data": data})
            found[f"stage {dtype}"] = json.loads(store.read_file(action.artifact, "metrics.json"))["perplexity"]
            shutil.rmtree(store.url)
            return float(action.provenance["seconds"])

        def loop(dtype: str = dtype, whole: Any = whole, windows: Any = windows) -> float:
            def score() -> None:
                found[f"loop {dtype}"] = plain_perplexity(whole, windows)

            return timed(score)

        sides |= {f"stage {dtype}": stage, f"loop {dtype}": loop}
    seconds = {name: min(values) for name, values in in_turns(ROUNDS, sides).items()}
    worker.kill()
    rows = [
        ratio(f"perplexity, {dtype} / plain loop", seconds[f"stage {dtype}"], seconds[f"loop {dtype}"], 1.0)
        for dtype in ("float32", "bfloat16")
    ]
    apart = abs(found["stage float32"] / found["loop float32"] - 1)
    detail = f"{found['stage float32']:.6f}, {found['loop float32']:.6f}"
    return [*rows, Row("perplexities apart by, float32", 100 * apart, "%", 0.01, detail)]


def plain_perplexity(model: Any, windows: Any) -> float:
    """exp of the mean over windows [windows, length] of the mean cross-entropy of tokens 1, 2, …"""
    import torch

    losses = []
    with torch.no_grad():
        for window in windows:
            logits = model(window[None], use_cache=False).logits[0, :-1].float()
            losses.append(float(torch.nn.functional.cross_entropy(logits, window[1:])))
    return math.exp(sum(losses) / len(losses))
