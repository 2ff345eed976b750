"""Attention with queries in pieces: `transformers`' own, in all families that use torch's."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from coldpress.storage.artifacts import Artifact
from coldpress.tasks.architectures import known_model_types
from coldpress.tasks.causal_attention import _attend
from coldpress.tasks.skeleton import Skeleton
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward

LENGTH = 450  # two pieces and a shorter one


@pytest.fixture
def pieces(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(queries, keys) of each piece that torch attended to."""
    seen = []
    plain = torch.nn.functional.scaled_dot_product_attention

    def see(query: Tensor, key: Tensor, *arguments: Any, **keywords: Any) -> Tensor:
        seen.append((query.shape[2], key.shape[2]))
        return plain(query, key, *arguments, **keywords)

    monkeypatch.setattr("torch.nn.functional.scaled_dot_product_attention", see)
    return seen


def some_windows(length: int) -> Tensor:
    return torch.randint(0, 128, (2, length), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def whole_logits(model: Any, windows: Tensor) -> Tensor:
    return torch.cat([model(window[None], use_cache=False).logits for window in windows])


@pytest.mark.parametrize("family", known_model_types())
def test_logits_are_those_of_the_whole_model(
    family: str,
    import_model: Callable[..., Artifact],
    whole_model: Callable[..., Any],
    block_loop_logits: Callable[..., Tensor],
    pieces: list[tuple[int, int]],
) -> None:
    longer = {"max_position_embeddings": 512}
    by_blocks = block_loop_logits(import_model(family, **longer), some_windows(LENGTH))
    if family == "llama":
        assert set(pieces) == {(192, 192), (192, 384), (66, 450)}
    assert torch.equal(by_blocks, whole_logits(whole_model(family, **longer), some_windows(LENGTH)))


@pytest.mark.parametrize("length", [193, 256, 385, 577, 767])  # a rest of one query, or of many
@pytest.mark.parametrize("sharing", [1, 3])
def test_with_few_queries_in_the_last_piece_it_is_off_in_the_last_place_at_most(length: int, sharing: int) -> None:
    chance = torch.Generator().manual_seed(length)
    query, key, value = (torch.randn(2, heads, length, 16, generator=chance) for heads in (3 * sharing, 3, 3))
    module = SimpleNamespace(num_key_value_groups=sharing, is_causal=True)
    found, _ = _attend(module, query, key, value, None)  # type: ignore[arg-type]
    wanted, _ = sdpa_attention_forward(module, query, key, value, None)  # type: ignore[arg-type]
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("length", [192, 768])
def test_short_and_long_windows_are_left_to_torch(
    length: int,
    import_model: Callable[..., Artifact],
    block_loop_logits: Callable[..., Tensor],
    pieces: list[tuple[int, int]],
) -> None:
    block_loop_logits(import_model("llama", max_position_embeddings=1024), some_windows(length))
    assert set(pieces) == {(length, length)}


def test_what_attends_in_another_way_keeps_to_it(whole_model: Callable[..., Any]) -> None:
    config = whole_model("gemma2").config.to_dict()  # caps its scores, which torch's attention can't
    skeleton = Skeleton(config, torch.float32, "cpu")
    assert skeleton.model.config._attn_implementation == "eager"
