"""From scores to masks: exactly so many weights removed in each row, matrix or group."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor


class Pattern(NamedTuple):
    """N:M sparsity: `kept` weights of every `group` consecutive inputs stay."""

    kept: int
    group: int


def parse_pattern(text: str) -> Pattern:
    """ "2:4" -> two kept in each four inputs. Raises ValueError with the sentence to show."""
    match = re.fullmatch(r"(\d+):(\d+)", text)
    if match is None or not 0 < int(match[1]) < int(match[2]):
        raise ValueError(f"pattern {text!r} is not N:M with 0 < N < M; '2:4' keeps two in each four inputs")
    return Pattern(int(match[1]), int(match[2]))


def keep_by_row(score: Tensor, sparsity: float) -> Tensor:
    """Keep-mask [rows, columns]: in every row exactly int(columns * sparsity) of the lowest scores go.

    Among equal scores the first columns go first, as in a stable ascending sort (Sun et al. 2023, algorithm 1).
    """
    count = int(score.shape[1] * sparsity)
    return _keep_above(score, count)


def keep_by_matrix(score: Tensor, sparsity: float) -> Tensor:
    """Keep-mask [rows, columns]: exactly int(elements * sparsity) of the lowest scores of the matrix go."""
    flat = score.reshape(1, -1)
    return _keep_above(flat, int(flat.shape[1] * sparsity)).reshape(score.shape)


def keep_by_pattern(score: Tensor, pattern: Pattern) -> Tensor:
    """Keep-mask [rows, columns]: in each row, the `kept` highest scores of every `group` consecutive columns stay."""
    rows, columns = score.shape
    groups = score.reshape(rows * (columns // pattern.group), pattern.group)
    return _keep_above(groups, pattern.group - pattern.kept).reshape(rows, columns)


def _keep_above(score: Tensor, count: int) -> Tensor:
    """True but for the `count` lowest scores of each row; of equal ones the first go."""
    import torch

    if count == 0:
        return torch.ones_like(score, dtype=torch.bool)
    threshold = score.kthvalue(count, dim=1, keepdim=True).values
    remove = score < threshold
    # Of the scores equal to the threshold, as many go as are still missing from the count.
    ties = score == threshold
    missing = count - remove.sum(1, keepdim=True)
    if bool((ties.sum(1, keepdim=True) != missing).any()):
        ties &= ties.cumsum(1) <= missing
    return ~(remove | ties)
