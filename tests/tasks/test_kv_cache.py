"""The quantized KV cache: its maths by brute force, and its perplexity against decoding token by token with it."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from typing import Any

import pytest
import torch
from coldpress.storage.artifacts import Artifact
from coldpress.storage.journal import Journal
from coldpress.storage.store import Store
from coldpress.tasks.blocks import StoredModel, stream_hidden
from coldpress.tasks.catalogue import stage_named
from coldpress.tasks.evaluation.kv_cache import decoding_attention, dequantize, pack, quantize, unpack
from coldpress.tasks.evaluation.packed_cache import CachedAttention, PackedLayer, packed_cache
from coldpress.tasks.skeleton import Skeleton
from coldpress.tasks.stage import ModelFacts, Run, StageError, compute, preimage
from pydantic import ValidationError
from torch import Tensor
from transformers import DynamicCache

from tests.conftest import VOCABULARY

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
    """The paper's algorithm, token by token and group by group; all are [heads, length, head_dim]."""

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


# The packed cache, in transformers models


@torch.no_grad()
def decoded(model: Any, windows: Tensor, cache: Any, prefill: int = 1) -> Tensor:
    """Logits [windows, length, vocabulary] by decoding; `prefill` tokens go in together first."""
    logits = [model(windows[:, :prefill], past_key_values=cache, use_cache=True).logits]
    for token in range(prefill, windows.shape[1]):
        logits.append(model(windows[:, token : token + 1], past_key_values=cache, use_cache=True).logits)
    return torch.cat(logits, 1)


def loss_of(logits: Tensor, windows: Tensor) -> float:
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), windows[:, 1:].flatten()).item()


@pytest.fixture
def logits_at_once(store: Store) -> Callable[..., Tensor]:
    """`logits_at_once(model, windows, **settings)`: what the perplexity is of, a block at a time."""

    @torch.no_grad()
    def logits(model: Artifact, windows: Tensor, dtype: torch.dtype = torch.float32, **settings: int) -> Tensor:
        run = Run(store, journal=Journal(store, {"stage": "testing", "of": uuid.uuid4().hex}, {}))
        with StoredModel(run, model) as stored:
            skeleton = Skeleton(stored.config, dtype, run.device)
            attention = CachedAttention(skeleton, **settings)
            hidden, outer, _ = stream_hidden(run, stored, skeleton, windows, "testing", advance=attention.advance)
            return torch.cat([skeleton.logits(outer, skeleton.finish(outer, inputs[None])) for inputs in hidden])

    return logits


def some_windows(length: int = 45) -> Tensor:
    return torch.randint(3, VOCABULARY, (3, length), generator=torch.Generator().manual_seed(0))


CASES = {
    **{family: (family, {}) for family in ("llama", "qwen2", "qwen3", "gemma", "opt", "gpt_neox")},
    "llama with biases and one key head": ("llama", {"attention_bias": True, "num_key_value_heads": 1}),
    "mistral, its window longer": ("mistral", {"sliding_window": 64}),
    "gemma2, its window longer": ("gemma2", {"sliding_window": 64, "attn_logit_softcapping": 2.0}),
    "gemma3, its window longer": ("gemma3_text", {"sliding_window": 64}),
}


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("case", CASES)
def test_logits_of_all_tokens_together_are_those_of_decoding_one_by_one(
    case: str,
    bits: int,
    import_model: Callable[..., Artifact],
    whole_model: Callable[..., Any],
    logits_at_once: Callable[..., Tensor],
) -> None:
    family, changes = CASES[case]
    settings = {"bits": bits, "group_size": 8, "residual": 16}
    # In float64: where a number stands between two codes, rounding may take either, in float32 in one window of five.
    model = whole_model(family, dtype=torch.float64, **changes)
    one_by_one = decoded(model, some_windows(), packed_cache(**settings))
    together = logits_at_once(import_model(family, **changes), some_windows(), torch.float64, **settings)
    in_full = decoded(model, some_windows(), DynamicCache())
    apart = (one_by_one - in_full).abs().amax((0, 2))
    assert apart[:16].max() < 1e-5  # nothing is quantized yet
    assert {2: 0.3, 4: 0.03, 8: 0}[bits] < apart[16:].max() / in_full.std() < {2: 5, 4: 2, 8: 0.15}[bits]
    off = (together - one_by_one).abs().amax((1, 2))
    assert off.median() < 1e-5
    assert off.max() < apart.max() / 10  # some of it is float32 all the same


def test_a_window_that_fits_into_the_residual_is_decoded_exactly_as_in_full(whole_model: Callable[..., Any]) -> None:
    model, windows = whole_model("llama"), some_windows()
    found = decoded(model, windows, packed_cache(bits=2, group_size=8, residual=48))
    assert torch.equal(found, decoded(model, windows, DynamicCache()))


def test_a_prompt_is_attended_to_in_full_and_then_held_as_if_its_tokens_had_come_one_by_one() -> None:
    settings = {"bits": 2, "group_size": 8, "residual": 16}
    keys, values = random(2, 3, 45, 16), random(2, 3, 45, 16, seed=1)
    at_once, one_by_one = PackedLayer(**settings), PackedLayer(**settings)
    seen = at_once.update(keys, values)
    assert torch.equal(seen[0], keys)
    assert torch.equal(seen[1], values)
    for token in range(45):
        one_by_one.update(keys[:, :, token : token + 1], values[:, :, token : token + 1])
    assert at_once.get_seq_length() == one_by_one.get_seq_length() == 45
    assert at_once.nbytes() == one_by_one.nbytes()
    following = random(2, 3, 1, 16, seed=2)
    for mine, theirs in zip(at_once.update(following, following), one_by_one.update(following, following), strict=True):
        assert mine.shape[2] == 46
        assert torch.equal(mine, theirs)


def test_generate_takes_the_cache_and_a_reset_empties_it(whole_model: Callable[..., Any]) -> None:
    model, prompt, cache = whole_model("llama"), some_windows(20), packed_cache(bits=8, group_size=8, residual=8)
    first = model.generate(prompt, past_key_values=cache, max_new_tokens=20, do_sample=False)
    assert cache.get_seq_length() >= 20
    cache.reset()
    assert cache.get_seq_length() == 0
    assert torch.equal(model.generate(prompt, past_key_values=cache, max_new_tokens=20, do_sample=False), first)


# The stage


SETTINGS = {"bits": 2, "group_size": 8, "residual": 16}


def test_perplexity_is_that_of_decoding_with_the_packed_cache(
    import_model: Callable[..., Artifact],
    whole_model: Callable[..., Any],
    make_tokens: Callable[..., Artifact],
    windows: Callable[[Artifact], Tensor],
    measure: Measure,
) -> None:
    base = import_model("llama")
    data = make_tokens(base, samples=3, length=45)
    logits = decoded(whole_model("llama"), windows(data), packed_cache(**SETTINGS))
    found = measure(base, data, kv_cache=SETTINGS)
    assert found["loss_nats"] == pytest.approx(loss_of(logits, windows(data)), rel=1e-5)
    assert found["loss_nats"] != pytest.approx(measure(base, data)["loss_nats"], rel=1e-3)
    assert found["runtime"].endswith("float32, KV cache in 2 bits, groups of 8, 16 tokens in full")


def test_with_a_residual_as_long_as_the_windows_perplexity_is_that_in_full(
    import_model: Callable[..., Artifact], make_tokens: Callable[..., Artifact], measure: Measure
) -> None:
    base = import_model("opt")
    data = make_tokens(base, samples=3, length=48)
    found = measure(base, data, kv_cache={**SETTINGS, "residual": 48})
    assert found["loss_nats"] == pytest.approx(measure(base, data)["loss_nats"], rel=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("bits", BITS)
def test_the_bytes_are_those_of_codes_scales_and_the_tokens_in_full(
    bits: int,
    dtype: str,
    import_model: Callable[..., Artifact],
    make_tokens: Callable[..., Artifact],
    measure: Measure,
) -> None:
    base = import_model("llama")
    found = measure(
        base, make_tokens(base, samples=3, length=45), dtype=dtype, kv_cache={**SETTINGS, "bits": bits}
    )  # fmt: skip
    wide, number = 2 * 16, 4 if dtype == "float32" else 2  # key-value heads times head_dim; bytes of a number
    in_full = (45 - 32 + 16) * wide * number  # keys after two runs of 16; the last 16 values
    codes = (32 + 45 - 16) * wide * bits // 8
    scales = (32 + 45 - 16) * wide // 8 * 2 * number  # a scale and a minimum for each group of 8
    assert found["kv_cache_bytes"] == 3 * (in_full + codes + scales)
    assert found["kv_cache_bytes_in_full"] == 3 * 2 * 45 * wide * number


def test_a_measurement_that_was_killed_goes_on_with_the_cache_sizes_it_knew(
    store: Store,
    new_store: Callable[[], Store],
    import_model: Callable[..., Artifact],
    make_tokens: Callable[..., Artifact],
) -> None:
    entry = stage_named("evaluate/perplexity")
    parameters = entry.parameters(kv_cache=SETTINGS)

    def stop(what: str, done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    base = import_model("llama")
    inputs = {"model": base, "data": make_tokens(base)}
    with pytest.raises(KeyboardInterrupt):
        compute(Run(store, progress=stop), entry, parameters, inputs)
    action = compute(Run(store), entry, parameters, inputs)
    assert action.provenance["resumed"]["from_block"] == 2
    elsewhere = new_store()
    assert import_model("llama", elsewhere) == base
    make_tokens(base, elsewhere)
    assert compute(Run(elsewhere), entry, parameters, inputs).artifact == action.artifact


def test_without_a_cache_keys_are_what_they_were() -> None:
    entry = stage_named("evaluate/perplexity")
    inputs = {"model": Artifact("checkpoint", "a" * 64), "data": Artifact("tokens", "b" * 64)}
    assert preimage(entry, entry.parameters(), inputs)["parameters"] == {}
    cache = {"bits": 4, "residual": 128}
    assert preimage(entry, entry.parameters(kv_cache=cache), inputs)["parameters"] == {"kv_cache": {"bits": 4}}


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"bits": 3}, "Input should be 2, 4 or 8"),
        ({}, "Field required"),
        ({"bits": 2, "residual": 100}, "residual 100 is no multiple of group_size 32.*128 would be"),
        ({"bits": 2, "group_size": 12}, "multiple of 8"),
        ({"bits": 2, "residual": 0}, "greater than or equal to 8"),
        ({"bits": 2, "groups": 32}, "Extra inputs"),
    ],
)
def test_impossible_caches_are_refused(settings: dict[str, int], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        stage_named("evaluate/perplexity").parameters(kv_cache=settings)


def test_groups_that_do_not_fill_the_heads_are_refused_before_anything_is_computed(
    import_model: Callable[..., Artifact], make_tokens: Callable[..., Artifact], measure: Measure
) -> None:
    base = import_model("llama")
    with pytest.raises(StageError, match="group_size 32 does not divide the model's head_dim of 16; 8 or 16 would"):
        measure(base, make_tokens(base), kv_cache={"bits": 4})


def test_attention_to_later_tokens_is_refused() -> None:
    entry = stage_named("evaluate/perplexity")
    config = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128, "model_type": "gemma"}
    facts = ModelFacts({**config, "use_bidirectional_attention": True})
    (said,) = entry.check(entry.parameters(kv_cache=SETTINGS), facts)
    assert "attends to later tokens too" in said
    assert not list(entry.check(entry.parameters(), facts))


@pytest.mark.parametrize("family", ["mistral", "gemma2"])
def test_windows_longer_than_a_sliding_window_are_refused(
    family: str, import_model: Callable[..., Artifact], make_tokens: Callable[..., Artifact], measure: Measure
) -> None:
    base = import_model(family)
    with pytest.raises(StageError, match=r"attends to the last 8 tokens only.*set the data's length to 8 or less"):
        measure(base, make_tokens(base), kv_cache=SETTINGS)
