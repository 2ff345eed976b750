"""Scales of features, moved into the module that makes them: the model stays as it was, its weights don't.

Tensors go by their full names. Where a scale can go is said in `architectures.Fold`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..architectures import Fold, family_of, feeding_rows


def storable_scale(norm: Tensor, offset: float, scale: Tensor) -> Tensor:
    """What a norm's weight is really divided by when it is divided by `scale` and stored: close to it, and exact.

    norm: [features] in its dtype; it is used as norm + offset. scale: [features] float32, positive. With the scale that
    is returned folding loses nothing, however coarse the dtype is. Where nothing would be left of the norm's weight, or
    its sign would turn, it is one.
    """
    before = norm.float() + offset
    after = _divided(norm, offset, scale).float() + offset
    return torch.where(before * after > 0, before / after, torch.ones_like(scale))


def _divided(norm: Tensor, offset: float, scale: Tensor) -> Tensor:
    return ((norm.float() + offset) / scale - offset).to(norm.dtype)


def fold_scale(tensors: dict[str, Tensor], prefix: str, config: Mapping[str, Any], fold: Fold, scale: Tensor) -> None:
    """Divide the features that `fold` is about by `scale` [features], and multiply the weights that read them by it.

    tensors: those of the block whose names begin with `prefix`, changed in place, each in its dtype. A scale that goes
    into a norm is one that `storable_scale` gave; features that come from one output of a layer have one scale.
    """
    family = family_of(config)
    into = prefix + fold.into
    name, bias = f"{into}.weight", f"{into}.bias"
    if any(linear.name == fold.into for linear in family.linears):
        divisor = torch.ones(len(tensors[name]), device=scale.device)
        divisor[torch.tensor(feeding_rows(config, fold), device=scale.device)] = scale
        _multiply(tensors, name, 1 / divisor[:, None])
    else:
        divisor = scale
        tensors[name] = _divided(tensors[name], family.norm_offset, scale)
    if bias in tensors:
        _multiply(tensors, bias, 1 / divisor)
    for linear in family.linears:
        if linear.reads == fold.reads:
            _multiply(tensors, f"{prefix}{linear.name}.weight", scale)


def _multiply(tensors: dict[str, Tensor], name: str, factor: Tensor) -> None:
    tensors[name] = (tensors[name].float() * factor).to(tensors[name].dtype)
