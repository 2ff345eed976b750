"""GPTQ's checkpoint format: integers packed into int32, as GPTQModel, vLLM and transformers read it.

For a weight [out_features, in_features] `x.weight` the tensors are
`x.qweight` int32 [in_features * bits / 32, out_features], codes packed along the inputs, the first in the lowest bits;
`x.qzeros` int32 [groups, out_features * bits / 32], zero points: minus one in checkpoint_format "gptq" (v1), as they
are in "gptq_v2". Symmetric grids are written as v1, which everything reads; others as v2, since GPTQModel refuses
asymmetric v1 files of other makers, whose zero point 0 wraps around;
`x.scales` float16 [groups, out_features]; `x.g_idx` int32 [in_features], the group of each input.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .gptq import Solution

PACKABLE_BITS = (2, 4, 8)
PARTS = ("qweight", "qzeros", "scales", "g_idx")


def pack_rows(codes: Tensor, bits: int) -> Tensor:
    """Codes [n, m] in [0, 2^bits - 1] packed along the first dimension: int32 [n * bits / 32, m]."""
    lanes = 32 // bits
    rows, columns = codes.shape
    shifts = torch.arange(0, 32, bits, dtype=torch.int64, device=codes.device)
    wide = codes.to(torch.int64).reshape(rows // lanes, lanes, columns) << shifts[:, None]
    # Every lane has bits of its own, so the sum is the bitwise or; values from 2^31 on wrap to negative int32.
    return wide.sum(1).to(torch.int32)


def unpack_rows(packed: Tensor, bits: int) -> Tensor:
    """The inverse of `pack_rows`: uint8 [n, m]."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=packed.device)
    lanes = (packed[:, None, :] >> shifts[:, None]) & (2**bits - 1)
    return lanes.reshape(-1, packed.shape[1]).to(torch.uint8)


def pack(module: str, solution: Solution, quantization: Mapping[str, Any]) -> dict[str, Tensor]:
    """The four tensors of a layer, `module` being its full name without `.weight`."""
    bits = int(quantization["bits"])
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
        rows = slice(first, first + len(weight))
        tensors.update(pack(name.removesuffix(".weight"), solution.of_rows(rows), quantization))
        first = rows.stop
    return tensors


def _zero_offset(quantization: Mapping[str, Any]) -> int:
    return 1 if quantization.get("checkpoint_format", "gptq") == "gptq" else 0


def unpack(tensors: Mapping[str, Tensor], module: str, quantization: Mapping[str, Any], device: str) -> Tensor:
    """The weight [out_features, in_features], float32, that a layer's four tensors stand for."""
    bits = int(quantization["bits"])
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


def quantization_config(bits: int, group_size: int, act_order: bool, symmetric: bool, damping: float) -> dict[str, Any]:
    """What goes into `quantize_config.json`, and into config.json under `quantization_config`."""
    return {
        "quant_method": "gptq",
        "checkpoint_format": "gptq" if symmetric else "gptq_v2",
        "bits": bits,
        "group_size": group_size,
        "desc_act": act_order,
        "sym": symmetric,
        "damp_percent": damping,
        "lm_head": False,
        "pack_dtype": "int32",
    }
