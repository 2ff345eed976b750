"""AWQ's checkpoint format in its version "GEMM": 4-bit codes packed into int32, as vLLM, transformers and GPTQModel
read it.

For a weight [out_features, in_features] `x.weight` the tensors are
`x.qweight` int32 [in_features, out_features / 8], codes of eight outputs in a word, from the lowest bits up those of 0,
2, 4, 6, 1, 3, 5, 7; `x.qzeros` int32 [groups, out_features / 8], zero points likewise; `x.scales` float16 [groups,
out_features]. Groups are consecutive inputs; (code - zero point) * scale is the weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .gptq_format import pack_rows, unpack_rows
from .grid import Solution

BITS = 4
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def pack(module: str, solution: Solution) -> dict[str, Tensor]:
    """The three tensors of a layer, `module` being its full name without `.weight`."""
    return {
        f"{module}.qweight": _pack_columns(solution.codes.T),
        f"{module}.qzeros": _pack_columns(solution.zeros),
        f"{module}.scales": solution.scales.to(torch.float16),
    }


def unpack_all(tensors: Mapping[str, Tensor], device: str) -> dict[str, Tensor]:
    """{`x.weight`: float32 weight [out_features, in_features]} for every packed layer among the tensors."""
    weights = {}
    for name in tensors:
        module, _, part = name.rpartition(".")
        if part != "qweight":
            continue
        codes, zeros = (unpack_columns(tensors[f"{module}.{one}"].to(device)) for one in ("qweight", "qzeros"))
        scales = tensors[f"{module}.scales"].to(device).float()
        group = torch.arange(len(codes), device=codes.device) // (len(codes) // len(scales))
        weight = (codes.to(torch.int32) - zeros.to(torch.int32)[group]).float() * scales[group]
        weights[f"{module}.weight"] = weight.T.contiguous()
    return weights


def quantization_config(group_size: int) -> dict[str, Any]:
    """What goes into `quantize_config.json`, and into config.json under `quantization_config`."""
    return {
        "quant_method": "awq",
        "version": "gemm",
        "bits": BITS,
        "group_size": group_size,
        "zero_point": True,
        "modules_to_not_convert": None,
    }


def _pack_columns(codes: Tensor) -> Tensor:
    """Codes [n, m] packed along the second dimension: int32 [n, m / 8]."""
    rows, columns = codes.shape
    return pack_rows(codes.reshape(rows, -1, 8)[:, :, ORDER].reshape(rows, columns).T, BITS).T.contiguous()


def unpack_columns(packed: Tensor) -> Tensor:
    """The inverse of `_pack_columns`: uint8 [n, m]."""
    codes = unpack_rows(packed.T, BITS).T
    back = sorted(range(8), key=ORDER.__getitem__)
    return codes.reshape(len(packed), -1, 8)[:, :, back].reshape(codes.shape)
