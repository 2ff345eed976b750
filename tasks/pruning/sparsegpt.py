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
    # The loops walk over columns: as rows of the transposed matrix these lie side by side in memory.
    work = torch.cat([weight.float() for weight in weights]).T.contiguous()
    selection = Selection(weights, sparsity=sparsity, pattern=pattern, masks=masks)
    keep = selection.keep
    hessian = gram.float().clone()
    dead = hessian.diagonal() == 0
    hessian.diagonal()[dead] = 1
    work[dead] = 0
    factor = inverse_factor(hessian, damping)
    del hessian

    step = _AT_ONCE if pattern is None else _multiple(pattern.group, _AT_ONCE)
    column_block = _COLUMN_BLOCK if pattern is None else _multiple(step, _COLUMN_BLOCK)
    for start in range(0, columns, column_block):
        stop = min(start + column_block, columns)
        inner = factor[start:stop, start:stop]
        errors = torch.empty_like(work[start:stop])
        for first in range(start, stop, step):
            last = min(first + step, stop)
            for column in range(first, last):
                position = column - start
                selection.reach(column, column_block, work, factor)
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
    return [
        (work[:, rows].T.contiguous(), mask) for rows, mask in zip(selection.members, selection.masks(), strict=True)
    ]


class Selection:
    """Which weights go of layers that read the same input, chosen while a solver walks over their columns.

    keep: bool [columns, rows], the layers' rows side by side, True where a weight stays. members: the rows of each.
    """

    def __init__(
        self,
        weights: Sequence[Tensor],
        *,
        sparsity: float,
        pattern: Pattern | None,
        masks: Sequence[Tensor | None] | None,
    ) -> None:
        """As for `solve`."""
        ends = torch.tensor([len(weight) for weight in weights]).cumsum(0).tolist()
        self.members = [slice(end - len(weight), end) for end, weight in zip(ends, weights, strict=True)]
        self.keep = torch.ones(weights[0].shape[1], ends[-1], dtype=torch.bool, device=weights[0].device)
        self._before = _transposed(masks, weights)
        self._sparsity = sparsity
        self.pattern = pattern

    def masks(self) -> list[Tensor]:
        """The keep-mask of each layer, [out_features, in_features]."""
        return [self.keep[:, rows].T.contiguous() for rows in self.members]

    def reach(self, column: int, column_block: int, work: Tensor, factor: Tensor) -> None:
        """Choose among the weights of all columns that are chosen together with `column`, if it is their first.

        work: the weights as they are now, [columns, rows]. factor: U of H^-1 = U^T U, [columns, columns].
        column_block: columns chosen together where there is no pattern.
        """
        together = column_block if self.pattern is None else self.pattern.group
        if column % together:
            return
        columns = slice(column, min(column + together, len(work)))
        score = (work[columns] / factor.diagonal()[columns, None]).square_()
        if self._before is not None:
            score.masked_fill_(~self._before[columns], -1.0)  # what went before goes first
        if self.pattern is not None:
            self.keep[columns] = keep_by_pattern(score.T.contiguous(), self.pattern).T
        else:
            for rows in self.members:
                height = rows.stop - rows.start
                count = int(self._sparsity * height * columns.stop) - int(self._sparsity * height * columns.start)
                self.keep[columns, rows] = keep_all_but(score[:, rows], count)
        if self._before is not None:
            self.keep[columns] &= self._before[columns]


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
