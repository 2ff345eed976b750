"""Low-rank terms B diag(d) A whose directions can be switched off one by one, by zeros in d."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout

from ..half_precision import linear
from .layers import Frozen, Lora


class DiagonalLora(Lora):
    """y = x W^T + scale (dropout(x) A^T * d) B^T; A [rank, in_features], d [rank], B [out_features, rank] in float32.

    What is added is zero at first, for B or d is.
    """

    def __init__(self, frozen: Frozen, shape: tuple[int, int], rank: int, scale: float, dropout: float) -> None:
        super().__init__(frozen, shape, rank, scale, dropout)
        self.diagonal = nn.Parameter(torch.empty(rank))
        self.begin()

    def begin(self) -> None:
        """Set the first values."""
        raise NotImplementedError

    def forward(self, inputs: Tensor) -> Tensor:
        factors = (self.diagonal * self.scale).to(inputs.dtype)
        low = linear(dropout(inputs, self.dropout), self.a.to(inputs.dtype)) * factors
        result: Tensor = self.frozen(inputs) + linear(low, self.b.to(inputs.dtype))
        return result

    def rank(self) -> int:
        """How many directions are left, those whose entry of d isn't zero."""
        return int(self.diagonal.count_nonzero())

    def factors(self) -> tuple[Tensor, Tensor]:
        """A [rank left, in_features] and B [out_features, rank left] of what is added, scale and d in B.

        PEFT knows no terms of rank 0, so where no direction is left one stays, which adds zero.
        """
        diagonal = self.diagonal.detach()
        left = diagonal != 0
        if not bool(left.any()):
            left[0] = True
        return self.a.detach()[left], self.b.detach()[:, left] * diagonal[left] * self.scale


class SingularLora(DiagonalLora):
    """P Lambda Q, shaped like a singular value decomposition: B is P, d the singular values, A is Q.

    Zhang et al. 2023 (AdaLoRA), section 3.1: P and Q are random, N(0, 0.02^2) as published, the singular values zero.
    """

    def begin(self) -> None:
        nn.init.normal_(self.a, std=0.02)
        nn.init.normal_(self.b, std=0.02)
        nn.init.zeros_(self.diagonal)


class GatedLora(DiagonalLora):
    """d is a gate for each direction.

    Ding et al. 2023 (SoRA), section 3.2: A and B begin as LoRA's do, the gates as N(0, 1), as published.
    """

    def begin(self) -> None:
        nn.init.normal_(self.diagonal)


def soft_threshold(gates: Tensor, threshold: float) -> Tensor:
    """sign(g) max(|g| - threshold, 0): the proximal step of threshold * |g|, after which small gates are exactly zero.

    Ding et al. 2023 (SoRA), arXiv:2311.11696, equations 6 to 8.
    """
    return gates.sign() * (gates.abs() - threshold).clamp_min(0)
