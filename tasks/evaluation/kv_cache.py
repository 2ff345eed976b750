"""KIVI's quantization of cached keys and values, and the attention of a decoder that reads such a cache.

Liu et al. 2024, arXiv:2402.02750: asymmetric codes between a group's least and largest value. A group is, of keys
(after rotary positions), tokens in a row of one channel; of values, channels in a row of one token. The last tokens
stay in full precision. Pure functions over tensors; the cache itself is in packed_cache.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..half_precision import lacks_instructions

# Queries whose scores are held at once: 32 heads x 256 x 4,096 keys x 4 bytes = 0.13 GB, a few times.
QUERY_CHUNK = 256


def quantize(states: Tensor, bits: int, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Round to 2^bits levels between the least and the largest of each group along the last dimension.

    states: floating point [..., n], n a multiple of group_size. Returns codes, uint8 [..., n], and scale and minimum,
    [..., n / group_size] in the dtype of the states, in which the minimum is exact. What the codes stand for is at most
    half a scale away from the states, but for the rounding of the scale: in bfloat16 with 8 bits a whole one.
    """
    levels = 2**bits - 1
    groups = states.unflatten(-1, (-1, group_size))
    minimum = groups.amin(-1)
    span = groups.amax(-1).float() - minimum.float()
    scale = (span / levels).to(states.dtype)
    scale = torch.where(scale == 0, 1, scale)  # all equal, or too close to each other for the dtype
    steps = (groups.float() - minimum.float()[..., None]) / scale.float()[..., None]
    return steps.round().clamp(0, levels).to(torch.uint8).flatten(-2), scale, minimum


def dequantize(codes: Tensor, scale: Tensor, minimum: Tensor) -> Tensor:
    """minimum + code * scale: [..., n] in the dtype of the scale, for codes [..., n] and their groups' scales."""
    groups = codes.unflatten(-1, (scale.shape[-1], -1)).float()
    return (groups * scale.float()[..., None] + minimum.float()[..., None]).to(scale.dtype).flatten(-2)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes of 2, 4 or 8 bits, uint8 [..., n], as bytes [..., n * bits / 8]; the first is in a byte's lowest bits."""
    together = codes.unflatten(-1, (-1, 8 // bits))
    packed = together[..., 0].clone()
    for place in range(1, 8 // bits):
        packed |= together[..., place] << (bits * place)
    return packed


def unpack(packed: Tensor, bits: int) -> Tensor:
    """The codes, uint8 [..., n], of bytes [..., n * bits / 8]."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    return ((packed[..., None] >> shifts) & (2**bits - 1)).flatten(-2)


def rounded(states: Tensor, bits: int, group_size: int) -> Tensor:
    """States [..., n] as they come back from the cache."""
    return dequantize(*quantize(states, bits, group_size))


def decoding_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    bits: int,
    group_size: int,
    residual: int,
    scaling: float,
    softcap: float | None = None,
) -> Tensor:
    """Causal attention as token-by-token decoding with the cache computes it, for all tokens of some windows together.

    When token t (from 0) is decoded, the cache holds those before it. Keys are quantized in whole runs of `residual`
    tokens: key j is if j < t // residual * residual. Values are but for the last `residual` ones: value j is if
    j < t - residual. Token t's own never are.

    query: [windows, heads, length, head_dim]; key, value: [windows, key-value heads, length, head_dim], each read by
    heads / key-value heads of the queries. scaling multiplies scores; with softcap c scores s become c * tanh(s / c).
    Returns [windows, heads, length, head_dim].
    """
    length, shared = query.shape[2], query.shape[1] // key.shape[1]
    whole = length // residual * residual
    held_keys = key[:, :, :0]
    if whole:
        held_keys = rounded(key[:, :, :whole].transpose(-1, -2), bits, group_size).transpose(-1, -2)
    held_values = rounded(value, bits, group_size)
    grouped = query.unflatten(1, (key.shape[1], shared))
    result = torch.empty_like(grouped)
    start = 0
    while start < length:
        flushed = start // residual * residual  # the same for all queries of a chunk
        stop = min(flushed + residual, start + QUERY_CHUNK, length)
        keys = torch.cat((held_keys[:, :, :flushed], key[:, :, flushed:stop]), 2)
        scores = _multiply(grouped[..., start:stop, :], keys.transpose(-1, -2)) * scaling
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        age = torch.arange(start, stop, device=key.device)[:, None] - torch.arange(stop, device=key.device)
        scores = scores.masked_fill(age < 0, float("-inf"))
        shares = scores.softmax(-1, dtype=torch.float32).to(value.dtype)
        in_full = age <= residual
        result[..., start:stop, :] = _multiply(shares.masked_fill(in_full, 0), held_values[:, :, :stop])
        result[..., start:stop, :] += _multiply(shares.masked_fill(~in_full, 0), value[:, :, :stop])
        start = stop
    return result.flatten(1, 2)


def _multiply(grouped: Tensor, matrix: Tensor) -> Tensor:
    """[windows, key-value heads, sharing, queries, n] times [windows, key-value heads, n, m]."""
    rows = grouped.flatten(2, 3)
    if rows.device.type == "cpu" and lacks_instructions(rows.dtype):
        product = (rows.float() @ matrix.float()).to(rows.dtype)
    else:
        product = rows @ matrix
    return product.unflatten(2, grouped.shape[2:4])
