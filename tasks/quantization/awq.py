"""AWQ's maths: scales that make the weights of salient inputs precise, and clipped outliers.

Lin et al. 2023 (arXiv:2306.00978), section 3.2, and the search of clipping ranges in their code. Inputs whose mean
magnitude is large are divided by a scale in the module before, and the weights that read them multiplied by it: these
get finer steps. Both searches measure the error that quantizing makes in the outputs of linear layers, ||(W - Q) X||^2,
from the Gram matrix of their inputs alone: (W - Q) X X^T (W - Q)^T. The published code runs attention and FFN again for
every scale instead, and leaves their inputs as the dense model has them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..gram import Gram
from .grid import from_codes, nearest

STEPS = 20
SMALLEST_SCALE = 1e-4
CLIPPING_STEPS = 10  # of STEPS: down to half of the range


class InputSummary:
    """What AWQ needs to know of a layer's inputs: their Gram matrix, and the mean magnitude of each."""

    def __init__(self, in_features: int) -> None:
        self._gram = Gram(in_features)
        self._magnitudes: Tensor | None = None
        self._tokens = 0

    def add(self, inputs: Tensor) -> None:
        """Add inputs [tokens, in_features] of any floating dtype."""
        self._gram.add(inputs)
        total = inputs.float().abs().sum(0)
        self._magnitudes = total if self._magnitudes is None else self._magnitudes + total
        self._tokens += len(inputs)

    def finite(self) -> bool:
        """Whether all inputs seen were finite numbers."""
        return self._gram.finite()

    def gram(self) -> Tensor:
        """Sum of x x^T, [in_features, in_features] float32, not to be changed in place."""
        return self._gram.matrix()

    def mean_magnitude(self) -> Tensor:
        """Mean of |x_j|, [in_features] float32."""
        assert self._magnitudes is not None
        return self._magnitudes / self._tokens


class Rounds(Protocol):
    """What turns weights into those that their codes stand for."""

    def values(self, weight: Tensor, keep: Tensor | None) -> Tensor: ...


@dataclass(frozen=True)
class Rounding:
    """How weights are quantized: see `grid.nearest`."""

    bits: int
    group_size: int
    symmetric: bool

    def values(self, weight: Tensor, keep: Tensor | None) -> Tensor:
        """`weight` [rows, columns] in float32 as its nearest codes stand for it."""
        codes, grid = nearest(weight, bits=self.bits, group_size=self.group_size, symmetric=self.symmetric, keep=keep)
        return from_codes(codes, grid).reshape(weight.shape)


@dataclass(frozen=True)
class Stacked:
    """How layers one below the other are quantized: the rows of each, and its rounding, None for one that is not."""

    layers: tuple[tuple[int, Rounding | None], ...]

    def values(self, weight: Tensor, keep: Tensor | None) -> Tensor:
        """`weight` [rows, columns] in float32 as its nearest codes stand for it."""
        parts, first = [], 0
        for rows, rounding in self.layers:
            here = slice(first, first + rows)
            first += rows
            part = weight[here]
            parts.append(part if rounding is None else rounding.values(part, None if keep is None else keep[here]))
        return torch.cat(parts)


def output_error(difference: Tensor, gram: Tensor) -> Tensor:
    """||D X||^2 of each row of D [rows, columns], for gram = X X^T; [rows] float32."""
    return (difference @ gram).mul_(difference).sum(1)


def pooled(values: Tensor, rows: Tensor) -> Tensor:
    """Each value [columns] replaced by the mean of those that come from the same row: query heads that read one
    key-value head have one scale.
    """
    count = int(rows.max()) + 1
    sums = values.new_zeros(count).index_add_(0, rows, values)
    return (sums / torch.bincount(rows, minlength=count).clamp(min=1))[rows]


def search_scale(
    weight: Tensor,
    gram: Tensor,
    magnitude: Tensor,
    rounding: Rounds,
    keep: Tensor | None = None,
    storable: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, float]:
    """The scale [columns] of a weight's inputs, and its exponent, with the least error after quantizing.

    weight: [rows, columns] float32, the layers that read these inputs one below the other. magnitude: mean |x|,
    [columns]. Tried are magnitude^a for a = 0, 1/20 … 1, normalized so that largest times smallest is one (Lin et al.
    2023, eq. 5); a = 0 is plain rounding. storable: turns a scale into the nearest one that can be stored. Raises
    ValueError for a Gram matrix with NaN or infinity in it.
    """
    best, chosen, least = torch.ones_like(magnitude), 0.0, float("inf")
    for step in range(STEPS + 1):
        exponent = step / STEPS
        scale = magnitude.pow(exponent).clamp(min=SMALLEST_SCALE)
        scale = scale / (scale.max() * scale.min()).sqrt()
        if storable is not None:
            scale = storable(scale)
        rounded = rounding.values(weight * scale, keep).div_(scale)
        error = output_error(rounded.sub_(weight), gram).sum().item()
        if error < least:
            best, chosen, least = scale, exponent, error
    if least == float("inf"):
        raise ValueError("the Gram matrix has NaN or infinity in it")
    return best, chosen


def clip(weight: Tensor, gram: Tensor, rounding: Rounding, keep: Tensor | None = None) -> Tensor:
    """`weight` [rows, columns] float32 with outliers cut off, where that makes the error of quantizing smaller.

    For each row and group the range is shrunk by 0, 5, 10 … 45 % of its largest magnitude, and the error compared that
    the group alone makes in the output.
    """
    rows, columns = weight.shape
    size = columns if rounding.group_size == -1 else rounding.group_size
    grouped = weight.reshape(rows, -1, size)
    groups = grouped.shape[1]
    diagonal = torch.stack([gram[i * size : (i + 1) * size, i * size : (i + 1) * size] for i in range(groups)])
    largest = grouped.abs().amax(2, keepdim=True)
    best = largest.clone()
    least = torch.full((rows, groups), float("inf"), device=weight.device)
    for step in range(CLIPPING_STEPS):
        bound = largest * (1 - step / STEPS)
        clipped = torch.clamp(grouped, -bound, bound)
        rounded = rounding.values(clipped.reshape(rows, columns), keep).reshape(grouped.shape)
        difference = (grouped - rounded).transpose(0, 1)
        error = ((difference @ diagonal) * difference).sum(2).T
        better = error < least
        least = torch.where(better, error, least)
        best = torch.where(better[..., None], bound, best)
    return torch.clamp(grouped, -best, best).reshape(rows, columns)
