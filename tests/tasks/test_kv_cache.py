"""The quantized KV cache: its maths by brute force, and its perplexity against decoding token by token with it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import plain_methods
import pytest
import torch
from coldpress.storage.artifacts import Artifact
from coldpress.storage.store import Store
from coldpress.tasks.catalogue import stage_named
from coldpress.tasks.evaluation.kv_cache import decoding_attention, dequantize, pack, quantize, unpack
from coldpress.tasks.evaluation.packed_cache import packed_cache
from coldpress.tasks.stage import Run, StageError, compute, preimage
from pydantic import ValidationError
from torch import Tensor
from transformers import DynamicCache

BITS = [2, 4, 8]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]

Measure = Callable[..., dict[str, Any]]


@pytest.fixture
def measure(run_stage: Callable[..., Artifact], read_metrics: Callable[[Artifact], dict[str, Any]]) -> Measure:
    """`measure(model, data, **parameters)`: the stage's metrics."""
    return lambda model, data, **parameters: read_metrics(
        run_stage("evaluate/perplexity", {"model": model, "data": data}, **parameters)
    )


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# Codes


@pytest.mark.parametrize("bits", BITS)
def test_packed_codes_come_back_and_fill_their_bytes(bits: int) -> None:
    codes = torch.randint(2**bits, (3, 5, 32), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (3, 5, 32 * bits // 8)
    assert torch.equal(unpack(packed, bits), codes)


def test_the_first_code_is_in_the_lowest_bits() -> None:
    assert pack(torch.tensor([1, 2, 3, 0], dtype=torch.uint8), 2).tolist() == [0b00111001]
    assert pack(torch.tensor([1, 15], dtype=torch.uint8), 4).tolist() == [0b11110001]


def test_codes_stand_between_the_least_and_the_largest_of_each_group() -> None:
    codes, scale, minimum = quantize(torch.tensor([[-1.0, 0.1, 0.9, 2.0, 5.0, 5.0, 5.0, 8.0]]), bits=2, group_size=4)
    assert codes.tolist() == [[0, 1, 2, 3, 0, 0, 0, 3]]
    assert (scale.tolist(), minimum.tolist()) == ([[1.0, 1.0]], [[-1.0, 5.0]])
    assert dequantize(codes, scale, minimum).tolist() == [[-1.0, 0.0, 1.0, 2.0, 5.0, 5.0, 5.0, 8.0]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", BITS)
def test_the_error_is_at_most_half_a_step_and_what_rounding_the_scale_adds(bits: int, dtype: torch.dtype) -> None:
    states = random(4, 64, 32, dtype=dtype) + random(4, 64, 1, seed=1, dtype=dtype)
    codes, scale, minimum = quantize(states, bits, 16)
    assert scale.dtype == minimum.dtype == dtype
    found = minimum.double()[..., None] + codes.unflatten(-1, (-1, 16)).double() * scale.double()[..., None]
    error = (found.flatten(-2) - states.double()).abs().unflatten(-1, (-1, 16)) / scale.double()[..., None]
    # The largest of a group is 2^bits - 1 scales away from its minimum.
    allowed = max(0.5, (2**bits - 1) * torch.finfo(dtype).eps / 2)
    assert error.max() <= allowed * 1.01
    assert allowed <= 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_groups_of_equal_numbers_are_exact(dtype: torch.dtype) -> None:
    states = torch.cat([torch.full((1, 8), value, dtype=dtype) for value in (0.0, -3.25, 1e-7)])
    assert torch.equal(dequantize(*quantize(states, 2, 8)), states)


def test_numbers_too_close_for_the_dtype_of_the_scale_stay_close() -> None:
    states = torch.tensor([[0.0, 6e-8] * 4], dtype=torch.float16)
    codes, scale, minimum = quantize(states, 8, 8)
    assert dequantize(codes, scale, minimum).isfinite().all()
    assert (dequantize(codes, scale, minimum) - states).abs().max() <= 6e-8


# Attention


def by_the_rule(query: Tensor, key: Tensor, value: Tensor, bits: int, group: int, residual: int) -> Tensor:
    """Token by token, head by head, number by number from the paper's algorithm; windows are [heads, length, head_dim]."""

    def rounded(numbers: Tensor) -> Tensor:
        low, high = numbers.min(), numbers.max()
        step = (high - low) / (2**bits - 1)
        return ((numbers - low) / step).round() * step + low

    sharing = len(query) // len(key)
    result = torch.empty_like(query)
    for head in range(len(query)):
        keys, values = key[head // sharing], value[head // sharing]
        old_keys: list[Tensor] = []
        old_values: list[Tensor] = []
        new_keys: list[Tensor] = []
        new_values: list[Tensor] = []
        for token in range(query.shape[1]):
            new_keys.append(keys[token])
            new_values.append(values[token])
            scores = torch.stack(old_keys + new_keys) @ query[head, token] / 3
            result[head, token] = scores.softmax(0) @ torch.stack(old_values + new_values)
            if len(new_keys) == residual:
                flushed = torch.stack(new_keys)
                for channel in range(flushed.shape[1]):
                    for start in range(0, residual, group):
                        flushed[start : start + group, channel] = rounded(flushed[start : start + group, channel])
                old_keys += flushed.unbind()
                new_keys = []
            if len(new_values) > residual:
                oldest = new_values.pop(0)
                old_values.append(torch.cat([rounded(part) for part in oldest.split(group)]))
    return result


@pytest.mark.parametrize("chunk", [5, 256])
@pytest.mark.parametrize(("residual", "length"), [(8, 30), (16, 33), (16, 16), (64, 30)])
def test_all_tokens_together_attend_as_one_after_the_other(
    residual: int, length: int, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("coldpress.tasks.evaluation.kv_cache.QUERY_CHUNK", chunk)
    query, key, value = random(2, 4, length, 16), random(2, 2, length, 16, seed=1), random(2, 2, length, 16, seed=2)
    found = decoding_attention(query, key, value, bits=2, group_size=8, residual=residual, scaling=1 / 3)
    for window in range(2):
        expected = by_the_rule(query[window], key[window], value[window], 2, 8, residual)
        torch.testing.assert_close(found[window], expected)


# The packed cache of transformers models


@torch.no_grad()
def decoded(model: Any, windows: Tensor, cache: Any, prefill: int = 1) -> Tensor:
    """Logits [windows, length, vocabulary] by decoding; `prefill` tokens go in together first."""
    logits = [model(windows[:, :prefill], past_key_values=cache, use_cache=True).logits]
    for token in range(prefill, windows.shape[1]):
        logits.append(model(windows[:, token : token + 1], past_key_values=cache, use_cache=True).logits)
    return torch.cat(logits, 1)


def loss_of(logits: Tensor, windows: Tensor) -> float:
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), windows[:, 1:].flatten()).item()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "opt", "gpt_neox", "gemma"])
def test_perplexity_is_that_of_decoding_with_the_packed_cache(
    family: str,
    bits: int,
    import_model: Callable[..., Artifact],
    whole_model: Callable[..., Any],
    make_tokens: Callable[..., Artifact],
    windows: Callable[[Artifact], Tensor],
    measure: Measure,
) -> None:
    base = import_model(family)
    data = make_tokens(base, samples=3, length=45)
    settings = {"bits": bits, "group_size": 8, "residual": 16}
    cache = packed_cache(**settings)
    logits = decoded(whole_model(family), windows(data), cache)
    found = measure(base, data, kv_cache=settings)
    assert found["loss_nats"] == pytest.approx(loss_of(logits, windows(data)), rel=1e-5)
    assert found["runtime"].endswith(f", KV cache in {bits} bits, groups of 8, 16 tokens in full")
    # The cache there holds three windows.
    assert found["kv_cache_bytes"] == sum(layer.nbytes() for layer in cache.layers) / 3
