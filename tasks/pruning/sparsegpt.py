"""SparseGPT: remove weights column by column, let the columns to come make up for each loss.

Pure maths over tensors; Frantar and Alistarh 2023 (arXiv:2301.00774), algorithm 1. Layers that read the same input
share their Hessian, so their rows are solved together; which weights go is chosen for each layer by itself.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..gram import inverse_factor
from .selection import Pattern, keep_all_but, keep_by_pattern

_COLUMN_BLOCK = 128  # columns whose mask is chosen at once, the paper's B and B_s
_AT_ONCE = 32  # columns between which updates go one by one; those further on wait for a matrix product


def solve(
    weights: Sequence[Tensor],
    gram: Tensor,
    *,
    sparsity: float,
    pattern: Pattern | None = None,
    damping: float = 0.01,
    masks: Sequence[Tensor | None] | None = None,
) -> list[tuple[Tensor, Tensor]]:
    """Prune layers that read the same input: [(new weight in float32, keep-mask)], both [out_features, in_features].

    weights: each [out_features, in_features], any floating dtype. gram: [in_features, in_features] = sum x x^T.
    sparsity: share removed of each matrix, int(share * elements) exactly, chosen in blocks of 128 columns by
    w^2 / [H^-1]_jj; pattern: chosen in each group of inputs when its first column is reached. damping: share of the
    mean diagonal added to the diagonal. masks: what was pruned before stays so; its zeros count as removed.
    Raises ValueError when the Gram matrix is not positive definite.
    """
    columns = gram.shape[0]
    ends = torch.tensor([len(weight) for weight in weights]).cumsum(0).tolist()
    members = [slice(end - len(weight), end) for end, weight in zip(ends, weights, strict=True)]
    # The loops walk over columns: as rows of the transposed matrix these lie side by side in memory.
    work = torch.cat([weight.float() for weight in weights]).T.contiguous()
    before = _transposed(masks, weights)
    hessian = gram.float().clone()
    dead = hessian.diagonal() == 0
    hessian.diagonal()[dead] = 1
    work[dead] = 0
    factor = inverse_factor(hessian, damping)
    del hessian

    keep = torch.ones_like(work, dtype=torch.bool)
    step = _AT_ONCE if pattern is None else _multiple(pattern.group, _AT_ONCE)
    column_block = _COLUMN_BLOCK if pattern is None else _multiple(step, _COLUMN_BLOCK)
    for start in range(0, columns, column_block):
        stop = min(start + column_block, columns)
        inner = factor[start:stop, start:stop]
        if pattern is None:
            score = _score(work[start:stop], inner.diagonal(), None if before is None else before[start:stop])
            for rows in members:
                height = rows.stop - rows.start
                count = int(sparsity * height * stop) - int(sparsity * height * start)
                keep[start:stop, rows] = keep_all_but(score[:, rows], count)
            if before is not None:
                keep[start:stop] &= before[start:stop]
        errors = torch.empty_like(work[start:stop])
        for first in range(start, stop, step):
            last = min(first + step, stop)
            for column in range(first, last):
                position = column - start
                if pattern is not None and column % pattern.group == 0:
                    group = slice(column, column + pattern.group)
                    _choose_group(work, factor, before, keep, group, pattern)
                value = work[column]
                error = errors[position] = value.masked_fill(keep[column], 0).div_(inner[position, position])
                value.masked_fill_(~keep[column], 0)
                if column + 1 < last:
                    work[column + 1 : last].addr_(inner[position, position + 1 : last - start], error, alpha=-1)
            if last < stop:
                done = slice(first - start, last - start)
                work[last:stop].addmm_(inner[done, last - start :].T, errors[done], alpha=-1)
        if stop < columns:
            work[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
    return [(work[:, rows].T.contiguous(), keep[:, rows].T.contiguous()) for rows in members]


def _score(work: Tensor, diagonal: Tensor, before: Tensor | None) -> Tensor:
    """w^2 / [H^-1]_jj of columns (rows here), -1 for what was pruned before."""
    score = (work / diagonal[:, None]).square_()
    return score if before is None else score.masked_fill_(~before, -1.0)


def _choose_group(
    work: Tensor, factor: Tensor, before: Tensor | None, keep: Tensor, group: slice, pattern: Pattern
) -> None:
    score = _score(work[group], factor.diagonal()[group], None if before is None else before[group])
    keep[group] = keep_by_pattern(score.T.contiguous(), pattern).T
    if before is not None:
        keep[group] &= before[group]


def _transposed(masks: Sequence[Tensor | None] | None, weights: Sequence[Tensor]) -> Tensor | None:
    if masks is None or all(mask is None for mask in masks):
        return None
    whole = [
        torch.ones_like(weight, dtype=torch.bool) if mask is None else mask
        for mask, weight in zip(masks, weights, strict=True)
    ]
    return torch.cat(whole).T.contiguous()


def _multiple(of: int, most: int) -> int:
    """The largest multiple of `of` up to `most`, at least `of`."""
    return max(of, most - most % of)
