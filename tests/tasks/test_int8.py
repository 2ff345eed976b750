"""LLM.int8(): bitsandbytes' own codes, stored tensors that stand for what is computed with, and rounded inputs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes
import plain_methods
import pytest
import torch
from coldpress.storage.artifacts import Artifact
from coldpress.storage.errors import ColdpressError
from coldpress.storage.store import Store
from coldpress.tasks.catalogue import stage_named
from coldpress.tasks.quantization.int8_format import from_codes, pack, round_inputs, to_codes, unpack_all
from coldpress.tasks.stage import StageError
from safetensors.torch import load_file, save_file
from torch import Tensor


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def plain_weight(codes: Tensor, absmax: Tensor) -> Tensor:
    return codes.double() * absmax.double()[:, None] / 127


def plainly_rounded(inputs: Tensor, threshold: float) -> Tensor:
    """Inputs [tokens, features] as the paper has them, number by number; a threshold of 0 is none.

    Outliers stay as they are, all else is taken in float16.
    """
    result = inputs.clone().double()
    halves = inputs.half().double()
    limit = threshold or float("inf")
    kept = {j for j in range(inputs.shape[1]) if max(abs(x) for x in halves[:, j].tolist()) >= limit}
    for token, row in enumerate(halves.tolist()):
        largest = max((abs(x) for x in row if abs(x) < limit), default=0.0)
        for j, x in enumerate(row):
            if j not in kept:
                result[token, j] = round(x / largest * 127) * largest / 127 if largest else 0.0
    return result


# The maths


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_codes_and_scales_are_those_of_bitsandbytes(dtype: torch.dtype) -> None:
    weight = (normal(48, 96) * normal(48, 1, seed=1).exp()).to(dtype)
    codes, absmax = to_codes(weight)
    layer = bitsandbytes.nn.Int8Params(weight.clone(), requires_grad=False).to("cpu")
    assert (codes.dtype, absmax.dtype) == (torch.int8, torch.float32)
    assert torch.equal(codes, layer.data)
    assert torch.equal(absmax, layer.SCB)
    assert torch.equal(from_codes(codes, absmax), bitsandbytes.functional.int8_vectorwise_dequant(codes, absmax))


def test_every_weight_gets_the_nearest_of_127_steps_of_its_rows_largest_magnitude() -> None:
    weight = normal(32, 64).half().float()
    codes, absmax = to_codes(weight)
    assert torch.equal(absmax, weight.abs().amax(1))
    assert bool((codes.int().abs().amax(1) == 127).all())
    step = absmax.double()[:, None] / 127
    assert bool(((plain_weight(codes, absmax) - weight).abs() <= 0.5001 * step).all())


def test_zeros_and_rows_of_zeros_stay_zero() -> None:
    weight = normal(16, 64)
    weight[:, ::2] = 0
    weight[3] = 0
    tensors = pack("layer.weight", weight)
    assert tensors["layer.SCB"][3] == 0
    unpacked = unpack_all(tensors, "cpu")["layer.weight"]
    assert bool((unpacked[weight == 0] == 0).all())
    assert bool(unpacked.isfinite().all())


def test_a_layout_of_old_versions_is_refused() -> None:
    tensors = {**pack("layer.weight", normal(8, 16)), "layer.weight_format": torch.tensor(2, dtype=torch.uint8)}
    with pytest.raises(ColdpressError, match="layer is stored in bitsandbytes' old layout 2"):
        unpack_all(tensors, "cpu")


@pytest.mark.parametrize("threshold", [0.0, 2.0, 6.0])
def test_rounded_inputs_are_those_of_the_paper_number_by_number(threshold: float) -> None:
    inputs = normal(12, 40)
    inputs[4, 7], inputs[5, 9], inputs[2] = 9.0, -6.0, 0.0
    expected = plainly_rounded(inputs, threshold)
    torch.testing.assert_close(round_inputs(inputs, threshold).double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("threshold", [0.0, 2.0, 6.0])
def test_the_product_with_rounded_inputs_is_that_of_bitsandbytes(threshold: float) -> None:
    inputs, weight = normal(20, 64), normal(24, 64, seed=1)
    inputs[:, 5] *= 8
    inputs[3] = 0
    layer = bitsandbytes.nn.Linear8bitLt(64, 24, bias=False, has_fp16_weights=False, threshold=threshold)
    layer.weight = bitsandbytes.nn.Int8Params(weight.clone(), requires_grad=False)
    theirs = layer.to("cpu").eval()(inputs)
    ours = round_inputs(inputs, threshold) @ from_codes(*to_codes(weight)).T
    torch.testing.assert_close(ours[:3], theirs[:3], rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(ours[4:], theirs[4:], rtol=1e-4, atol=1e-3)
    assert not bool(ours[3].any())  # there bitsandbytes divides by zero


def test_without_a_threshold_all_inputs_are_rounded_and_a_planted_outlier_hurts_until_it_is_kept() -> None:
    inputs, weight = normal(20, 64), normal(24, 64, seed=1)
    inputs[:, 5] += 60
    exact = inputs @ weight.T
    plain, decomposed = (round_inputs(inputs, threshold) @ weight.T for threshold in (0.0, 6.0))
    assert not torch.equal(round_inputs(inputs, 0.0)[:, 5], inputs[:, 5])
    assert torch.equal(round_inputs(inputs, 6.0)[:, 5], inputs[:, 5])
    assert (decomposed - exact).norm() < 0.1 * (plain - exact).norm()


def test_each_call_has_outliers_of_its_own() -> None:
    windows = normal(2, 10, 16)
    windows[0, 3, 4] = 20
    together = round_inputs(windows, 6.0)
    assert torch.equal(together, torch.stack([round_inputs(window, 6.0) for window in windows]))
    assert torch.equal(together[0, :, 4], windows[0, :, 4])
    assert not torch.equal(together[1, :, 4], windows[1, :, 4])


# The stage


@pytest.fixture
def plain_weights(read_tensors: Callable[..., dict[str, Tensor]]) -> Callable[[Artifact], dict[str, Tensor]]:
    """{weight name: float32 weight} of all layers in int8."""

    def read(model: Artifact) -> dict[str, Tensor]:
        tensors = read_tensors(model)
        modules = [name.removesuffix(".SCB") for name in tensors if name.endswith(".SCB")]
        return {f"{m}.weight": plain_weight(tensors[f"{m}.weight"], tensors[f"{m}.SCB"]).float() for m in modules}

    return read


@pytest.mark.parametrize(("family", "layers"), [("llama", 7), ("opt", 6), ("gpt_neox", 4)])
def test_a_quantized_model_computes_with_what_its_stored_tensors_stand_for(
    family: str,
    layers: int,
    run_stage: Callable[..., Artifact],
    import_model: Callable[..., Artifact],
    whole_model: Callable[..., Any],
    make_tokens: Callable[..., Artifact],
    windows: Callable[[Artifact], Tensor],
    plain_weights: Callable[[Artifact], dict[str, Tensor]],
    block_loop_logits: Callable[..., Tensor],
) -> None:
    base = import_model(family)
    quantized = run_stage("quantize/int8", {"model": base})
    weights = plain_weights(quantized)
    assert len(weights) == 3 * layers
    ids = windows(make_tokens(base))
    with plain_methods.weights_of(whole_model(family), weights) as model, torch.no_grad():
        expected = torch.cat([model(window[None]).logits for window in ids])
    torch.testing.assert_close(block_loop_logits(quantized, ids), expected, rtol=1e-4, atol=1e-4)


def test_quantizing_a_pruned_model_keeps_its_zeros_and_masks(
    store: Store,
    run_stage: Callable[..., Artifact],
    import_model: Callable[..., Artifact],
    read_tensors: Callable[..., dict[str, Tensor]],
    plain_weights: Callable[[Artifact], dict[str, Tensor]],
) -> None:
    pruned = run_stage("prune/magnitude", {"model": import_model("llama")}, pattern="2:4")
    quantized = run_stage("quantize/int8", {"model": pruned})
    assert store.manifest(quantized).masks == store.manifest(pruned).masks
    dense, weights = read_tensors(pruned), plain_weights(quantized)
    assert weights.keys() == store.manifest(pruned).masks.keys()
    assert all(bool((weight[dense[name] == 0] == 0).all()) for name, weight in weights.items())


def test_everything_but_the_linear_weights_is_the_base_models(
    store: Store, run_stage: Callable[..., Artifact], import_model: Callable[..., Artifact]
) -> None:
    base = import_model("opt")
    before, after = store.manifest(base), store.manifest(run_stage("quantize/int8", {"model": base}))
    packed = {name.removesuffix(".SCB") for name in after.tensors if name.endswith(".SCB")}
    assert len(packed) == 3 * 6
    weights = {f"{module}.weight" for module in packed}
    parts = {f"{module}.{part}" for module in packed for part in ("SCB", "weight_format")}
    assert after.tensors.keys() == before.tensors.keys() | parts
    assert all(before.tensors[name] == after.tensors[name] for name in before.tensors.keys() - weights)
    assert {after.tensors[name].dtype for name in weights} == {"I8"}


def test_the_configuration_says_how_it_was_quantized(
    store: Store, run_stage: Callable[..., Artifact], import_model: Callable[..., Artifact]
) -> None:
    base = import_model("llama")
    quantized = run_stage("quantize/int8", {"model": base}, threshold=5.0)
    config = json.loads(store.read_file(quantized, "config.json"))
    settings = config.pop("quantization_config")
    assert config == json.loads(store.read_file(base, "config.json"))
    assert settings == store.manifest(quantized).quantization
    assert settings["quant_method"] == "bitsandbytes"
    assert settings["load_in_8bit"] is True
    assert settings["llm_int8_threshold"] == 5.0
    assert store.manifest(quantized).format == "bitsandbytes"


@pytest.mark.parametrize("threshold", [-0.1, float("nan"), float("inf")])
def test_a_threshold_that_is_none_is_refused(threshold: float) -> None:
    with pytest.raises(ValueError, match="threshold"):
        stage_named("quantize/int8").parameters(threshold=threshold)


def test_a_weight_beyond_float16_is_refused_with_the_layers_name(
    tiny_model_folder: Callable[..., str], copied: Callable[[str], Path], run_stage: Callable[..., Artifact]
) -> None:
    folder = copied(tiny_model_folder("llama"))
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = 1e5
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    base = run_stage("source/model", {}, source=str(folder))
    with pytest.raises(StageError, match=r"failed on model\.layers\.1\.mlp\.up_proj\.weight: a weight is not"):
        run_stage("quantize/int8", {"model": base})


# Perplexity


def test_perplexity_with_rounded_activations_is_that_of_a_whole_model_that_rounds_them(
    run_stage: Callable[..., Artifact],
    import_model: Callable[..., Artifact],
    whole_model: Callable[..., Any],
    make_tokens: Callable[..., Artifact],
    windows: Callable[[Artifact], Tensor],
    plain_weights: Callable[[Artifact], dict[str, Tensor]],
    read_metrics: Callable[[Artifact], dict[str, Any]],
) -> None:
    base = import_model("llama")
    data = make_tokens(base, samples=4)
    quantized = run_stage("quantize/int8", {"model": base}, threshold=1.5)
    inputs = {"model": quantized, "data": data}
    full = read_metrics(run_stage("evaluate/perplexity", inputs))
    rounded = read_metrics(run_stage("evaluate/perplexity", inputs, activations="int8", dtype="float32"))
    weights = plain_weights(quantized)
    with plain_methods.weights_of(whole_model("llama"), weights) as model:
        assert full["perplexity"] == pytest.approx(plain_methods.perplexity(model, windows(data)), rel=1e-5)
        for name in weights:
            model.get_submodule(name.removesuffix(".weight")).register_forward_pre_hook(
                lambda module, given: plainly_rounded(given[0][0], 1.5).float()[None]
            )
        expected = plain_methods.perplexity(model, windows(data))
    # The last bit of a sum decides some roundings, and blocks further on see the difference.
    assert abs(rounded["perplexity"] - expected) < 0.1 * abs(full["perplexity"] - expected)
    assert full["runtime"].endswith("float32, int8 weights dequantized, activations not rounded")
    assert rounded["runtime"].endswith("float32, LLM.int8() activations with outliers from 1.5")


def test_models_that_are_not_in_int8_do_not_round_activations(
    run_stage: Callable[..., Artifact],
    import_model: Callable[..., Artifact],
    make_tokens: Callable[..., Artifact],
    read_metrics: Callable[[Artifact], dict[str, Any]],
) -> None:
    base = import_model("llama")
    inputs = {"model": base, "data": make_tokens(base)}
    asked = [{"activations": "int8", "dtype": "float32"}, {"dtype": "float32"}]
    first, second = (read_metrics(run_stage("evaluate/perplexity", inputs, **parameters)) for parameters in asked)
    assert first == second


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_rounded_activations_are_refused_where_they_would_be_rounded_twice(dtype: str) -> None:
    with pytest.raises(ValueError, match="needs 'dtype: float32'"):
        stage_named("evaluate/perplexity").parameters(activations="int8", dtype=dtype)
