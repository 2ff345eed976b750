"""NF4 as bitsandbytes stores it, block by block, under the names that `transformers` loads.

For a weight `x.weight`: the packed codes `x.weight` uint8 [numel / 2, 1]; `x.weight.absmax` and
`x.weight.quant_map`; with double quantization also `.nested_absmax` and `.nested_quant_map`; and
`x.weight.quant_state.bitsandbytes__nf4`, JSON as uint8.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

STATE = ".quant_state.bitsandbytes__nf4"


def pack(name: str, weight: Tensor, block_size: int, double: bool) -> dict[str, Tensor]:
    """The tensors of one layer for its weight [out_features, in_features], full name ending in `.weight`."""
    import bitsandbytes.functional as bnb

    codes, state = bnb.quantize_4bit(
        weight.contiguous(), blocksize=block_size, compress_statistics=double, quant_type="nf4"
    )
    parts = {f"{name}.{key}": value.contiguous() for key, value in state.as_dict(packed=True).items()}
    return {name: codes, **parts}


def unpack_all(tensors: Mapping[str, Tensor], device: str) -> dict[str, Tensor]:
    """{`x.weight`: weight [out_features, in_features]} for every packed layer, in the dtype it was quantized from."""
    import bitsandbytes.functional as bnb

    weights = {}
    for state_name in [name for name in tensors if name.endswith(STATE)]:
        name = state_name.removesuffix(STATE)
        parts = {key[len(name) + 1 :]: tensors[key] for key in tensors if key.startswith(f"{name}.")}
        state = bnb.QuantState.from_dict(parts, device=torch.device(device))
        # Unpacked flat: bitsandbytes' CPU kernel misreads blocks that don't end where rows do.
        shape, state.shape = state.shape, torch.Size([state.shape.numel()])
        weights[name] = bnb.dequantize_4bit(tensors[name].to(device), quant_state=state).reshape(shape)
    return weights


def quantization_config(double: bool, dtype: str, skipped: list[str]) -> dict[str, Any]:
    """What goes into config.json under `quantization_config`."""
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": double,
        "bnb_4bit_compute_dtype": dtype,
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": skipped,
    }
