"""SparseGPT and ALPS on SmolLM2 in float32 with 16 x 512 calibration tokens, against the published SparseGPT loop.

The solvers alone are measured on one block's layers with the Gram matrices of normal inputs; whole stages as a user
meets them. Losses are relative, ||(W - W') X||^2 / ||W X||^2, on those layers.
"""

from __future__ import annotations

import shutil
import uuid
from typing import Any

from .measuring import Row, in_turns, ratio, timed

ROUNDS = 2
SHAPES = {"attention": [(576, 576), (192, 576), (192, 576)], "gate and up": [(1536, 576)] * 2, "down": [(576, 1536)]}


def measure() -> list[Row]:
    """All rows of this benchmark."""
    return [*_solvers(), *_stages()]


def _solvers() -> list[Row]:
    import torch
    from coldpress.tasks.pruning import alps, sparsegpt
    from torch import nn

    from .published import SparseGpt

    torch.manual_seed(0)
    problems = []
    for shapes in SHAPES.values():
        columns = shapes[0][1]
        inputs = torch.randn(8192, columns) @ (torch.randn(columns, columns) / columns**0.5 + torch.eye(columns))
        problems.append(([torch.randn(shape) for shape in shapes], inputs.T @ inputs))
    losses: dict[str, float] = {}

    def loss(results: list[list[Any]]) -> float:
        lost = whole = 0.0
        for (weights, gram), group in zip(problems, results, strict=True):
            for weight, result in zip(weights, group, strict=True):
                change = result - weight
                lost += float(((change @ gram) * change).sum())
                whole += float(((weight @ gram) * weight).sum())
        return lost / whole

    def solver(name: str, solve: Any) -> float:
        results: list[Any] = []
        seconds = timed(lambda: results.extend(solve(weights, gram, sparsity=0.5) for weights, gram in problems))
        losses[name] = loss([[weight for weight, _ in group] for group in results])
        return seconds

    def ours() -> float:
        return solver("ours", sparsegpt.solve)

    def with_alps() -> float:
        return solver("alps", alps.solve)

    @torch.no_grad()
    def published() -> float:
        layers = []
        for weights, gram in problems:
            for weight in weights:
                linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
                linear.weight.data = weight.clone()
                layers.append(SparseGpt(linear))
                layers[-1].hessian = gram.clone()
        seconds = timed(lambda: [layer.prune(0.5) for layer in layers])
        results = iter(layers)
        losses["published"] = loss([[next(results).layer.weight.data for _ in weights] for weights, _ in problems])
        return seconds

    ours()  # the first call sets up thread pools and kernels
    seconds = in_turns(3, {"ours": ours, "published": published, "alps": with_alps})
    best = {name: min(values) for name, values in seconds.items()}
    return [
        ratio("SparseGPT solver, a block's layers / plain published", best["ours"], best["published"], 0.5),
        Row("its loss / that of the published", losses["ours"] / losses["published"], "x", 1.02),
        ratio("ALPS solver / SparseGPT solver", best["alps"], best["ours"], 10.0),
        Row("ALPS's loss / SparseGPT's", losses["alps"] / losses["ours"], "x", 1.0),
    ]


def _stages() -> list[Row]:
    import torch
    from coldpress.flows.worker import Worker
    from coldpress.storage.artifacts import ArtifactReader
    from coldpress.storage.export import export
    from coldpress.storage.store import Store
    from transformers import AutoModelForCausalLM

    from . import published
    from .smollm2 import CALIBRATION, fresh_copy, import_model, import_windows, run_stage

    base, worker = Store("base"), Worker("cpu")
    model = import_model(worker, base, "float32")
    calibration = import_windows(worker, base, model, CALIBRATION)
    with ArtifactReader(base, calibration) as reader:
        windows = reader.tensors(["input_ids"])["input_ids"].long()
    list(export(base, model, "dense"))

    def stage(method: str) -> float:
        store = fresh_copy(base, f"copy-{uuid.uuid4().hex}")
        inputs = {"model": model, "calibration": calibration}
        action = run_stage(worker, store, f"prune/{method}", inputs, sparsity=0.5)
        shutil.rmtree(store.url)
        return float(action.provenance["seconds"])

    def loop() -> float:
        dense = AutoModelForCausalLM.from_pretrained("dense", dtype=torch.float32).eval()
        return timed(lambda: published.prune(dense, windows, 0.5, published.SparseGpt))

    seconds = in_turns(ROUNDS, {"stage": lambda: stage("sparsegpt"), "published": loop})
    seconds["alps"] = [stage("alps")]
    worker.kill()
    best = {name: min(values) for name, values in seconds.items()}
    return [
        ratio("SparseGPT stage / published loop", best["stage"], best["published"], 0.75),
        ratio("ALPS stage / SparseGPT stage", best["alps"], best["stage"], 10.0),
    ]
