"""From scores to masks: exactly so many weights removed in each row, matrix or group."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, NamedTuple

from ..side_by_side import side_by_side

if TYPE_CHECKING:
    from torch import Tensor


_ELEMENTS_AT_ONCE = 1 << 18  # for a thread: what fits into a processor's cache


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
    return keep_all_but(score, int(score.numel() * sparsity))


def keep_all_but(score: Tensor, count: int) -> Tensor:
    """Keep-mask [rows, columns]: exactly the `count` lowest scores of the matrix go."""
    return _keep_above(score.reshape(1, -1), count).reshape(score.shape)


def keep_by_pattern(score: Tensor, pattern: Pattern) -> Tensor:
    """Keep-mask [rows, columns]: in each row, the `kept` highest scores of every `group` consecutive columns stay."""
    rows, columns = score.shape
    groups = score.reshape(rows * (columns // pattern.group), pattern.group)
    return _keep_above(groups, pattern.group - pattern.kept).reshape(rows, columns)


def apply_mask(weight: Tensor, keep: Tensor) -> Tensor:
    """The weight, of any floating dtype, with zeros (+0.0) where `keep` is False."""
    import torch

    # Integers of the same width: on the CPU several times as fast as torch.where, and exact for every value.
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[weight.itemsize]
    return (weight.view(bits) * keep).view(weight.dtype)


def _keep_above(score: Tensor, count: int) -> Tensor:
    """True but for the `count` lowest scores of each row; of equal ones the first go."""
    import torch

    if count == 0:
        return torch.ones_like(score, dtype=torch.bool)
    if score.device.type == "cpu":
        return _keep_above_on_cpu(score, count)
    threshold = score.kthvalue(count, dim=1, keepdim=True).values
    keep = score > threshold
    missing = score.shape[1] - count - keep.sum(1, keepdim=True)
    if bool(missing.any()):  # of the scores equal to the threshold, the last stay
        ties = score == threshold
        keep |= ties & (ties.sum(1, keepdim=True) - ties.cumsum(1) < missing)
    return keep


def _keep_above_on_cpu(score: Tensor, count: int) -> Tensor:
    """The same with numpy, whose partition is several times as fast as torch's kthvalue and runs side by side."""
    import numpy
    import torch

    scores = score.numpy()
    keep = numpy.empty(scores.shape, dtype=bool)
    threads = torch.get_num_threads()
    rounds = max(1, math.ceil(scores.size / (threads * _ELEMENTS_AT_ONCE)))
    rows = max(1, math.ceil(len(scores) / (threads * rounds)))

    def select(first: int) -> None:
        part, kept = scores[first : first + rows], keep[first : first + rows]
        threshold = numpy.partition(part, count - 1, axis=1)[:, count - 1 : count]
        numpy.greater(part, threshold, out=kept)
        missing = scores.shape[1] - count - numpy.count_nonzero(kept, axis=1, keepdims=True)
        if missing.any():
            ties = part == threshold
            kept |= ties & (ties.sum(1, keepdims=True) - ties.cumsum(1) < missing)

    side_by_side(select, range(0, len(scores), rows), threads)
    return torch.from_numpy(keep)
