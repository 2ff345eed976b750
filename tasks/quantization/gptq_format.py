"""GPTQ's checkpoint format: integers packed into int32, as GPTQModel, vLLM and transformers read it.

For a weight [out_features, in_features] `x.weight` the tensors are
`x.qweight` int32 [in_features * bits / 32, out_features], codes packed along the inputs, the first in the lowest bits
(of 3-bit codes, 32 in three words);
`x.qzeros` int32 [groups, out_features * bits / 32], zero points: minus one in checkpoint_format "gptq" (v1), as they
are in "gptq_v2". Symmetric grids are written as v1, which everything reads; others as v2, since GPTQModel refuses
asymmetric v1 files of other makers, whose zero point 0 wraps around;
`x.scales` float16 [groups, out_features]; `x.g_idx` int32 [in_features], the group of each input.
Modules may differ in bits and group size: `precision_of` says which a module has, by the checkpoint's settings.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...storage.errors import ColdpressError
from .grid import Solution
from .precision import precision_of

PARTS = ("qweight", "qzeros", "scales", "g_idx")


def codes_at_once(bits: int) -> int:
    """The fewest codes that fill whole int32 words: 16 of 2 bits fill one word, 32 of 3 bits three, 8 of 4, 4 of 8."""
    return 32 // math.gcd(bits, 32)


def pack_rows(codes: Tensor, bits: int) -> Tensor:
    """Codes [n, m] in [0, 2^bits - 1] packed along the first dimension: int32 [n * bits / 32, m].

    Along it the words are one stream of bits, the lowest of each word first; a code of 3 bits may begin in one word and
    end in the next. n must be a multiple of `codes_at_once`.
    """
    rows, columns = codes.shape
    count = codes_at_once(bits)
    wide = codes.to(torch.int64).reshape(rows // count, count, columns)
    words = []
    for start in range(0, count * bits, 32):
        first, last = start // bits, -(-(start + 32) // bits)  # the codes with a bit in this word
        shifts = torch.arange(first * bits - start, last * bits - start, bits, device=codes.device)[:, None]
        # Every code has bits of its own, so the sum is the bitwise or. The lowest `bits` are those of the word before.
        words.append((wide[:, first:last] << (shifts + bits)).sum(1) >> bits)
    # What lies beyond 32 bits belongs to the next word; values from 2^31 on wrap to negative int32.
    return (torch.stack(words, 1) & 0xFFFFFFFF).reshape(-1, columns).to(torch.int32)


def unpack_rows(packed: Tensor, bits: int) -> Tensor:
    """The inverse of `pack_rows`: uint8 [n, m]."""
    columns = packed.shape[1]
    count = codes_at_once(bits)
    starts = torch.arange(0, count * bits, bits, dtype=torch.int32, device=packed.device)
    shifts = (starts % 32)[:, None]
    words = packed.reshape(-1, count * bits // 32, columns)
    if words.shape[1] == 1:
        codes = words >> shifts
    else:
        codes = words[:, starts // 32] >> shifts
        # Codes that end in the next word: its lowest bits, above those that are left of this one.
        split = (starts % 32 + bits > 32).nonzero().flatten()
        left = 32 - shifts[split]
        following = words[:, starts[split] // 32 + 1]
        codes[:, split] = (codes[:, split] & ((1 << left) - 1)) | (following << left)
    return (codes & (2**bits - 1)).reshape(-1, columns).to(torch.uint8)


def pack(module: str, solution: Solution, quantization: Mapping[str, Any]) -> dict[str, Tensor]:
    """The four tensors of a layer, `module` being its full name without `.weight`."""
    bits = _bits(quantization, module)
    zeros = (solution.zeros.to(torch.int32) - _zero_offset(quantization)) & (2**bits - 1)
    return {
        f"{module}.qweight": pack_rows(solution.codes.T, bits),
        f"{module}.qzeros": pack_rows(zeros.T, bits).T.contiguous(),
        f"{module}.scales": solution.scales.to(torch.float16),
        f"{module}.g_idx": solution.group_index,
    }


def pack_together(
    weights: Mapping[str, Tensor], solution: Solution, quantization: Mapping[str, Any]
) -> dict[str, Tensor]:
    """The tensors of layers that were solved together: {full name: weight}, in the order of their rows."""
    tensors: dict[str, Tensor] = {}
    first = 0
    for name, weight in weights.items():
        last = first + len(weight)
        tensors.update(pack(name.removesuffix(".weight"), solution.rows(first, last), quantization))
        first = last
    return tensors


def _bits(quantization: Mapping[str, Any], module: str) -> int:
    precision = precision_of(quantization, module)
    if precision is None:
        raise ColdpressError(f"{module} is packed, but the checkpoint's settings say that it is not quantized")
    return precision.bits


def _zero_offset(quantization: Mapping[str, Any]) -> int:
    return 1 if quantization.get("checkpoint_format", "gptq") == "gptq" else 0


def unpack(tensors: Mapping[str, Tensor], module: str, quantization: Mapping[str, Any], device: str) -> Tensor:
    """The weight [out_features, in_features], float32, that a layer's four tensors stand for."""
    bits = _bits(quantization, module)
    qweight, qzeros, scales, g_idx = (tensors[f"{module}.{part}"].to(device) for part in PARTS)
    codes = unpack_rows(qweight, bits)
    zeros = (unpack_rows(qzeros.T.contiguous(), bits).T.to(torch.int32) + _zero_offset(quantization)) & (2**bits - 1)
    group = g_idx.long()
    weight = (codes.to(torch.int32) - zeros[group]).float() * scales.float()[group]
    return weight.T.contiguous()


def unpack_all(tensors: Mapping[str, Tensor], quantization: Mapping[str, Any], device: str) -> dict[str, Tensor]:
    """{`x.weight`: float32 weight} for every packed layer among the tensors."""
    modules = [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]
    return {f"{module}.weight": unpack(tensors, module, quantization, device) for module in modules}


def quantization_config(
    bits: int,
    group_size: int,
    symmetric: bool,
    *,
    act_order: bool = False,
    damping: float | None = None,
    dynamic: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What goes into `quantize_config.json`, and into config.json under `quantization_config`.

    dynamic: what `precision.dynamic_of` made for modules that differ.
    """
    settings: dict[str, Any] = {
        "quant_method": "gptq",
        "checkpoint_format": "gptq" if symmetric else "gptq_v2",
        "bits": bits,
        "group_size": group_size,
        "desc_act": act_order,
        "sym": symmetric,
        "lm_head": False,
        "pack_dtype": "int32",
    }
    if damping is not None:
        settings["damp_percent"] = damping
    if dynamic:
        settings["dynamic"] = dict(dynamic)
    return settings
