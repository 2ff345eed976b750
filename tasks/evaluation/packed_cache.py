"""A `transformers` cache whose keys and values are held quantized, and the block loop's attention that equals its use.

`packed_cache` is what a model decodes with; memory is that of the tensors it holds. `CachedAttention` gives the blocks
of a `Skeleton` the attention that decoding with it has, and weighs the cache of one window on the way.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer

from ..skeleton import Skeleton
from .kv_cache import decoding_attention, dequantize, pack, quantize, unpack


class PackedStates:
    """Quantized keys or values: codes packed into bytes, and each group's scale and minimum.

    Groups are along the last dimension; tokens are appended along `dim`.
    """

    def __init__(self, bits: int, group_size: int, dim: int) -> None:
        self.bits = bits
        self.group_size = group_size
        self.dim = dim
        self.tensors: list[Tensor] = []  # codes, scale, minimum

    def append(self, states: Tensor) -> None:
        """Quantize and keep states [..., n]; along the last dimension they must be whole groups."""
        codes, scale, minimum = quantize(states, self.bits, self.group_size)
        added = [pack(codes, self.bits), scale, minimum]
        held = self.tensors or [tensor.narrow(self.dim, 0, 0) for tensor in added]
        self.tensors = [torch.cat(both, self.dim) for both in zip(held, added, strict=True)]

    def states(self) -> Tensor:
        """All of them, as the codes say, in the dtype in which they came."""
        codes, scale, minimum = self.tensors
        return dequantize(unpack(codes, self.bits), scale, minimum)


class PackedLayer(CacheLayerMixin):
    """The cache of one block. `keys` and `values` are the tokens in full precision, as in KIVI: keys are quantized when
    there are `residual` of them, all at once; values one by one, when there are more. No beam search, no cropping.
    """

    def __init__(self, bits: int, group_size: int, residual: int) -> None:
        super().__init__()
        self.residual = residual
        self.old_keys = PackedStates(bits, group_size, dim=-1)  # [windows, heads, head_dim, tokens]
        self.old_values = PackedStates(bits, group_size, dim=-2)  # [windows, heads, tokens, head_dim]
        self.length = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.keys, self.values = (states[:, :, :0].clone() for states in (key_states, value_states))
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add tokens, [windows, heads, tokens, head_dim]. Returns what they attend to: those before them as they are
        held, and the tokens themselves in full precision.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        keys, values = torch.cat((self.keys, key_states), -2), torch.cat((self.values, value_states), -2)
        seen_keys, seen_values = keys, values
        if self.old_keys.tensors:
            seen_keys = torch.cat((self.old_keys.states().transpose(-1, -2), keys), -2)
        if self.old_values.tensors:
            seen_values = torch.cat((self.old_values.states(), values), -2)
        if leaving := keys.shape[-2] // self.residual * self.residual:
            self.old_keys.append(keys[..., :leaving, :].transpose(-1, -2))
            keys = keys[..., leaving:, :].clone()  # a view would keep all of it
        if (leaving := values.shape[-2] - self.residual) > 0:
            self.old_values.append(values[..., :leaving, :])
            values = values[..., leaving:, :].clone()
        self.keys, self.values = keys, values
        self.length += key_states.shape[-2]
        return seen_keys, seen_values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self.is_initialized = False
        self.keys = self.values = None
        self.old_keys.tensors, self.old_values.tensors = [], []
        self.length = 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        raise NotImplementedError("a packed cache can't be reordered: decode without beam search")

    def nbytes(self) -> int:
        """Bytes of the tensors it holds."""
        return held_bytes(self.keys, self.values, *self.old_keys.tensors, *self.old_values.tensors)


def packed_cache(bits: int, group_size: int, residual: int) -> Cache:
    """An empty cache for `past_key_values` of a `transformers` model. residual: a multiple of group_size."""
    return Cache(layer_class_to_replicate=partial(PackedLayer, bits, group_size, residual))  # type: ignore[arg-type]


def held_bytes(*tensors: Tensor | None) -> int:
    """Bytes of memory behind tensors, of which no two share any."""
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors if tensor is not None)


class CachedAttention:
    """Makes the blocks of a skeleton attend as decoding with a packed cache does, and weighs that cache.

    Must be made before the skeleton embeds.
    """

    NAME = "coldpress_kv_cache"

    def __init__(self, skeleton: Skeleton, bits: int, group_size: int, residual: int) -> None:
        self.settings = {"bits": bits, "group_size": group_size, "residual": residual}
        self._skeleton = skeleton
        self._weighed: dict[str, int] = {}
        # No mask function goes by this name, so that none is made: attention is causal.
        AttentionInterface.register(self.NAME, _attend)
        skeleton.model.set_attn_implementation(self.NAME)
        for module in skeleton.model.modules():
            if hasattr(module, "is_causal"):
                module.cached_attention = self

    def advance(self, index: int, weights: Mapping[str, Tensor], hidden: Tensor) -> dict[str, int]:
        """`Skeleton.advance`; returns the bytes of the first window's cache in this block, and those in full."""
        self._weighed = {}
        self._skeleton.advance(index, weights, hidden)
        assert self._weighed, "the block does not attend through transformers' attention interface"
        return self._weighed

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scaling: float, softcap: float | None) -> Tensor:
        """`decoding_attention`; the first window seen is put into caches too, to see how large they get."""
        if not self._weighed:
            packed, full = PackedLayer(**self.settings), DynamicLayer()
            for layer in (packed, full):
                layer.update(key[:1], value[:1])
            self._weighed = {
                "kv_cache_bytes": packed.nbytes(),
                "kv_cache_bytes_in_full": held_bytes(full.keys, full.values),
            }
        return decoding_attention(query, key, value, scaling=scaling, softcap=softcap, **self.settings)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """What `transformers` calls for attention. Returns [windows, length, heads, head_dim]."""
    assert attention_mask is None
    attention = module.cached_attention
    assert isinstance(attention, CachedAttention)
    return attention.attend(query, key, value, scaling, softcap).transpose(1, 2).contiguous(), None
