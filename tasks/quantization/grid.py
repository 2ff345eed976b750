"""Uniform quantization grids: one scale and zero point for each output row of a group of inputs.

Pure maths over tensors: grids, codes and back, and rounding to the nearest code, the baseline that needs no data.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Grid(NamedTuple):
    """scale: [rows] float32, already rounded to what is stored; zero: [rows] float32, whole numbers."""

    scale: Tensor
    zero: Tensor


class Solution(NamedTuple):
    """A quantized weight. codes: [rows, columns] uint8, columns in the weight's own order. scales: [groups, rows]
    float32 and zeros: [groups, rows] uint8, as stored. group_index: [columns] int32, the group of each column.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    group_index: Tensor

    def rows(self, first: int, last: int) -> Solution:
        """That of some of the rows."""
        return Solution(self.codes[first:last], self.scales[:, first:last], self.zeros[:, first:last], self.group_index)


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
    return (codes - zero).mul_(scale)


def nearest(
    weight: Tensor, *, bits: int, group_size: int, symmetric: bool, keep: Tensor | None = None
) -> tuple[Tensor, Grid]:
    """Each weight's nearest code in its group's grid: codes [rows * groups, group_size] and the grids of those rows.

    group_size: columns of `weight` [rows, columns] that share a grid, -1 for all. keep: bool [rows, columns]; pruned
    weights (False) get the code of exact zero.
    """
    size = weight.shape[1] if group_size == -1 else group_size
    grouped = weight.float().reshape(-1, size)
    grid = fit_grid(grouped, bits, symmetric=symmetric)
    codes = to_codes(grouped, grid, bits)
    if keep is not None:
        codes = torch.where(keep.reshape(-1, size), codes, grid.zero[:, None])
    return codes, grid


def round_to_nearest(
    weight: Tensor, *, bits: int, group_size: int, symmetric: bool, keep: Tensor | None = None
) -> Solution:
    """`weight` [rows, columns] with every value rounded by itself; arguments as for `nearest`."""
    rows, columns = weight.shape
    codes, grid = nearest(weight, bits=bits, group_size=group_size, symmetric=symmetric, keep=keep)
    groups = len(codes) // rows
    return Solution(
        codes.reshape(rows, columns).to(torch.uint8),
        grid.scale.reshape(rows, groups).T.contiguous(),
        grid.zero.reshape(rows, groups).T.contiguous().to(torch.uint8),
        torch.arange(columns, dtype=torch.int32, device=weight.device) // (columns // groups),
    )
