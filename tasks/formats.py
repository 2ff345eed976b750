"""Stored tensors to dense weights: the one place that knows how a checkpoint's formats are unpacked.

Whatever reads a model block by block (the block loop, perplexity, size) calls `unpack` and sees dense weights under
their usual names, exactly those that the stored bytes stand for.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..storage.errors import ColdpressError

if TYPE_CHECKING:
    import torch

FORMATS = ("dense", "gptq", "awq", "bitsandbytes")


def unpack(
    format: str,
    quantization: Mapping[str, Any] | None,
    tensors: Mapping[str, torch.Tensor],
    dtype: torch.dtype,
    device: str,
) -> dict[str, torch.Tensor]:
    """Dense tensors of `dtype` on `device` for stored ones; packed weights come back as [out_features, in_features].

    Where an adapter's tensors are among them its term is added to the weight, in float32.
    """
    from .adaptation import peft_format
    from .quantization import awq_format, gptq_format, int8_format, nf4_format

    match format:
        case "dense":
            packed: dict[str, torch.Tensor] = {}
        case "gptq":
            packed = gptq_format.unpack_all(tensors, quantization or {}, device)
        case "awq":
            packed = awq_format.unpack_all(tensors, device)
        case "bitsandbytes" if (quantization or {}).get("load_in_8bit"):
            packed = int8_format.unpack_all(tensors, device)
        case "bitsandbytes":
            packed = nf4_format.unpack_all(tensors, device)
        case _:
            raise ColdpressError(f"a checkpoint in the format '{format}' can't be read; known are {', '.join(FORMATS)}")
    whole = {name: tensor for name, tensor in tensors.items() if not _is_part(name, packed)}
    whole.update(packed)
    for name, term in peft_format.terms(tensors, device).items():
        whole[name] = term.add_(whole[name].to(device))
    return {name: tensor.to(device, dtype) for name, tensor in whole.items()}


def _is_part(name: str, packed: Mapping[str, torch.Tensor]) -> bool:
    """Whether a stored tensor is a piece of a weight: `x.qweight`, `x.SCB`, `x.weight.absmax`, or an adapter's
    `x.lora_A`.
    """
    from .adaptation import peft_format

    if peft_format.weight_of(name):
        return True
    module, _, last = name.rpartition(".")
    if last in _PARTS:
        return f"{module}.weight" in packed
    return any(name == weight or name.startswith(f"{weight}.") for weight in packed)


_PARTS = frozenset({"qweight", "qzeros", "scales", "g_idx", "SCB", "weight_format"})
