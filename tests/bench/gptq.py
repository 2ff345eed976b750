"""The GPTQ and AWQ stages against GPTQModel's own: SmolLM2, 4 bit, groups of 64, 16 x 512 calibration tokens.

Both start from the same checkpoint and see the same windows. GPTQ: float32, symmetric grids, damping 0.01, no
activation order of either kind. AWQ: bfloat16, since GPTQModel packs no float32, asymmetric grids, AWQ's format. All
results are imported from the folders they were saved to and scored by the same code in float32, on 24 held-out windows
of 512. Each side quantizes in a process of its own, in turns. GPTQModel's default is to run the windows through a block
anew after each group of its layers (`true_sequential`); coldpress gathers all statistics of a block in one pass, which
GPTQModel does too for GPTQ when told. Both are measured. Its seconds are those of `quantize()` alone, without loading
and saving.
"""

from __future__ import annotations

from typing import Any

from .measuring import Row, in_fresh_process, ratio, timed

BITS, GROUP_SIZE, DAMPING = 4, 64, 0.01
GPTQ = {"bits": BITS, "group_size": GROUP_SIZE, "damping": DAMPING}
AWQ = {"bits": BITS, "group_size": GROUP_SIZE, "format": "awq"}
THEIR_GPTQ = {"sym": True, "damp_percent": DAMPING, "act_group_aware": False}
THEIR_AWQ = {"sym": False, "method": "awq", "format": "gemm"}


def measure() -> list[Row]:
    """All rows of this benchmark."""
    model, half, calibration, held_out = in_fresh_process(prepare)
    first = in_fresh_process(ours, model, calibration, "ours", "quantize/gptq", GPTQ)
    default = in_fresh_process(gptqmodel, calibration, "default", "float32", {**THEIR_GPTQ, "true_sequential": True})
    second = in_fresh_process(ours, model, calibration, "ours-again", "quantize/gptq", GPTQ)
    one_pass = in_fresh_process(gptqmodel, calibration, "one-pass", "float32", {**THEIR_GPTQ, "true_sequential": False})
    awq = in_fresh_process(ours, half, calibration, "awq", "quantize/awq", AWQ)
    their_awq = in_fresh_process(gptqmodel, calibration, "their-awq", "bfloat16", THEIR_AWQ)
    perplexity = in_fresh_process(score, model, held_out)
    seconds = (first["seconds"] + second["seconds"]) / 2

    def quality(claim: str, mine: str, theirs: str) -> Row:
        detail = f"{perplexity[mine]:.3f} / {perplexity[theirs]:.3f}; dense {perplexity['dense']:.3f}"
        return ratio(claim, perplexity[mine], perplexity[theirs], 1.01, detail)

    def memory(claim: str, mine: dict[str, float], theirs: dict[str, float]) -> Row:
        detail = f"{mine['peak'] / 1e9:.2f} GB / {theirs['peak'] / 1e9:.2f} GB"
        return ratio(claim, mine["peak"], theirs["peak"], 1.0, detail)

    return [
        quality("GPTQ perplexity / GPTQModel's", "ours", "default"),
        quality("… / GPTQModel's without true_sequential", "ours", "one-pass"),
        ratio("GPTQ stage / GPTQModel's quantize()", seconds, default["seconds"], 0.5),
        ratio("… / quantize() without true_sequential", seconds, one_pass["seconds"], 1.0),
        memory("GPTQ stage, peak memory / GPTQModel's", first, default),
        quality("AWQ perplexity / GPTQModel's", "awq", "their-awq"),
        ratio("AWQ stage / GPTQModel's quantize()", awq["seconds"], their_awq["seconds"], 1.0),
        memory("AWQ stage, peak memory / GPTQModel's", awq, their_awq),
    ]


def prepare() -> list[Any]:
    """The dense model in both dtypes, calibration and held-out windows, in the store "store"; the models as folders."""
    from coldpress.flows.worker import Worker
    from coldpress.storage.export import export
    from coldpress.storage.store import Store

    from .smollm2 import CALIBRATION, HELD_OUT, import_model, import_windows

    store, worker = Store("store"), Worker("cpu")
    models = {dtype: import_model(worker, store, dtype) for dtype in ("float32", "bfloat16")}
    windows = [import_windows(worker, store, models["float32"], settings) for settings in (CALIBRATION, HELD_OUT)]
    worker.kill()
    for dtype, model in models.items():
        list(export(store, model, dtype))
    return [*models.values(), *windows]


def ours(
    model: list[Any], calibration: list[Any], folder: str, stage: str, settings: dict[str, Any]
) -> dict[str, float]:
    """Quantize with the stage, in a fresh copy of the store; export to `folder`."""
    from coldpress.flows.worker import Worker
    from coldpress.storage.artifacts import Artifact
    from coldpress.storage.export import export
    from coldpress.storage.store import Store

    from .smollm2 import fresh_copy, run_stage

    store, worker = fresh_copy(Store("store"), f"store-{folder}"), Worker("cpu")
    inputs = {"model": Artifact(*model), "calibration": Artifact(*calibration)}
    action = run_stage(worker, store, stage, inputs, **settings)
    worker.kill()
    list(export(store, action.artifact, folder))
    return {"seconds": action.provenance["seconds"], "peak": action.provenance["peak_memory_bytes"]}


def gptqmodel(calibration: list[Any], folder: str, dtype: str, settings: dict[str, Any]) -> dict[str, float]:
    """Quantize with GPTQModel; save to `folder`."""
    import os

    os.environ["GPTQMODEL_CPU_WORKERS"] = "2"  # its thread pool fails on a small machine without it
    import torch
    from coldpress.storage.artifacts import Artifact, ArtifactReader
    from coldpress.storage.store import Store
    from coldpress.tasks.stage import PeakMemory
    from gptqmodel import GPTQModel, QuantizeConfig

    with ArtifactReader(Store("store"), Artifact(*calibration)) as reader:
        windows = reader.tensors(["input_ids"])["input_ids"].long()
    config = QuantizeConfig(bits=BITS, group_size=GROUP_SIZE, desc_act=False, **settings)
    model = GPTQModel.load(dtype, config, dtype=getattr(torch, dtype), device="cpu")
    samples = [{"input_ids": window, "attention_mask": torch.ones_like(window)} for window in windows]
    memory = PeakMemory("cpu")
    seconds = timed(lambda: model.quantize(samples, batch_size=1))
    peak = memory.reading()["peak_memory_bytes"]
    model.save(folder)
    return {"seconds": seconds, "peak": peak}


def score(model: list[Any], held_out: list[Any]) -> dict[str, float]:
    """Held-out perplexity of the dense model and of all folders, all by the same stage in float32."""
    import json

    from coldpress.flows.worker import Worker
    from coldpress.storage.artifacts import Artifact
    from coldpress.storage.store import Store

    from .smollm2 import import_model, run_stage

    store, worker = Store("store"), Worker("cpu")
    data = Artifact(*held_out)
    folders = ("ours", "default", "one-pass", "awq", "their-awq")
    models = {name: import_model(worker, store, "float32", name) for name in folders}
    models["dense"] = Artifact(*model)
    result = {}
    for name, artifact in models.items():
        action = run_stage(worker, store, "evaluate/perplexity", {"model": artifact, "data": data}, dtype="float32")
        result[name] = json.loads(store.read_file(action.artifact, "metrics.json"))["perplexity"]
    worker.kill()
    return result
