"""A made-up document of a run with everything that the report's page can show."""

from __future__ import annotations

import json
import math
import random
from typing import Any

from coldpress.tasks.reporting.significance import Items, compare_all

CPU = "Imaginary CPU, 8 cores"
MADE = {  # name: (stage, model, share of the size, loss in nats, parameters)
    "pruned": ("prune/wanda", "base", 1.0, 2.6, {"sparsity": 0.5}),
    "owl[sparsity=0.6]": ("prune/wanda", "base", 1.0, 3.1, {"sparsity": 0.6, "allocation": "owl"}),
    "owl[sparsity=0.7]": ("prune/wanda", "base", 1.0, 4.4, {"sparsity": 0.7, "allocation": "owl"}),
    "gptq4": ("quantize/gptq", "pruned", 0.31, 2.75, {"bits": 4, "group_size": 64}),
    "gptq8": ("quantize/gptq", "pruned", 0.55, 2.601, {"bits": 8, "group_size": 64}),
    "awq4": ("quantize/awq", "base", 0.31, 2.25, {"bits": 4, "group_size": 64}),
    "nf4": ("quantize/nf4", "base", 0.3, 2.27, {}),
    "int8": ("quantize/int8", "base", 0.53, 2.201, {}),
    "shallow": ("prune/shortgpt", "base", 0.8, 2.9, {"blocks": 6}),
    "shallow-tuned": ("adapt/lora", "shallow", 0.81, 2.5, {"rank": 16, "steps": 60}),
    "broken": ("quantize/gptq", "pruned", 0.0, 0.0, {"bits": 2, "group_size": 64}),
    "never": ("compensate/eora", "broken", 0.0, 0.0, {"rank": 32}),
}
FAILED = {
    "broken": ("failed", "the Hessian of model.layers.3.mlp.down_proj is not positive definite; raise damping"),
    "never": ("skipped", None),
}
VARIANTS = ("base", *MADE)
FORMATS = {"gptq4": "gptq", "gptq8": "gptq", "awq4": "awq", "nf4": "bitsandbytes", "int8": "bitsandbytes"}


def stage(name: str, does: str, inputs: dict[str, str], **changes: Any) -> dict[str, Any]:
    """One of the document's stages."""
    return {
        "name": name, "stage": does, "state": "computed", "key": None, "artifact": f"{name}-{'0' * 40}", "root": "base",
        "linear_weights": None, "seconds": 12.5, "peak_memory_bytes": 1_100_000_000, "shares_by_block": None,
        "bits_by_block": None, "losses": None, "inputs": inputs, "parameters": {}, "kind": "checkpoint",
        "format": "dense", "base": None, "error": None,
        "provenance": {
            "started": "2026-11-22T10:00:00Z", "device": "cpu", "host": "workstation", "commit": "0123456789abcdef",
            "versions": {"torch": "2.14.1", "transformers": "5.23.0"}, "warnings": [], "attempts": 1,
        },
        **changes,
    }  # fmt: skip


def _lost(name: str, does: str, inputs: dict[str, str]) -> dict[str, Any]:
    state, error = FAILED.get(name, ("skipped", None))
    return stage(name, does, inputs, state=state, error=error, artifact=None, seconds=None, provenance={})


def _stages() -> list[dict[str, Any]]:
    data = {"model": "base"}
    found = [
        stage("base", "source/model", {}, parameters={"source": "a/model", "dtype": "bfloat16"}, linear_weights=10**8),
        stage("calibration", "source/tokens", data, kind="tokens", parameters={"samples": 16}),
        stage("held_out", "source/tokens", data, kind="tokens", parameters={"split": "test"}),
    ]
    for name, (does, model, _, _, parameters) in MADE.items():
        inputs = {"model": model, "calibration": "calibration"}
        if name in FAILED:
            found.append(_lost(name, does, inputs))
            continue
        kind = "adapter" if name == "shallow-tuned" else "checkpoint"
        made = stage(name, does, inputs, parameters=parameters, kind=kind, format=FORMATS.get(name, "dense"))
        if name.startswith("owl"):
            share = parameters["sparsity"]
            made["shares_by_block"] = [share + 0.05 * math.sin(block) for block in range(12)]
        if name == "shallow-tuned":
            made["losses"] = [3.0 - 0.4 * math.log1p(step) / 4 for step in range(60)]
            made["base"] = "shallow-" + "0" * 40
        if name == "pruned":
            made["provenance"] = {**made["provenance"], "attempts": 2, "warnings": ["UserWarning: a window was empty"]}
        found.append(made)
    for variant in VARIANTS:
        for method in ("size", "perplexity", "latency"):
            inputs = {"model": variant, **({"data": "held_out"} if method == "perplexity" else {})}
            name, does = f"{variant}/{method}", f"evaluate/{method}"
            if variant in FAILED:
                found.append(_lost(name, does, inputs))
            else:
                found.append(stage(name, does, inputs, kind="metrics", seconds=8.1))
    awq = next(one for one in found if one["name"] == "awq4/latency")
    awq |= {"state": "failed", "error": "the exported model did not run: no kernel for this device", "artifact": None}
    return found


def _metrics(name: str, size: float, loss: float) -> dict[str, Any]:
    metrics: dict[str, Any] = {
        "linear_weights": 80_000_000 if name.startswith("shallow") else 100_000_000,
        "sparsity": {"pruned": 0.5, "gptq4": 0.5, "gptq8": 0.5}.get(name, float(name[13:-1]) if "=" in name else 0.0),
        "bits_per_weight": 16 * size, "size_bytes": int(270e6 * size), "perplexity": math.exp(loss),
        "arc_easy.acc": 0.62 - 0.1 * (loss - 2.2), "arc_easy.acc_stderr": 0.0098, "arc_easy.n": 2376,
    }  # fmt: skip
    if name != "owl[sparsity=0.7]":
        metrics |= {"hellaswag.acc_norm": 0.43 - 0.05 * (loss - 2.2), "hellaswag.acc_norm_stderr": 0.005}
    if name != "awq4":
        metrics |= {
            "process_memory_bytes": int(5.2e8 + 270e6 * size), "process_memory_before_bytes": int(4.2e8),
            "prefill_ms": 210 + 30 * size, "prefill_ms_iqr": 3.0, "decode_ms_per_token": 22 + 9 * size,
            "decode_ms_per_token_iqr": 0.8, "tokens_per_second": 1000 / (22 + 9 * size), "hardware": CPU,
        }  # fmt: skip
    return metrics


def full_document() -> dict[str, Any]:
    """Thirteen variants of one model: pruned, quantized, shortened, tuned; one failed, one skipped behind it."""
    draw = random.Random(0)
    difficulty = [draw.gauss(0, 0.4) for _ in range(40)]
    known = {"base": (1.0, 2.2), **{name: made[2:4] for name, made in MADE.items() if name not in FAILED}}
    items = [
        Items(name, "perplexity", "held_out", [loss + hard + draw.gauss(0, 0.01) for hard in difficulty])
        for name, (_, loss) in known.items()
    ]
    metrics: dict[str, Any] = {name: _metrics(name, *known[name]) if name in known else {} for name in VARIANTS}
    metrics["base/kv2"] = {"perplexity": 9.9, "kv_cache_bytes": 3_000_000, "kv_cache_bytes_in_full": 20_000_000}
    stages = [*_stages(), stage("base/kv2", "evaluate/perplexity", {"model": "base", "data": "held_out"})]
    prompts = ("The capital of France is", "def fibonacci(n):\n    ")
    texts = (" a city of many <b>bridges</b> & rivers", "return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)")
    return {
        "run": "20261122T100000-abcdef", "recipe": "everything", "store": "/a/store", "stages": stages,
        "variants": list(VARIANTS), "metrics": metrics,
        "runtimes": {name: {"perplexity": "coldpress block loop, bfloat16"} for name in known},
        **compare_all(items, {name: ["base"] for name in VARIANTS}),
        "generations": {
            name: [{"prompt": p, "continuation": t} for p, t in zip(prompts, texts, strict=True)] for name in known
        },
    }  # fmt: skip


LONG = "llama-3.2-1b-instruct-wanda-owl-then-gptq-4bit-group64-eora-rank32[seed=1, sparsity=0.6]"
GPU = "Imaginary GPU, 24 GB"


def crowded_document() -> dict[str, Any]:
    """The same with what crowds a page: a long name, a collapsed variant, two kinds of hardware, many tasks."""
    document = full_document()
    renamed = json.loads(json.dumps(document).replace("gptq8", LONG))
    draw = random.Random(1)
    metrics = renamed["metrics"]
    metrics["owl[sparsity=0.7]"]["perplexity"] = 3006.41
    for name, found in metrics.items():
        if name in renamed["variants"] and found and name != "shallow":
            for task, level, questions in (("mmlu", 0.34, 14042), ("boolq", 0.7, 3270), ("gsm8k", 0.08, 1319)):
                score = max(0.0, level - 0.1 * (math.log(found["perplexity"]) - 2.2) + draw.gauss(0, 0.01))
                key = f"{task}.exact_match,strict-match" if task == "gsm8k" else f"{task}.acc"
                stderr = math.sqrt(score * (1 - score) / questions)
                found |= {key: score, f"{key}_stderr": stderr, f"{task}.n": questions}
            found |= {"kl_nats": 0.01 + 0.3 * draw.random(), "top1_changed": 0.05 + 0.3 * draw.random()}
    metrics["base"] |= {"kl_nats": 0.0, "top1_changed": 0.0}
    for name in ("nf4", "int8"):
        metrics[name] |= {
            "hardware": GPU, "device_memory_bytes": int(3.1e8 if name == "int8" else 2.2e8), "prefill_ms_iqr": 0.2,
            "prefill_ms": 4.11, "decode_ms_per_token": 7.9 if name == "int8" else 6.4, "decode_ms_per_token_iqr": 0.1,
            "tokens_per_second": 156.2,
        }  # fmt: skip
    return renamed
