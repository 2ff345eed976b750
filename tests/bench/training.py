"""A training step on SmolLM2 in bfloat16, of 4 x 256 tokens: masked LoRA, LoRA, and PEFT's LoRA in a plain loop.

Stages run in the computing process of a run, a few steps each time; seconds are from one report of a finished step to
the next, so that reading the model and the first step, which sets up kernels, don't count. The best step of all rounds
counts. PEFT trains the same dense weights with the same windows, rank, layers and optimizer.
"""

from __future__ import annotations

import sys
import time
from itertools import pairwise
from typing import Any

from .measuring import Row, in_turns, ratio

ROUNDS = 2
STEPS = 4
LENGTH, BATCH, RANK, ALPHA = 256, 4, 8, 16


def measure() -> list[Row]:
    """All rows of this benchmark."""
    from coldpress.flows.worker import Worker
    from coldpress.storage.artifacts import ArtifactReader
    from coldpress.storage.export import export
    from coldpress.storage.store import Store
    from coldpress.tasks.catalogue import stage_named

    from .smollm2 import import_model, import_windows, run_stage

    store, worker = Store("store"), Worker("cpu")
    base = import_model(worker, store, "bfloat16")
    pruned = run_stage(worker, store, "prune/magnitude", {"model": base}, sparsity=0.5).artifact
    settings = {"source": "python-docs", "samples": 4 * BATCH, "length": LENGTH}
    data = import_windows(worker, store, base, settings)
    with ArtifactReader(store, data) as reader:
        windows = reader.tensors(["input_ids"])["input_ids"].long()
    list(export(store, pruned, "dense"))
    rounds = iter(range(100))

    def stage(name: str) -> float:
        ends: list[float] = []

        def progress(what: str, done: int, total: int) -> None:
            if what.startswith("training"):
                ends.append(time.perf_counter())

        entry = stage_named(name)
        parameters = entry.parameters(
            steps=STEPS, batch_size=BATCH, micro_batch_size=BATCH, rank=RANK, alpha=ALPHA, seed=next(rounds)
        )
        worker.compute(store, entry, parameters, {"model": pruned, "data": data}, {}, progress)
        return _least_between(ends)

    def peft() -> float:
        return _peft_step("dense", windows)

    seconds = in_turns(
        ROUNDS,
        {"lora": lambda: stage("adapt/lora"), "masked": lambda: stage("adapt/sparse-lora"), "peft": peft},
    )
    worker.kill()
    best = {name: min(values) for name, values in seconds.items()}
    return [
        ratio("step of masked LoRA / of LoRA", best["masked"], best["lora"], 1.5),
        ratio("step of LoRA / of PEFT's LoRA", best["lora"], best["peft"]),
        ratio("step of masked LoRA / of PEFT's LoRA", best["masked"], best["peft"]),
    ]


def _peft_step(folder: str, windows: Any) -> float:
    """Seconds of a step of PEFT's LoRA on all linear layers of the blocks of a model folder."""
    import torch

    sys.modules["gptqmodel"] = None  # type: ignore[assignment]  # where it is installed PEFT wants optimum too
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
    torch.manual_seed(0)
    dense = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model = get_peft_model(dense, config).train()
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=2e-4, weight_decay=0.0, fused=True)
    ends = []
    for step in range(STEPS):
        batch = windows[BATCH * step : BATCH * (step + 1)]
        model(input_ids=batch, labels=batch, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ends.append(time.perf_counter())
    return _least_between(ends)


def _least_between(ends: list[float]) -> float:
    return min(after - before for before, after in pairwise(ends))
