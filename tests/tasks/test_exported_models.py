"""Exports load elsewhere: `transformers` and GPTQModel read them in fresh processes, without coldpress."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from coldpress.storage.artifacts import Artifact
from coldpress.tasks.architectures import family_of, known_model_types
from elsewhere import AWQ, GPTQMODEL, PEFT, TRANSFORMERS, Loaded
from torch import Tensor


@pytest.mark.usefixtures("torchs_own_products")
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
    tiny_model_folder: Callable[..., str],
    import_model: Callable[..., Artifact],
    make_tokens: Callable[..., Artifact],
    windows: Callable[[Artifact], Tensor],
    run_stage: Callable[..., Artifact],
    block_loop_logits: Callable[..., Tensor],
    dense_weights: Callable[..., dict[str, Tensor]],
    load_elsewhere: Callable[..., dict[str, Loaded]],
) -> None:
    bases = {family: import_model(family) for family in ("llama", "gemma3_text", "opt", "gpt_neox")}
    models = {family: run_stage("quantize/nf4", {"model": base}) for family, base in bases.items()}
    half = run_stage("source/model", {}, source=tiny_model_folder("llama"), dtype="bfloat16")
    models["bfloat16"] = run_stage("quantize/nf4", {"model": half})
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


def test_int8_exports_load_in_transformers_with_equal_weights(
    tiny_model_folder: Callable[..., str],
    import_model: Callable[..., Artifact],
    make_tokens: Callable[..., Artifact],
    windows: Callable[[Artifact], Tensor],
    run_stage: Callable[..., Artifact],
    block_loop_logits: Callable[..., Tensor],
    dense_weights: Callable[..., dict[str, Tensor]],
    load_elsewhere: Callable[..., dict[str, Loaded]],
) -> None:
    bases = {family: import_model(family) for family in ("llama", "gemma3_text", "opt", "gpt_neox")}
    models = {family: run_stage("quantize/int8", {"model": base}) for family, base in bases.items()}
    half = run_stage("source/model", {}, source=tiny_model_folder("llama"), dtype="bfloat16")
    models["bfloat16"] = run_stage("quantize/int8", {"model": half})
    models["no outliers"] = run_stage("quantize/int8", {"model": bases["llama"]}, threshold=0)
    pruned = run_stage("prune/magnitude", {"model": bases["llama"]}, sparsity=0.5)
    models["pruned"] = run_stage("quantize/int8", {"model": pruned})
    ids = windows(make_tokens(bases["llama"]))
    for name, loaded in load_elsewhere(TRANSFORMERS, ids, models).items():
        expected = dense_weights(models[name])
        assert loaded.weights.keys() == expected.keys(), name
        assert all(torch.equal(loaded.weights[layer], expected[layer]) for layer in expected), name
        # bitsandbytes rounds the inputs of layers too.
        assert (loaded.logits - block_loop_logits(models[name], ids)).abs().mean() < 0.1, name


def test_exports_in_gptqs_format_load_in_gptqmodel_with_the_same_weights(
    import_model: Callable[..., Artifact],
    make_tokens: Callable[..., Artifact],
    windows: Callable[[Artifact], Tensor],
    run_stage: Callable[..., Artifact],
    block_loop_logits: Callable[..., Tensor],
    dense_weights: Callable[..., dict[str, Tensor]],
    load_elsewhere: Callable[..., dict[str, Loaded]],
) -> None:
    pytest.importorskip("gptqmodel")
    llama = import_model("llama")
    tokens = make_tokens(llama)
    pruned = run_stage("prune/wanda", {"model": llama, "calibration": tokens}, sparsity=0.5)
    mixed = [
        {"modules": ["down_proj"], "bits": 8, "group_size": 64},
        {"modules": ["v_proj"], "layers": [1, 2], "bits": 2},
        {"layers": [2], "group_size": -1},
        {"modules": ["o_proj", "gate_proj"], "layers": [0], "bits": 16},
    ]
    variants: dict[str, tuple[Artifact, dict[str, Any]]] = {
        "symmetric": (llama, {}),
        "asymmetric": (llama, {"symmetric": False}),
        "8 bit": (llama, {"bits": 8, "group_size": 64}),
        "2 bit": (llama, {"bits": 2, "symmetric": False}),
        "3 bit": (llama, {"bits": 3}),
        "3 bit, asymmetric": (llama, {"bits": 3, "symmetric": False, "act_order": True}),
        "whole rows": (llama, {"group_size": -1}),
        "act order": (llama, {"act_order": True, "symmetric": False}),
        "static groups": (llama, {"act_order": True, "static_groups": True}),
        "pruned": (pruned, {}),
        "opt": (import_model("opt"), {}),
        "qwen2": (import_model("qwen2"), {}),
        "mixed": (llama, {"overrides": mixed}),
        "mixed, asymmetric": (llama, {"overrides": mixed, "symmetric": False, "act_order": True}),
        "mixed opt": (
            import_model("opt"),
            {"overrides": [{"layers": [0], "bits": 8}, {"modules": ["fc2"], "bits": 2}]},
        ),
        "by sensitivity": (
            llama,
            {"budget": {"bits_per_weight": 4.5}, "choices": [{"bits": bits} for bits in (2, 3, 4, 8)]},
        ),
    }
    models = {}
    for name, (model, parameters) in variants.items():
        inputs = {"model": model, "calibration": tokens}
        models[name] = run_stage("quantize/gptq", inputs, **{"group_size": 32, **parameters})
    models["rtn"] = run_stage("quantize/rtn", {"model": pruned}, group_size=32)
    models["rtn, 3 bit"] = run_stage("quantize/rtn", {"model": llama}, bits=3, group_size=-1, symmetric=False)
    for family, bits in (("gemma3_text", 4), ("qwen2", 3)):
        inputs = {"model": import_model(family), "calibration": tokens}
        models[f"awq of {family}"] = run_stage("quantize/awq", inputs, bits=bits, group_size=32)
    models["mixed awq"] = run_stage(
        "quantize/awq", {"model": llama, "calibration": tokens}, group_size=32, overrides=mixed
    )
    joint = {"model": llama, "calibration": tokens}
    models["joint"] = run_stage("quantize/sparsegpt-gptq", joint, sparsity=0.5, group_size=32)
    ids = windows(tokens)
    for name, loaded in load_elsewhere(GPTQMODEL, ids, models).items():
        expected = dense_weights(models[name])
        left = {f"model.layers.0.{layer}" for layer in ("self_attn.o_proj", "mlp.gate_proj")} if "mixed" in name else {}
        assert loaded.weights.keys() == expected.keys() - left, name
        for layer, weight in loaded.weights.items():  # GPTQModel computes in float16
            torch.testing.assert_close(weight, expected[layer], rtol=2**-10, atol=1e-6)
        assert (loaded.logits - block_loop_logits(models[name], ids)).abs().mean() < 0.05, name


def test_exports_in_awqs_format_load_in_gptqmodel_with_the_same_weights(
    import_model: Callable[..., Artifact],
    make_tokens: Callable[..., Artifact],
    windows: Callable[[Artifact], Tensor],
    run_stage: Callable[..., Artifact],
    block_loop_logits: Callable[..., Tensor],
    dense_weights: Callable[..., dict[str, Tensor]],
    load_elsewhere: Callable[..., dict[str, Loaded]],
) -> None:
    pytest.importorskip("gptqmodel")
    llama = import_model("llama")
    tokens = make_tokens(llama)
    models = {"llama": run_stage("quantize/awq", {"model": llama, "calibration": tokens}, group_size=32, format="awq")}
    ids = windows(tokens)
    (loaded,) = load_elsewhere(AWQ, ids, models).values()
    expected = dense_weights(models["llama"])
    assert loaded.weights.keys() == expected.keys()
    for layer, weight in expected.items():  # GPTQModel computes in float16
        torch.testing.assert_close(loaded.weights[layer], weight, rtol=2**-10, atol=1e-6)
    assert (loaded.logits - block_loop_logits(models["llama"], ids)).abs().mean() < 0.05


def test_adapters_load_in_peft_beside_their_checkpoints_with_equal_logits(
    import_model: Callable[..., Artifact],
    make_tokens: Callable[..., Artifact],
    windows: Callable[[Artifact], Tensor],
    run_stage: Callable[..., Artifact],
    block_loop_logits: Callable[..., Tensor],
    load_elsewhere: Callable[..., dict[str, Loaded]],
) -> None:
    models = {}
    for family in ("llama", "opt", "gpt_neox"):
        original = import_model(family)
        tokens = make_tokens(original)
        models[family] = pruned = run_stage("prune/wanda", {"model": original, "calibration": tokens}, pattern="2:4")
        inputs = {"model": pruned, "original": original}
        models[f"eora {family}"] = run_stage("compensate/eora", {**inputs, "calibration": tokens}, rank=16)
        models[f"svd {family}"] = run_stage("compensate/svd", inputs, rank=16)
    original = import_model("llama")
    models["nf4"] = run_stage("quantize/nf4", {"model": original})
    models["svd nf4"] = run_stage("compensate/svd", {"model": models["nf4"], "original": original}, rank=16)
    ids = windows(make_tokens(original))
    found = load_elsewhere(PEFT, ids, models)
    for name, model in models.items():
        expected = block_loop_logits(model, ids)
        if "nf4" in name:  # on some processors bitsandbytes multiplies in bfloat16
            assert (found[name].logits - expected).abs().mean() < 0.05, name
        else:
            torch.testing.assert_close(found[name].logits, expected, rtol=0, atol=1e-4)
    for family in ("llama", "opt", "gpt_neox"):
        assert (found[f"eora {family}"].logits - found[family].logits).abs().max() > 0.1, family
        for method in ("eora", "svd"):
            layers = found[f"{method} {family}"].weights
            assert len(layers) == 3 * len(family_of({"model_type": family}).linears)
    assert len(found["svd nf4"].weights) == 3 * 7
