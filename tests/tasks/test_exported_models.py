"""Exports load elsewhere: `transformers` and GPTQModel read them in fresh processes, without coldpress."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from coldpress.storage.artifacts import Artifact
from coldpress.storage.store import Store
from coldpress.tasks.architectures import known_model_types
from coldpress.tasks.blocks import StoredModel
from coldpress.tasks.stage import Run
from safetensors.torch import load_file, save_file
from torch import Tensor

# Arguments: a folder with windows.safetensors, in which the results go, and the exported folders.
LOAD = """
import json, os, sys
import torch
from safetensors.torch import load_file, save_file
{imports}
assert not any(name.startswith("coldpress") for name in sys.modules)
work, folders = sys.argv[1], sys.argv[2:]
windows = load_file(os.path.join(work, "windows.safetensors"))["windows"]
errors = {{}}
for number, folder in enumerate(folders):
    try:
        {load}
    except Exception as error:
        errors[number] = f"{{type(error).__name__}}: {{error}}"
        continue
    results = {{}}
    for name, module in model.named_modules():
        {weight}
    with torch.no_grad():
        logits = [model(window[None], use_cache=False).logits.float() for window in windows]
    results["logits"] = torch.cat(logits)
    results = {{name: tensor.contiguous().clone() for name, tensor in results.items()}}
    save_file(results, os.path.join(work, f"{{number}}.safetensors"))
with open(os.path.join(work, "errors.json"), "w") as file:
    json.dump(errors, file)
"""
TRANSFORMERS = LOAD.format(
    imports="from transformers import AutoModelForCausalLM\nimport bitsandbytes as bnb",
    load="model = AutoModelForCausalLM.from_pretrained(folder).eval()",
    weight="""if isinstance(module, bnb.nn.Linear4bit):
            results[name] = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)""",
)
GPTQMODEL = LOAD.format(
    imports="from gptqmodel import BACKEND, GPTQModel",
    load='model = GPTQModel.load(folder, device="cpu", backend=BACKEND.GPTQ_TORCH).model.eval()',
    weight="""if hasattr(module, "dequantize_weight"):
            results[name] = module.dequantize_weight().T.float()""",
)


class Loaded(NamedTuple):
    """logits: [windows, length, vocabulary]. weights: of packed layers, dequantized, by layer name."""

    logits: Tensor
    weights: dict[str, Tensor]


@pytest.fixture
def load_elsewhere(
    tmp_path: Path, fresh_process: Callable[..., None], export_folder: Callable[..., str]
) -> Callable[..., dict[str, Loaded]]:
    """`load_elsewhere(script, windows, {name: model})`: what a fresh process finds in the models' exports."""

    def load(script: str, windows: Tensor, models: dict[str, Artifact]) -> dict[str, Loaded]:
        save_file({"windows": windows.contiguous()}, tmp_path / "windows.safetensors")
        fresh_process(script, str(tmp_path), *(export_folder(model) for model in models.values()))
        errors = json.loads((tmp_path / "errors.json").read_text())
        assert {name: errors[str(number)] for number, name in enumerate(models) if str(number) in errors} == {}
        found = {}
        for number, name in enumerate(models):
            tensors = load_file(tmp_path / f"{number}.safetensors")
            found[name] = Loaded(tensors.pop("logits"), tensors)
        return found

    return load


@pytest.fixture
def dense_weights(store: Store) -> Callable[[Artifact], dict[str, Tensor]]:
    """Weights of the block linears as the block loop sees them, by layer name."""

    def read(model: Artifact) -> dict[str, Tensor]:
        with StoredModel(Run(store), model) as stored:
            return {
                name.removesuffix(".weight"): weight
                for index in range(stored.blocks)
                for name, weight in stored.unpack(stored.stored(index), torch.float32).items()
                if name in stored.linears(index)
            }

    return read


def test_dense_exports_load_in_transformers_with_equal_logits(
    tiny_model_folder: Callable[..., str],
    import_model: Callable[..., Artifact],
    make_tokens: Callable[..., Artifact],
    windows: Callable[[Artifact], Tensor],
    run_stage: Callable[..., Artifact],
    block_loop_logits: Callable[..., Tensor],
    load_elsewhere: Callable[..., dict[str, Loaded]],
) -> None:
    models = {"bfloat16": run_stage("source/model", {}, source=tiny_model_folder("llama"), dtype="bfloat16")}
    for family in known_model_types():
        base = models[family] = import_model(family)
        inputs = {"model": base, "calibration": make_tokens(base)}
        models[f"pruned {family}"] = run_stage("prune/wanda", inputs, sparsity=0.5)
    ids = windows(make_tokens(models["llama"]))
    found = load_elsewhere(TRANSFORMERS, ids, models)
    assert [n for n, model in models.items() if not torch.equal(block_loop_logits(model, ids), found[n].logits)] == []


def test_nf4_exports_load_in_transformers_with_equal_weights(
    import_model: Callable[..., Artifact],
    make_tokens: Callable[..., Artifact],
    windows: Callable[[Artifact], Tensor],
    run_stage: Callable[..., Artifact],
    block_loop_logits: Callable[..., Tensor],
    dense_weights: Callable[[Artifact], dict[str, Tensor]],
    load_elsewhere: Callable[..., dict[str, Loaded]],
) -> None:
    bases = {family: import_model(family) for family in ("llama", "gemma3_text", "opt", "gpt_neox")}
    models = {family: run_stage("quantize/nf4", {"model": base}) for family, base in bases.items()}
    models["double"] = run_stage("quantize/nf4", {"model": bases["llama"]}, double_quant=True)
    pruned = run_stage("prune/magnitude", {"model": bases["llama"]}, sparsity=0.5)
    models["pruned"] = run_stage("quantize/nf4", {"model": pruned})
    ids = windows(make_tokens(bases["llama"]))
    for name, loaded in load_elsewhere(TRANSFORMERS, ids, models).items():
        expected = dense_weights(models[name])
        assert loaded.weights.keys() == expected.keys(), name
        assert all(torch.equal(loaded.weights[layer], expected[layer]) for layer in expected), name
        # On some processors bitsandbytes multiplies in bfloat16.
        assert (loaded.logits - block_loop_logits(models[name], ids)).abs().mean() < 0.05, name


def test_gptq_exports_load_in_gptqmodel_with_the_same_weights(
    import_model: Callable[..., Artifact],
    make_tokens: Callable[..., Artifact],
    windows: Callable[[Artifact], Tensor],
    run_stage: Callable[..., Artifact],
    block_loop_logits: Callable[..., Tensor],
    dense_weights: Callable[[Artifact], dict[str, Tensor]],
    load_elsewhere: Callable[..., dict[str, Loaded]],
) -> None:
    pytest.importorskip("gptqmodel")
    llama = import_model("llama")
    tokens = make_tokens(llama)
    pruned = run_stage("prune/wanda", {"model": llama, "calibration": tokens}, sparsity=0.5)
    variants: dict[str, tuple[Artifact, dict[str, Any]]] = {
        "symmetric": (llama, {}),
        "asymmetric": (llama, {"symmetric": False}),
        "8 bit": (llama, {"bits": 8, "group_size": 64}),
        "2 bit": (llama, {"bits": 2}),
        "whole rows": (llama, {"group_size": -1}),
        "act order": (llama, {"act_order": True, "symmetric": False}),
        "static groups": (llama, {"act_order": True, "static_groups": True}),
        "pruned": (pruned, {}),
        "opt": (import_model("opt"), {}),
        "qwen2": (import_model("qwen2"), {}),
    }
    models = {}
    for name, (model, parameters) in variants.items():
        inputs = {"model": model, "calibration": tokens}
        models[name] = run_stage("quantize/gptq", inputs, **{"group_size": 32, **parameters})
    ids = windows(tokens)
    for name, loaded in load_elsewhere(GPTQMODEL, ids, models).items():
        expected = dense_weights(models[name])
        assert loaded.weights.keys() == expected.keys(), name
        for layer, weight in expected.items():
            torch.testing.assert_close(
                loaded.weights[layer], weight, rtol=2**-10, atol=1e-6
            )  # it multiplies in float16
        assert (loaded.logits - block_loop_logits(models[name], ids)).abs().mean() < 0.05, name
