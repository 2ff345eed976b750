"""Pruning criteria: pure functions from a weight matrix (and statistics of its input) to a score of the same shape.

The lowest scores go. A new criterion is one function here and one line in `CRITERIA`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import Tensor


def magnitude_score(weight: Tensor) -> Tensor:
    """|W| in float32, [out_features, in_features]. Han et al. 2015, section 3."""
    return weight.float().abs()


def wanda_score(weight: Tensor, input_norm: Tensor) -> Tensor:
    """|W_ij| * ||X_j||_2 in float32, [out_features, in_features]. Sun et al. 2023, eq. 1.

    weight: [out_features, in_features]; input_norm: [in_features], the norm of each input over all calibration tokens.
    """
    return (weight * input_norm.float()).abs_()


@dataclass(frozen=True)
class Criterion:
    """An entry of the registry.

    score: the function. needs: which statistic it takes after the weight. compare: whether scores of the unstructured
    kind compete within each output row or within the whole matrix. version: raised when results change.
    """

    score: Callable[..., Any]
    needs: Literal["nothing", "input_norm"]
    compare: Literal["row", "matrix"]
    version: int
    paper: str


CRITERIA = {
    "magnitude": Criterion(magnitude_score, "nothing", "matrix", 1, "Han et al. 2015, arXiv:1506.02626"),
    "wanda": Criterion(wanda_score, "input_norm", "row", 1, "Sun et al. 2023, arXiv:2306.11695"),
}


class InputNorm:
    """Sum of squares of each input feature, for `||X_j||_2` over all tokens of all windows."""

    def __init__(self, in_features: int) -> None:
        self._in_features = in_features
        self._sum: Tensor | None = None

    def add(self, inputs: Tensor) -> None:
        """Add inputs [tokens, in_features] of any floating dtype; the sum is in float32."""
        squares = inputs.float().square().sum(0)
        self._sum = squares if self._sum is None else self._sum.add_(squares)

    def norm(self) -> Tensor:
        """||X_j||_2, [in_features], float32."""
        assert self._sum is not None
        assert self._sum.shape == (self._in_features,)
        return self._sum.sqrt()
