"""PEFT's format for LoRA adapters, which transformers, vLLM and PEFT itself read.

For the weight [out_features, in_features] of a linear layer `x` there are `base_model.model.x.lora_A.weight`
[rank, in_features] and `base_model.model.x.lora_B.weight` [out_features, rank]. coldpress writes lora_alpha = r, so
that their product is added to the weight as it is. Which checkpoint an adapter belongs to stands in its manifest.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from ..architectures import Family

PREFIX = "base_model.model."
A, B = ".lora_A.weight", ".lora_B.weight"
CONFIG = "adapter_config.json"


def pack(weight: str, a: Tensor, b: Tensor) -> dict[str, Tensor]:
    """The two tensors of a layer; weight: its weight's full name."""
    module = PREFIX + weight.removesuffix(".weight")
    return {f"{module}{A}": a.contiguous(), f"{module}{B}": b.contiguous()}


def weight_of(name: str) -> str | None:
    """The full name of the weight that an adapter's tensor belongs to; None for tensors of other kinds."""
    if not name.startswith(PREFIX) or not name.endswith((A, B)):
        return None
    return f"{name[len(PREFIX) : -len(A)]}.weight"


def terms(tensors: Mapping[str, Tensor], device: str) -> dict[str, Tensor]:
    """{`x.weight`: B A in float32, [out_features, in_features]} for every layer with an adapter among the tensors."""
    found = {}
    for name, tensor in tensors.items():
        weight = weight_of(name)
        if weight is not None and name.endswith(A):
            b = tensors[name.removesuffix(A) + B]
            found[weight] = b.to(device).float() @ tensor.to(device).float()
    return found


def adapter_config(family: Family, blocks: int, ranks: Mapping[str, int]) -> dict[str, Any]:
    """What goes into adapter_config.json for terms of these ranks, {layer's full name: rank}, and scale 1.

    base_model_name_or_path stays empty, since where the base will lie is the user's affair:
    `PeftModel.from_pretrained(base, folder)` is given it.
    """
    rank = max(ranks.values())
    others = {layer: other for layer, other in sorted(ranks.items()) if other != rank}
    everywhere = [
        linear.name
        for linear in family.linears
        if all(family.block_prefix(index) + linear.name in ranks for index in range(blocks))
    ]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "target_modules": sorted(everywhere if len(everywhere) * blocks == len(ranks) else ranks),
        **({"rank_pattern": others, "alpha_pattern": others} if others else {}),
    }
