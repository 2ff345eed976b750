"""Causal attention on the CPU, without most of the keys that come after a query.

torch's CPU kernel leaves such keys out in whole blocks of 512 only: in windows of 512 tokens none, and half of its work
is for nothing. Given some queries at a time, with the keys up to the last of them, it has two thirds of it left.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "coldpress_causal"
_QUERIES_AT_ONCE = 192
# From here on the kernel takes queries in larger pieces by itself, with other rounding; and leaves out more keys.
_LONG = 768


def use_causal_attention(model: Any) -> None:
    """Let a `transformers` model on the CPU attend this way, where it would have used torch's attention."""
    if model.config._attn_implementation == "sdpa":
        AttentionInterface.register(NAME, _attend)
        AttentionMaskInterface.register(NAME, sdpa_mask)
        model.set_attn_implementation(NAME)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **keywords: Any,
) -> tuple[Tensor, None]:
    """What `transformers` calls for attention. Returns [windows, length, heads, head_dim].

    The same bits as its own where the last piece is a whole one or nearly so; else some are off in their last place, as
    the kernel takes few queries in smaller groups.
    """
    length = query.shape[2]
    if (
        attention_mask is not None
        or key.shape[2] != length
        or not _QUERIES_AT_ONCE < length < _LONG
        or keywords.get("dropout")
        or keywords.get("position_bias") is not None
    ):
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **keywords)
    pieces = []
    for start in range(0, length, _QUERIES_AT_ONCE):
        end = min(start + _QUERIES_AT_ONCE, length)
        piece = torch.nn.functional.scaled_dot_product_attention(
            query[:, :, start:end],
            key[:, :, :end],
            value[:, :, :end],
            attn_mask=_mask(start, end, query.dtype) if start else None,
            is_causal=not start,
            scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],  # with a mask `transformers` would copy keys and values instead
        )
        pieces.append(piece.transpose(1, 2))
    return torch.cat(pieces, dim=1), None


@lru_cache(maxsize=8)
def _mask(start: int, end: int, dtype: torch.dtype) -> Tensor:
    """[1, 1, end - start, end]: minus infinity where a key comes after the query."""
    return torch.full((1, 1, end - start, end), float("-inf"), dtype=dtype).triu(start + 1)
