"""LLM.int8() as bitsandbytes stores it, under the names that `transformers` loads, and what its runtime computes.

For a weight `x.weight`: its codes `x.weight` int8 [out_features, in_features]; `x.SCB` float32 [out_features], the
largest magnitude of each row; `x.weight_format` uint8 [], 0 for "row by row", the only one still in use.
Dettmers et al. 2022 (arXiv:2208.07339), section 3.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...storage.errors import ColdpressError

SCALE, LAYOUT = "SCB", "weight_format"
_TOP = 127
_STEP = 7.874015718698502e-3  # 1 / 127 as bitsandbytes writes it, so that weights are equal to the last bit


def to_codes(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes int8 [rows, columns] and the largest magnitude float32 [rows] of a weight of any floating dtype.

    The weight is rounded to float16 first, as bitsandbytes does. Raises ValueError for what float16 doesn't hold.
    """
    halves = weight.half()
    if not bool(halves.isfinite().all()):
        raise ValueError("a weight is not a finite number in float16, in which bitsandbytes takes weights")
    absmax = halves.abs().amax(1).float()
    return _round_to_steps(halves, absmax).to(torch.int8), absmax


def from_codes(codes: Tensor, absmax: Tensor) -> Tensor:
    """The values that codes [..., columns] stand for, absmax [...] being the largest magnitudes; float32."""
    return codes * absmax[..., None] * _STEP


def _round_to_steps(values: Tensor, absmax: Tensor) -> Tensor:
    """Whole numbers in float32 from -127 to 127 for values [..., columns]; 0 where absmax [...] is 0."""
    return torch.round(values.float() * (_TOP / torch.where(absmax == 0, 1, absmax))[..., None])


def pack(name: str, weight: Tensor) -> dict[str, Tensor]:
    """The tensors of one layer for its weight [out_features, in_features], full name ending in `.weight`."""
    module = name.removesuffix(".weight")
    codes, absmax = to_codes(weight)
    return {name: codes, f"{module}.{SCALE}": absmax, f"{module}.{LAYOUT}": torch.zeros((), dtype=torch.uint8)}


def packed_modules(names: Mapping[str, Any]) -> list[str]:
    """The layers, among tensors by name, that are packed."""
    return [name.removesuffix(f".{SCALE}") for name in names if name.endswith(f".{SCALE}")]


def unpack_all(tensors: Mapping[str, Tensor], device: str) -> dict[str, Tensor]:
    """{`x.weight`: float32 weight [out_features, in_features]} for every packed layer among the tensors.

    Raises ColdpressError for the layouts that bitsandbytes wrote for some GPUs before version 0.45.
    """
    weights = {}
    for module in packed_modules(tensors):
        layout = int(tensors.get(f"{module}.{LAYOUT}", torch.zeros(())))
        if layout:
            raise ColdpressError(f"{module} is stored in bitsandbytes' old layout {layout}; save it again with 0.45 on")
        codes, absmax = (tensors[f"{module}.{part}"].to(device) for part in ("weight", SCALE))
        weights[f"{module}.weight"] = from_codes(codes, absmax)
    return weights


def round_inputs(inputs: Tensor, threshold: float) -> Tensor:
    """What the runtime makes of a layer's inputs [..., tokens, in_features]; times the stored weight it is its output.

    Features in which any token's magnitude reaches `threshold` stay as they are (0: none); of the others, each token's
    are rounded to 127 steps of its largest magnitude below the threshold. What is rounded is taken in float16. The
    leading dimensions are calls of their own. In float32 this is the product of integers, rescaled, plus that of
    the outlier features (Dettmers et al. 2022, eq. 8), with outlier weights in 8 bit, as bitsandbytes keeps them.
    """
    halves = inputs.half().float()
    outliers = halves.abs() >= threshold if threshold > 0 else torch.zeros_like(halves, dtype=torch.bool)
    below = halves.masked_fill(outliers, 0)
    absmax = below.abs().amax(-1)
    rounded = from_codes(_round_to_steps(below, absmax), absmax)
    return torch.where(outliers.any(-2, keepdim=True), inputs, rounded.to(inputs.dtype))


def quantization_config(threshold: float, skipped: list[str]) -> dict[str, Any]:
    """What goes into config.json under `quantization_config`."""
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": False,
        "load_in_8bit": True,
        "llm_int8_threshold": threshold,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": skipped,
    }
