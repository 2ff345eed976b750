"""Latency, throughput and memory of a model in the library that its users run it in, measured in a fresh process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from ...storage.artifacts import Artifact, ArtifactWriter
from ..formats import FORMATS
from ..hardware import describe, gpu_of, usable_cpus
from ..stage import ModelFacts, Parameters, Run, StageError, facts_of, json_file, stage
from .efficiency import speeds
from .exported import PACKAGES, last_error

if TYPE_CHECKING:
    from ..blocks import StoredModel

# Processors that others may keep busy during a measurement before it warns.
OTHERS_BUSY = 0.2
# What `flows` sets for computing processes, and whoever runs a model does not.
_NOT_OURS = ("MALLOC_ARENA_MAX", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GOMP_SPINCOUNT")


class LatencyParameters(Parameters):
    """Parameters of the measurement of latency and memory."""

    prompt: int = Field(128, ge=1, description="tokens of a prompt, random ones")
    generate: int = Field(16, ge=1, description="tokens that are then decoded one after the other with the KV cache")
    batch_size: int = Field(1, ge=1, description="sequences at once")
    repeats: int = Field(10, ge=3, description="timed repeats, of which the median and interquartile range are told")
    warmup: int = Field(2, ge=0, description="repeats before them that are not counted")
    runtime: Literal["auto", "dequantized"] = Field(
        "auto",
        description="auto: what loads the checkpoint's format; dequantized: transformers with dense weights of it, "
        "for machines where a format's kernels are missing",
    )
    threads: int | None = Field(None, ge=1, description="of the processor; all that may be used unless told")
    seed: int = Field(0, ge=0, description="of the random tokens")


def check_latency(parameters: LatencyParameters, facts: ModelFacts) -> Iterator[str]:
    """The tokens must fit into the model's context, and what loads the format be installed."""
    context = facts.config.get("max_position_embeddings")
    if context and (length := parameters.prompt + parameters.generate) > context:
        yield (
            f"latency: prompt {parameters.prompt} and generate {parameters.generate} make {length} tokens, but the "
            f"model's context is {context}; lower one of them"
        )
    package = PACKAGES.get(facts.format)
    if parameters.runtime == "auto" and package is not None and find_spec(package) is None:
        yield (
            f"latency: the format {facts.format} runs in {package}, which is not installed: "
            f"pip install 'coldpress[{package}]', or measure with 'runtime: dequantized'"
        )


@stage(
    "evaluate",
    "latency",
    version=1,
    parameters=LatencyParameters,
    inputs={"model": "checkpoint"},
    output="metrics",
    accepts=frozenset((*FORMATS, "adapter")),
    check=check_latency,
    alone=True,
)
def latency(run: Run, parameters: LatencyParameters, model: Artifact) -> Artifact:
    """Time of reading a prompt and of decoding a token, tokens per second, seconds to load, peak memory, parameters.

    Measured in a process that knows nothing of coldpress, on the exported folder, alone on the device: prompts of
    random tokens, then as many decoding steps as `generate` says, fed with given tokens. On the CPU memory is the
    process's, next to what it was before the model was loaded; on CUDA what torch allocated and reserved. Warns when
    other processes kept processors busy, which coldpress can't keep away.
    """
    from ..blocks import StoredModel

    if model.kind == "adapter" and parameters.runtime == "auto":
        _check_adapter(facts_of(run.store, model).format)
    threads = parameters.threads or len(usable_cpus())
    with tempfile.TemporaryDirectory(prefix="coldpress-latency-") as folder:
        with StoredModel(run, model) as stored:
            count = count_parameters(stored, run, model)
            written = _export_all(run, parameters, model, stored, folder)
        run.stop_if_asked()
        asked = {
            **parameters.model_dump(include={"prompt", "generate", "batch_size", "repeats", "warmup", "seed"}),
            **written,
            "threads": threads,
            "device": run.device,
        }
        found = _measure(run, asked, folder)
    _check_gpu(run.device, found.pop("gpu", None))
    result = {
        "hardware": describe(run.device),
        "runtime": f"{found['runtime']}, {written['note']}{threads} thread{'s' if threads > 1 else ''}",
        "parameters": count,
        "load_seconds": found["load_seconds"],
        "batch_size": parameters.batch_size,
        "prompt_tokens": parameters.prompt,
        "generated_tokens": parameters.generate,
        **{name: value for name, value in found.items() if name.endswith("_bytes")},
        **speeds(
            found["prefill_seconds"],
            found["decode_seconds"],
            batch_size=parameters.batch_size,
            generate=parameters.generate,
        ),
    }
    if "energy_joules" in found:
        tokens = parameters.repeats * parameters.batch_size * parameters.generate
        result["energy_joules_per_token"] = found["energy_joules"] / tokens
    else:
        run.note("energy", found["no_energy"])
    if others := found["others_busy_processors"]:
        result["others_busy_processors"] = round(others, 2)
        if others > OTHERS_BUSY:
            warnings.warn(
                f"other processes kept {others:.1f} of {len(usable_cpus())} processors busy meanwhile; for timings "
                "that say more measure again on a quiet machine, with another seed",
                stacklevel=1,
            )
    with ArtifactWriter(run.store, "metrics") as writer:
        writer.add_file("metrics.json", json_file(result))
        return writer.publish()


def _check_adapter(format: str) -> None:
    """Raises StageError when what runs an adapter beside a checkpoint of this format is not installed."""
    if find_spec("peft") is None:
        raise StageError("an adapter runs in PEFT, which is not installed: pip install 'coldpress[peft]'")
    if format in PACKAGES and find_spec("optimum") is None:
        raise StageError(
            f"beside a checkpoint in the format {format} PEFT needs optimum, which is not installed: "
            "pip install optimum, or measure with 'runtime: dequantized'"
        )


def count_parameters(stored: StoredModel, run: Run, model: Artifact) -> int:
    """All parameters of the exported model, packed weights counted as the weights they stand for, zeros as any other.

    Of an adapter: with its own.
    """
    import math

    from .size import owner

    shapes = [shape for index in range(stored.blocks) for shape in stored.linear_shapes(index).values()]
    modules = {name.removesuffix(".weight") for index in range(stored.blocks) for name in stored.linear_shapes(index)}
    others = [
        entry.shape
        for name, entry in stored.manifest.tensors.items()
        if name.removesuffix(".bias") in modules or not owner(name, modules)
    ]
    added = run.store.manifest(model).tensors.values() if model.kind == "adapter" else ()
    return sum(math.prod(shape) for shape in (*shapes, *others, *(entry.shape for entry in added)))


def _export_all(
    run: Run, parameters: LatencyParameters, model: Artifact, stored: StoredModel, folder: str
) -> dict[str, Any]:
    """Write what is to be loaded. Returns folder, format and adapter for the script, and what the runtime adds."""
    from ...storage.export import export

    target = os.path.join(folder, "model")
    manifest = stored.manifest
    if parameters.runtime == "dequantized":
        _write_dense(run, stored, target)
        kind = "adapter merged, " if model.kind == "adapter" else ""
        packed = f"{manifest.format} dequantized, " if manifest.format != "dense" else ""
        return {"folder": target, "format": "dense", "adapter": None, "note": packed + kind}
    base = Artifact("checkpoint", run.store.manifest(model).base or model.id)
    for _ in export(run.store, base, target):
        run.stop_if_asked()
    adapter = None
    if model.kind == "adapter":
        adapter = os.path.join(folder, "adapter")
        list(export(run.store, model, adapter))
    return {"folder": target, "format": manifest.format, "adapter": adapter, "note": ""}


def _write_dense(run: Run, stored: StoredModel, folder: str) -> None:
    """The model as a folder of dense weights in the dtype of its unpacked ones, a file a block."""
    from safetensors.torch import save_file

    os.makedirs(folder)
    weight_map = {}
    for index in (None, *range(stored.blocks)):
        run.stop_if_asked()
        stored.prefetch(0 if index is None else index + 1)
        tensors = stored.outer(stored.dtype) if index is None else stored.unpack(stored.stored(index), stored.dtype)
        name = "model-outer.safetensors" if index is None else f"model-{index:05}.safetensors"
        dense = {key: tensor.cpu().contiguous() for key, tensor in tensors.items()}
        save_file(dense, os.path.join(folder, name), metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(dense, name))
        run.progress("dequantizing", 0 if index is None else index + 1, stored.blocks)
    config = {key: value for key, value in stored.config.items() if key != "quantization_config"}
    index_file = {"metadata": {}, "weight_map": weight_map}
    for name, value in (("config.json", config), ("model.safetensors.index.json", index_file)):
        with open(os.path.join(folder, name), "wb") as file:
            file.write(json_file(value))


def _measure(run: Run, asked: Mapping[str, Any], folder: str) -> dict[str, Any]:
    """What the script says, run in a process that ends with this one, or when the stage is to stop."""
    request = os.path.join(folder, "asked.json")
    with open(request, "wb") as file:
        file.write(json_file(dict(asked)))
    script = os.path.join(os.path.dirname(__file__), "efficiency_script.py")
    environment = {name: value for name, value in os.environ.items() if name not in _NOT_OURS}
    environment |= {"HF_HUB_OFFLINE": "1", "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": str(asked["threads"])}
    found: dict[str, Any] | None = None
    with open(os.path.join(folder, "said"), "w+", encoding="utf-8", errors="replace") as said:
        process = subprocess.Popen(
            [sys.executable, script, request],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=said,
            text=True,
            env=environment,
        )
        threading.Thread(target=_end_when_asked, args=(run, process), daemon=True).start()
        try:
            assert process.stdout is not None
            for line in process.stdout:
                answer = json.loads(line)
                if "progress" in answer:
                    run.progress(*answer["progress"])
                else:
                    found = answer["result"]
            process.wait()
        finally:
            process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout):
                assert stream is not None
                stream.close()
        run.stop_if_asked()
        if found is None or process.returncode:
            said.seek(0)
            how = f"status {process.returncode}" if process.returncode >= 0 else f"signal {-process.returncode}"
            raise StageError(f"the exported model did not run ({how}): {last_error(said.read())}")
    return found


def _end_when_asked(run: Run, process: subprocess.Popen[str]) -> None:
    while process.poll() is None:
        if run.stop_asked():
            process.kill()
        time.sleep(0.2)


def _check_gpu(device: str, name: str | None) -> None:
    """The GPU that was measured must be the one that the key names."""
    if name is not None and name != gpu_of(device).name:
        raise StageError(
            f"nvidia-smi calls {device} '{gpu_of(device).name}', but it was measured on '{name}'; with GPUs of several "
            "kinds set CUDA_DEVICE_ORDER=PCI_BUS_ID, or show one only with CUDA_VISIBLE_DEVICES"
        )
