"""What can be counted: bytes of the export, bits per weight, pruned share, zeros."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from coldpress.storage.artifacts import Artifact
from safetensors.torch import load_file, save_file

WEIGHTS = 3 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 128 * 64)
LAYERS = [(64, 64), (32, 64), (32, 64), (64, 64), (128, 64), (128, 64), (64, 128)]  # of a tiny Llama's block


@pytest.fixture
def count(
    run_stage: Callable[..., Artifact], read_metrics: Callable[[Artifact], dict[str, Any]]
) -> Callable[[Artifact], dict[str, Any]]:
    """The size metrics of a checkpoint."""
    return lambda model: read_metrics(run_stage("evaluate/size", {"model": model}))


@pytest.fixture
def variants(
    import_model: Callable[..., Artifact], make_tokens: Callable[..., Artifact], run_stage: Callable[..., Artifact]
) -> dict[str, Artifact]:
    """A tiny Llama, pruned 2:4, and that in all packed formats."""
    base = import_model("llama")
    tokens = make_tokens(base)
    pruned = run_stage("prune/magnitude", {"model": base}, pattern="2:4")
    return {
        "dense": base,
        "pruned": pruned,
        "gptq": run_stage("quantize/gptq", {"model": pruned, "calibration": tokens}, group_size=32),
        "nf4": run_stage("quantize/nf4", {"model": pruned}),
        "int8": run_stage("quantize/int8", {"model": pruned}),
    }


@pytest.mark.parametrize("name", ["dense", "pruned", "gptq", "nf4", "int8"])
def test_size_is_that_of_the_exported_folder(
    name: str,
    variants: dict[str, Artifact],
    count: Callable[[Artifact], dict[str, Any]],
    export_folder: Callable[..., str],
) -> None:
    folder = export_folder(variants[name])
    expected = sum(os.path.getsize(os.path.join(folder, file)) for file in os.listdir(folder))
    assert count(variants[name])["size_bytes"] == expected


def test_bits_per_weight_count_everything_stored_for_the_linear_weights(
    variants: dict[str, Artifact], count: Callable[[Artifact], dict[str, Any]]
) -> None:
    assert count(variants["dense"])["bits_per_weight"] == 32
    assert count(variants["pruned"])["bits_per_weight"] == 32
    # 4 bits a code; of each group and row a float16 scale and a 4-bit zero point; of each input an int32.
    gptq = sum(4 * rows * columns + columns // 32 * rows * (16 + 4) + 32 * columns for rows, columns in LAYERS)
    assert count(variants["gptq"])["bits_per_weight"] == pytest.approx(3 * gptq / WEIGHTS)
    # 4 bits a code, a float32 scale for 64, and a codebook and a description for each layer.
    nf4 = count(variants["nf4"])["bits_per_weight"]
    fixed = (nf4 - 4.5) * WEIGHTS / 8 / 21
    assert 16 * 4 < fixed < 16 * 4 + 256
    # 8 bits a code; of each row a float32 scale; of each layer a byte that says how codes lie.
    int8 = sum(8 * rows * columns + 32 * rows + 8 for rows, columns in LAYERS)
    assert count(variants["int8"])["bits_per_weight"] == pytest.approx(3 * int8 / WEIGHTS)


def test_bits_per_weight_are_of_the_linear_weights_alone(
    import_model: Callable[..., Artifact], count: Callable[[Artifact], dict[str, Any]]
) -> None:
    found = count(import_model("opt"))  # has biases and norms beside them
    assert found["bits_per_weight"] == 32
    assert found["linear_weights"] == 3 * (4 * 64 * 64 + 2 * 128 * 64)


def test_sparsity_is_what_was_pruned_and_zeros_are_all_there_are(
    variants: dict[str, Artifact], count: Callable[[Artifact], dict[str, Any]]
) -> None:
    found = {name: count(variant) for name, variant in variants.items()}
    assert {name: metrics["linear_weights"] for name, metrics in found.items()} == dict.fromkeys(variants, WEIGHTS)
    assert {name: metrics["sparsity"] for name, metrics in found.items()} == {
        "dense": 0, "pruned": 0.5, "gptq": 0.5, "nf4": 0.5, "int8": 0.5,
    }  # fmt: skip
    assert (found["dense"]["zeros"], found["pruned"]["zeros"]) == (0, 0.5)
    assert 0.5 < found["gptq"]["zeros"] < 0.7
    assert 0.5 < found["nf4"]["zeros"] < 0.7
    assert 0.5 <= found["int8"]["zeros"] < 0.51


def test_zeros_that_nobody_pruned_are_no_sparsity(
    run_stage: Callable[..., Artifact],
    tiny_model_folder: Callable[..., str],
    copied: Callable[[str], Any],
    count: Callable[[Artifact], dict[str, Any]],
) -> None:
    folder = copied(tiny_model_folder("llama"))
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][:16] = 0
    tensors["model.embed_tokens.weight"] = torch.zeros_like(tensors["model.embed_tokens.weight"])
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    found = count(run_stage("source/model", {}, source=str(folder)))
    assert found["zeros"] == 16 * 64 / WEIGHTS
    assert found["sparsity"] == 0
