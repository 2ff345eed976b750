"""Peak memory of pruning a random Llama-shaped model of 1.1 billion parameters in bfloat16: Wanda, then the others.

The model is 2.2 GB; the block loop is to need less than that with everything: the imported libraries, the embedding
and the head, one block, its scores and the activations of four windows of 512 tokens. The same shape with 4 and with
8 blocks must peak alike: memory does not grow with depth. Each stage runs in a process of its own; what is given is
its `peak_memory_bytes`, resident memory from the beginning of the stage, which includes the imports. The other methods,
and what is measured for them, run on the first blocks only, since solving for all would take an hour.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from .measuring import Row, in_fresh_process

CONFIG: dict[str, Any] = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "dtype": "bfloat16", "hidden_act": "silu",
    "hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 32, "num_key_value_heads": 4,
    "vocab_size": 32000, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}  # fmt: skip
BLOCKS, FEW, MORE = 22, 4, 8
OTHERS: dict[str, dict[str, Any]] = {
    "prune/sparsegpt": {"sparsity": 0.5}, "prune/alps": {"sparsity": 0.5}, "prune/wanda-cumulative": {"sparsity": 0.5},
    "statistics/gradients": {}, "prune/gblm": {"sparsity": 0.5}, "prune/pruner-zero": {"sparsity": 0.5},
    "statistics/owl": {}, "statistics/rmi": {}, "statistics/taylor": {}, "prune/llm-pruner": {"sparsity": 0.5},
    "prune/wanda-sp": {"sparsity": 0.5}, "statistics/fluctuation": {}, "prune/flap": {"sparsity": 0.5},
    "statistics/influence": {}, "statistics/removal": {}, "quantize/gptq": {}, "quantize/awq": {},
}  # fmt: skip
OTHERS_BLOCKS = 2
WINDOWS, LENGTH = 4, 512


def measure() -> list[Row]:
    """All rows of this benchmark."""
    peaks = {}
    parameters = 0
    inputs: dict[int, list[Any]] = {}
    for blocks in (OTHERS_BLOCKS, FEW, MORE, BLOCKS):
        folder = f"blocks-{blocks}"
        parameters = in_fresh_process(write_model, blocks, folder)
        inputs[blocks] = in_fresh_process(import_inputs, folder, f"store-{blocks}")
        (Path(folder) / "model.safetensors").unlink()
        if blocks != OTHERS_BLOCKS:
            peaks[blocks] = in_fresh_process(peak, f"store-{blocks}", "prune/wanda", {"sparsity": 0.5}, *inputs[blocks])
    scoring = in_fresh_process(peak, f"store-{BLOCKS}", "evaluate/perplexity", {}, *inputs[BLOCKS])
    others = {
        name: in_fresh_process(peak, f"store-{OTHERS_BLOCKS}", name, settings, *inputs[OTHERS_BLOCKS]) / 1e9
        for name, settings in OTHERS.items()
    }
    highest = max(others, key=lambda name: others[name])
    apart = max(peaks[FEW], peaks[MORE]) / min(peaks[FEW], peaks[MORE]) - 1
    return [
        Row(
            f"pruning {parameters / 1e9:.2f} billion parameters, peak memory",
            peaks[BLOCKS] / 1e9,
            "GB",
            2.0,
            f"the weights are {parameters * 2 / 1e9:.2f} GB",
        ),
        Row("its perplexity, peak memory", scoring / 1e9, "GB", 2.0),
        Row("… of which the imported libraries", in_fresh_process(imports) / 1e9, "GB"),
        Row(
            f"{FEW} and {MORE} blocks, peaks apart by",
            100 * apart,
            "%",
            3.0,
            f"{peaks[FEW] / 1e9:.3f} GB, {peaks[MORE] / 1e9:.3f} GB",
        ),
        Row(
            f"{highest}, the most of all methods, {OTHERS_BLOCKS} blocks",
            others[highest],
            "GB",
            2.5,
            ", ".join(f"{name} {gigabytes:.2f}" for name, gigabytes in others.items()),
        ),
    ]


def tensor_shapes(blocks: int) -> dict[str, list[int]]:
    """{name: shape} of all tensors of the model."""
    hidden, width = CONFIG["hidden_size"], CONFIG["intermediate_size"]
    key = hidden // CONFIG["num_attention_heads"] * CONFIG["num_key_value_heads"]
    block = {
        "input_layernorm": [hidden], "post_attention_layernorm": [hidden],
        "self_attn.q_proj": [hidden, hidden], "self_attn.k_proj": [key, hidden],
        "self_attn.v_proj": [key, hidden], "self_attn.o_proj": [hidden, hidden],
        "mlp.gate_proj": [width, hidden], "mlp.up_proj": [width, hidden], "mlp.down_proj": [hidden, width],
    }  # fmt: skip
    return {
        "model.embed_tokens.weight": [CONFIG["vocab_size"], hidden],
        **{f"model.layers.{i}.{name}.weight": shape for i in range(blocks) for name, shape in block.items()},
        "model.norm.weight": [hidden],
        "lm_head.weight": [CONFIG["vocab_size"], hidden],
    }


def write_model(blocks: int, folder: str) -> int:
    """Write the folder, one tensor in memory at a time; returns the number of parameters."""
    import math

    import torch

    shapes = tensor_shapes(blocks)
    header: dict[str, Any] = {}
    offset = 0
    for name, shape in shapes.items():
        end = offset + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, end]}
        offset = end
    Path(folder).mkdir()
    (Path(folder) / "config.json").write_text(json.dumps({**CONFIG, "num_hidden_layers": blocks}))
    torch.manual_seed(0)
    with (Path(folder) / "model.safetensors").open("wb") as file:
        text = json.dumps(header).encode()
        file.write(struct.pack("<Q", len(text)) + text)
        for shape in shapes.values():
            tensor = torch.randn(shape).mul_(0.02) if len(shape) > 1 else torch.ones(shape)
            file.write(tensor.bfloat16().view(torch.uint8).numpy().data)
    return offset // 2


def import_inputs(folder: str, store_folder: str) -> list[Any]:
    """The model and random windows as artifacts."""
    import torch
    from coldpress.flows.worker import Worker
    from coldpress.storage.artifacts import ArtifactWriter
    from coldpress.storage.store import Store

    from .smollm2 import import_model

    store, worker = Store(store_folder), Worker("cpu")
    model = import_model(worker, store, "auto", folder)
    worker.kill()
    windows = torch.randint(CONFIG["vocab_size"], (WINDOWS, LENGTH), dtype=torch.int32)
    with ArtifactWriter(store, "tokens") as writer:
        writer.add_tensors({"input_ids": windows})
        return [model, writer.publish()]


def peak(store_folder: str, name: str, settings: dict[str, Any], model: list[Any], calibration: list[Any]) -> int:
    """Peak bytes of a stage; what it derives is computed before, in a process of its own."""
    from coldpress.flows.worker import Worker
    from coldpress.storage.artifacts import Artifact
    from coldpress.storage.store import Store
    from coldpress.tasks.catalogue import stage_named

    from .smollm2 import run_stage

    store, entry = Store(store_folder), stage_named(name)
    given = {"model": Artifact(*model), "calibration": Artifact(*calibration), "data": Artifact(*calibration)}
    inputs = {role: given[role] for role in entry.inputs if role not in entry.passed_on}
    for role, (asked, further) in entry.derived(entry.parameters(**settings)).items():
        worker = Worker("cpu")
        needed = {name: given[name] for name in stage_named(asked).inputs}
        inputs[role] = run_stage(worker, store, asked, needed, **further).artifact
        worker.kill()
    worker = Worker("cpu")
    action = run_stage(worker, store, name, inputs, **settings)
    worker.kill()
    assert action.provenance["peak_memory_of"] == "stage", "the peak cannot be told from what came before the stage"
    return int(action.provenance["peak_memory_bytes"])


def imports() -> int:
    """Resident bytes of a process that has built an empty model of this shape and done nothing else."""
    import torch
    from coldpress.tasks.skeleton import build_model
    from coldpress.tasks.stage import PeakMemory

    build_model({**CONFIG, "num_hidden_layers": 1}, torch.bfloat16)
    return int(PeakMemory("cpu").reading()["peak_memory_bytes"])
