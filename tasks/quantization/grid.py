"""Uniform quantization grids: one scale and zero point for each output row of a group of inputs."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Grid(NamedTuple):
    """scale: [rows] float32, already rounded to what is stored; zero: [rows] float32, whole numbers."""

    scale: Tensor
    zero: Tensor


def fit_grid(weight: Tensor, bits: int, *, symmetric: bool, scale_dtype: torch.dtype = torch.float16) -> Grid:
    """The grid that spans each row of `weight` [rows, columns] and zero. Frantar et al. 2022, section 4 (min-max).

    Symmetric: the zero point stands in the middle of the codes. Zero is always representable exactly.
    """
    top = 2**bits - 1
    low = weight.amin(1).clamp(max=0)
    high = weight.amax(1).clamp(min=0)
    if symmetric:
        high = torch.maximum(low.abs(), high)
        low = -high
    empty = high == low
    low = torch.where(empty, torch.full_like(low, -1), low)
    high = torch.where(empty, torch.full_like(high, 1), high)
    smallest = torch.finfo(scale_dtype).smallest_normal
    scale = ((high - low) / top).clamp(min=smallest, max=torch.finfo(scale_dtype).max).to(scale_dtype).float()
    zero = torch.full_like(scale, (top + 1) // 2) if symmetric else torch.round(-low / scale).clamp(0, top)
    return Grid(scale, zero)


def to_codes(weight: Tensor, grid: Grid, bits: int) -> Tensor:
    """Nearest codes, whole numbers in float32 in [0, 2^bits - 1], for `weight` [rows, columns] or [rows]."""
    scale, zero = (grid.scale, grid.zero) if weight.dim() == 1 else (grid.scale[:, None], grid.zero[:, None])
    return torch.round(weight / scale).add_(zero).clamp_(0, 2**bits - 1)


def from_codes(codes: Tensor, grid: Grid) -> Tensor:
    """The weights that codes stand for, float32."""
    scale, zero = (grid.scale, grid.zero) if codes.dim() == 1 else (grid.scale[:, None], grid.zero[:, None])
    return (codes - zero) * scale
