"""NF4: nearest codes of the published codebook, and stored tensors that stand for what is computed with."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import plain_methods
import pytest
import torch
from coldpress.storage.artifacts import Artifact
from coldpress.storage.store import Store
from coldpress.tasks.catalogue import stage_named
from coldpress.tasks.quantization.nf4_format import pack, unpack_all
from coldpress.tasks.stage import ModelFacts
from torch import Tensor


def some_weight(rows: int = 32, columns: int = 96) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) * 0.1


def plain_weight(tensors: dict[str, Tensor], name: str, shape: tuple[int, int], block_size: int = 64) -> Tensor:
    absmax = tensors[f"{name}.absmax"]
    if f"{name}.nested_absmax" in tensors:  # scales in 8 bit: table entry times scale of 256 of them, plus their mean
        offset = json.loads(bytes(tensors[f"{name}.quant_state.bitsandbytes__nf4"].tolist()))["nested_offset"]
        values = tensors[f"{name}.nested_quant_map"][absmax.long()]
        absmax = values * tensors[f"{name}.nested_absmax"].repeat_interleave(256)[: len(values)] + offset
    return plain_methods.nf4_weight(tensors[name], absmax, shape, block_size)


@pytest.mark.parametrize("block_size", [64, 128])
def test_every_weight_gets_the_nearest_code_of_its_block(block_size: int) -> None:
    weight = some_weight()
    tensors = pack("layer.weight", weight, block_size, double=False)
    blocks = weight.reshape(-1, block_size)
    absmax = blocks.abs().amax(1)
    assert torch.equal(tensors["layer.weight.absmax"], absmax)
    candidates = torch.tensor(plain_methods.NF4) * absmax[:, None, None]
    nearest = (blocks[..., None] - candidates).abs().amin(-1)
    error = (plain_weight(tensors, "layer.weight", (32, 96), block_size).reshape(-1, block_size) - blocks).abs()
    torch.testing.assert_close(error, nearest, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("columns", "block_size"), [(128, 64), (96, 64), (64, 128), (576, 128)])
def test_unpacked_weights_are_code_times_scale_whether_or_not_blocks_end_where_rows_do(
    columns: int, block_size: int, dtype: torch.dtype
) -> None:
    tensors = pack("layer.weight", some_weight(32, columns).to(dtype), block_size, double=False)
    weight = unpack_all(tensors, "cpu")["layer.weight"]
    assert weight.dtype == dtype
    assert torch.equal(weight, plain_weight(tensors, "layer.weight", (32, columns), block_size).to(dtype))


def test_zeros_stay_zeros_and_blocks_of_zeros_too() -> None:
    weight = some_weight()
    weight[:, ::2] = 0
    weight[3] = 0
    unpacked = unpack_all(pack("layer.weight", weight, 64, double=False), "cpu")["layer.weight"]
    assert bool((unpacked[weight == 0] == 0).all())


def test_double_quantization_moves_weights_by_less_than_a_hundredth_of_their_scale() -> None:
    weight = torch.cat([some_weight()] * 8)
    once, twice = (unpack_all(pack("w.weight", weight, 64, double), "cpu")["w.weight"] for double in (False, True))
    scale = weight.reshape(-1, 64).abs().amax(1).max()
    assert 0 < (once - twice).abs().max() < 0.01 * scale


def test_double_quantization_takes_less_room() -> None:
    weight = torch.cat([some_weight()] * 8)
    sizes = [sum(t.nbytes for t in pack("w.weight", weight, 64, double).values()) for double in (False, True)]
    assert sizes[1] < sizes[0]


@pytest.mark.parametrize("parameters", [{}, {"double_quant": True}], ids=str)
@pytest.mark.parametrize("family", ["llama", "opt", "gpt_neox"])
def test_a_quantized_model_computes_with_exactly_what_its_stored_tensors_stand_for(
    family: str,
    parameters: dict[str, Any],
    run_stage: Callable[..., Artifact],
    import_model: Callable[..., Artifact],
    whole_model: Callable[..., Any],
    make_tokens: Callable[..., Artifact],
    windows: Callable[[Artifact], Tensor],
    read_tensors: Callable[..., dict[str, Tensor]],
    block_loop_logits: Callable[..., Tensor],
) -> None:
    base = import_model(family)
    quantized = run_stage("quantize/nf4", {"model": base}, **parameters)
    tensors, dense = read_tensors(quantized), read_tensors(base)
    names = [name.removesuffix(".absmax") for name in tensors if name.endswith(".weight.absmax")]
    assert len(names) == 3 * {"llama": 7, "opt": 6, "gpt_neox": 4}[family]
    weights = {n: plain_weight(tensors, n, (dense[n].shape[0], dense[n].shape[1]), 64) for n in names}
    ids = windows(make_tokens(base))
    with plain_methods.weights_of(whole_model(family), weights) as model, torch.no_grad():
        expected = torch.cat([model(window[None]).logits for window in ids])
    assert torch.equal(block_loop_logits(quantized, ids), expected)


def test_quantizing_a_pruned_model_keeps_its_zeros_and_masks(
    store: Store,
    run_stage: Callable[..., Artifact],
    import_model: Callable[..., Artifact],
    read_tensors: Callable[..., dict[str, Tensor]],
) -> None:
    pruned = run_stage("prune/magnitude", {"model": import_model("llama")}, pattern="2:4")
    quantized = run_stage("quantize/nf4", {"model": pruned})
    assert store.manifest(quantized).masks == store.manifest(pruned).masks
    dense, tensors = read_tensors(pruned), read_tensors(quantized)
    for name in store.manifest(pruned).masks:
        weight = plain_weight(tensors, name, (dense[name].shape[0], dense[name].shape[1]))
        assert bool((weight[dense[name] == 0] == 0).all()), name


def test_everything_but_the_linear_weights_is_the_base_models(
    store: Store, run_stage: Callable[..., Artifact], import_model: Callable[..., Artifact]
) -> None:
    base = import_model("opt")
    quantized = run_stage("quantize/nf4", {"model": base})
    before, after = store.manifest(base), store.manifest(quantized)
    packed = {name.removesuffix(".absmax") for name in after.tensors if name.endswith(".absmax")}
    assert len(packed) == 3 * 6
    others = {name for name in after.tensors if not any(name.startswith(weight) for weight in packed)}
    assert others == before.tensors.keys() - packed
    assert all(before.tensors[name] == after.tensors[name] for name in others)


def test_the_configuration_says_how_it_was_quantized(
    store: Store, run_stage: Callable[..., Artifact], import_model: Callable[..., Artifact]
) -> None:
    base = import_model("llama")
    quantized = run_stage("quantize/nf4", {"model": base}, double_quant=True)
    config = json.loads(store.read_file(quantized, "config.json"))
    settings = config.pop("quantization_config")
    assert config == json.loads(store.read_file(base, "config.json"))
    assert settings == store.manifest(quantized).quantization
    assert settings["quant_method"] == "bitsandbytes"
    assert settings["bnb_4bit_quant_type"] == "nf4"
    assert settings["bnb_4bit_use_double_quant"] is True
    assert store.manifest(quantized).format == "bitsandbytes"


def test_blocks_that_do_not_end_where_rows_do_are_refused() -> None:
    """bitsandbytes' CPU kernel unpacks them wrongly: 576 inputs with blocks of 128, for one."""
    stage = stage_named("quantize/nf4")
    config = {**SMOLLM2_SHAPE, "model_type": "llama"}
    assert list(stage.check(stage.parameters(), ModelFacts(config))) == []
    (error,) = stage.check(stage.parameters(block_size=128), ModelFacts(config))
    assert "block_size 128 does not divide the 576 inputs" in error


SMOLLM2_SHAPE = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
