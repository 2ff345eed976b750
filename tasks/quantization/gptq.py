"""The GPTQ solver: quantize columns one after the other, let the rest make up for each error.

Pure maths over tensors; Frantar et al. 2022 (arXiv:2210.17323), algorithm 1. Layers that read the same input share
their Hessian, so their rows are stacked and solved together.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..gram import inverse_factor
from .grid import Grid, Solution, fit_grid, from_codes, to_codes

if TYPE_CHECKING:
    from ..pruning.sparsegpt import Selection


def _aligned(column_block: int, group_size: int, together: int = 1) -> int:
    """The most columns up to `column_block` with which every group begins at the beginning of a block or inside one
    that holds it whole: then all of its columns are up to date when its grid is fitted. together: no block ends
    inside so many columns, whose weights are chosen at once; it may be larger than `column_block` for that.
    """
    both = math.lcm(group_size, together)
    if both <= column_block:
        return column_block - column_block % both
    return max((n for n in range(together, column_block + 1, together) if group_size % n == 0), default=both)


def solve(
    weight: Tensor,
    gram: Tensor,
    *,
    bits: int,
    group_size: int,
    symmetric: bool,
    act_order: bool,
    static_groups: bool,
    damping: float,
    keep: Tensor | None = None,
    selection: Selection | None = None,
    column_block: int = 128,
) -> Solution:
    """Quantize `weight` [rows, columns] against `gram` [columns, columns] = sum x x^T.

    group_size: columns that share a grid, -1 for all. act_order: columns with the largest diagonal first.
    static_groups: grids from the original weight rather than the updated one. keep: bool [rows, columns]; pruned
    weights (False) get the code of exact zero and their error is made up for like any other. selection: chooses what
    is pruned on the way instead, of weights already made up for earlier errors of both kinds (Frantar and Alistarh
    2023, section 3.5); grids span what is not known to go; not with `act_order`.
    """
    assert selection is None or (keep is None and not act_order)
    rows, columns = weight.shape
    group_size = columns if group_size == -1 else group_size
    work = weight.float().clone()
    hessian = gram.float().clone()

    dead = hessian.diagonal() == 0
    hessian.diagonal()[dead] = 1
    work[:, dead] = 0

    pattern = selection.pattern if selection is not None else None
    column_block = _aligned(column_block, group_size, pattern.group if pattern is not None else 1)
    group_index = torch.arange(columns, device=weight.device) // group_size
    grids: list[Grid | None] = [None] * (columns // group_size)
    if static_groups:
        for group in range(len(grids)):
            members = work[:, group * group_size : (group + 1) * group_size]
            grids[group] = fit_grid(members, bits, symmetric=symmetric)

    order = torch.argsort(hessian.diagonal(), descending=True, stable=True) if act_order else None
    if order is not None:
        work = work[:, order]
        hessian = hessian[order][:, order]
        keep = keep[:, order] if keep is not None else None
        if static_groups:
            group_index = group_index[order]  # columns stay in the groups they have in memory
    groups = group_index.tolist()
    factor = inverse_factor(hessian, damping)
    del hessian

    # The loops walk over columns: as rows of the transposed matrix these lie side by side in memory.
    work = work.T.contiguous()
    kept = selection.keep if selection is not None else keep.T.contiguous() if keep is not None else None
    codes = torch.empty_like(work)
    for start in range(0, columns, column_block):
        stop = min(start + column_block, columns)
        errors = torch.empty(stop - start, rows, device=work.device)
        inner = factor[start:stop, start:stop]
        for column in range(start, stop):
            if selection is not None:
                selection.reach(column, column_block, work, factor)
            group = groups[column]
            if grids[group] is None:
                # The group's later columns lie in this block, or were brought up to date before it began.
                members = work[column : column + group_size]
                if selection is not None:
                    members = members * selection.keep[column : column + group_size]  # what goes needs no codes
                grids[group] = fit_grid(members.T, bits, symmetric=symmetric)
            grid = grids[group]
            assert grid is not None
            value = work[column]
            code = to_codes(value, grid, bits)
            if kept is not None:
                code = torch.where(kept[column], code, grid.zero)
            codes[column] = code
            position = column - start
            error = (value - from_codes(code, grid)).div_(inner[position, position])
            errors[position] = error
            if column + 1 < stop:
                work[column + 1 : stop].addr_(inner[position, position + 1 :], error, alpha=-1)
        if stop < columns:
            work[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)

    codes = codes.T
    if order is not None:
        back = torch.argsort(order)
        codes = codes[:, back]
        group_index = group_index[back]
    solved = [grid for grid in grids if grid is not None]
    return Solution(
        codes.contiguous().to(torch.uint8),
        torch.stack([grid.scale for grid in solved]),
        torch.stack([grid.zero for grid in solved]).to(torch.uint8),
        group_index.to(torch.int32),
    )
