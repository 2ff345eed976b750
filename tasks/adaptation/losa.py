"""The numbers of LoSA: how sparse a round is, and which rank each block gets. Huang et al. 2025, arXiv:2501.07668.

Pure maths, without torch at import, since recipes are checked by it. The stage is in `losa_stage.py`; rates by block
are those of the allocation `rmi` in `pruning`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# Mean ranks of the rounds rise from `rank` minus this to `rank` plus this, as in the published runs (6 to 10).
RANK_RISE = 2


def round_sparsity(number: int, rounds: int, sparsity: float, schedule: str) -> float:
    """The share pruned in round 1..rounds: s_f - s_f (1 - t/T)^3 ("cubic"), or s_f t/T ("linear")."""
    left = 1 - number / rounds
    return sparsity * (1 - left**3) if schedule == "cubic" else sparsity * (1 - left)


def round_rank(number: int, rounds: int, rank: int) -> int:
    """The mean rank of round 1..rounds: it rises with the sparsity, and its own mean is `rank`."""
    if rounds == 1:
        return rank
    rise = min(RANK_RISE, rank - 1)
    return round(rank - rise + 2 * rise * (number - 1) / (rounds - 1))


def allocate_ranks(errors: Sequence[float], mean: int, highest: int) -> list[int]:
    """A rank from 1 to `highest` for each block, in proportion to its reconstruction error, `mean` on average exactly.

    What rounding and the bounds leave of a difference is taken from the blocks with the smallest errors, or given to
    those with the largest, one rank each, over and over until the budget is met.
    """
    count, total = len(errors), sum(errors)
    if total <= 0:
        return [mean] * count
    ranks = [min(max(round(error / total * count * mean), 1), highest) for error in errors]
    order = sorted(range(count), key=lambda block: (errors[block], block))
    while (difference := sum(ranks) - mean * count) != 0:
        for block in order if difference > 0 else reversed(order):
            if difference > 0 and ranks[block] > 1:
                ranks[block] -= 1
                difference -= 1
            elif difference < 0 and ranks[block] < highest:
                ranks[block] += 1
                difference += 1
            if difference == 0:
                break
    return ranks


def resize(a: Tensor, b: Tensor, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A [rank, in_features] and B [out_features, rank] of another rank: rows and columns at the end go, or are added.

    Added rows of A are Gaussian and added columns of B zero, so that growing does not change B A.
    """
    import torch

    more = rank - len(a)
    if more <= 0:
        return a[:rank].clone(), b[:, :rank].clone()
    rows = torch.randn(more, a.shape[1], generator=generator) / math.sqrt(3 * a.shape[1])
    return torch.cat([a, rows.to(a)]), torch.cat([b, b.new_zeros(len(b), more)], 1)


def relative_error(dense: Tensor, sparse: Tensor) -> float:
    """(1/d) sum_c ||D_c - S_c||^2 / ||D_c||^2 over the features c of activations [windows, length, d]."""
    import torch

    gone = torch.zeros(dense.shape[-1], dtype=torch.float64, device=dense.device)
    there = torch.zeros_like(gone)
    for one, other in zip(dense, sparse, strict=True):
        gone += (one.double() - other.double()).square_().sum(0)
        there += one.double().square_().sum(0)
    return float((gone / there.clamp(min=torch.finfo(torch.float64).tiny)).mean())
