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


def wanda_cumulative_score(weight: Tensor, input_norm: Tensor) -> Tensor:
    """The share of its row's Wanda scores that a weight and all lower ones make up; the published code's variant.

    In float32, [out_features, in_features]. Removing the lowest of the whole matrix removes as large a share of the
    scores of every row, and so more weights where few matter: what the code finds by bisection, with the exact count.
    """
    score, order = wanda_score(weight, input_norm).sort(dim=1, stable=True)
    total = score.sum(1, keepdim=True).clamp(min=1e-30)
    return score.cumsum(1).div_(total).gather(1, order.argsort(dim=1))


def gblm_score(weight: Tensor, input_norm: Tensor, gradient: Tensor) -> Tensor:
    """|W| * (||X_j||_2 + alpha ||G||_p) in float32, [out_features, in_features]. Das et al. 2023.

    input_norm: [in_features], the root of the mean over windows of each input's summed squares. gradient:
    [out_features, in_features], as `gradients.py` stores it, alpha = 100 inside.
    """
    return weight.float().abs() * (input_norm.float() + gradient)


def pruner_zero_score(weight: Tensor, gradient: Tensor) -> Tensor:
    """W^2 * (G - min G) / (max G - min G) in float32, [out_features, in_features]. Dong et al. 2024.

    gradient: [out_features, in_features]; its smallest and largest are those of the whole matrix.
    """
    low, high = gradient.aminmax()
    spread = (high - low).clamp(min=1e-30)
    return weight.float().square() * ((gradient - low) / spread)


@dataclass(frozen=True)
class Criterion:
    """An entry of the registry.

    score: the function. needs: which statistics it takes after the weight, in this order: the input's norm over all
    tokens, or that of the mean window, and the gradient. compare: whether scores of the unstructured
    kind compete within each output row or within the whole matrix. version: raised when results change.
    """

    score: Callable[..., Any]
    needs: tuple[Literal["input_norm", "window_norm", "gradient"], ...]
    compare: Literal["row", "matrix"]
    version: int
    paper: str


CRITERIA = {
    "magnitude": Criterion(magnitude_score, (), "matrix", 1, "Han et al. 2015, arXiv:1506.02626"),
    "wanda": Criterion(wanda_score, ("input_norm",), "row", 1, "Sun et al. 2023, arXiv:2306.11695"),
    "wanda-cumulative": Criterion(
        wanda_cumulative_score, ("input_norm",), "matrix", 1, "Sun et al. 2023, the published code's variant"
    ),
    "gblm": Criterion(gblm_score, ("window_norm", "gradient"), "row", 1, "Das et al. 2023, arXiv:2311.04902"),
    "pruner-zero": Criterion(pruner_zero_score, ("gradient",), "row", 1, "Dong et al. 2024, arXiv:2406.02924"),
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

    def finite(self) -> bool:
        """Whether all inputs seen were finite numbers."""
        return self._sum is None or bool(self._sum.isfinite().all())

    def norm(self) -> Tensor:
        """||X_j||_2, [in_features], float32."""
        assert self._sum is not None
        assert self._sum.shape == (self._in_features,)
        return self._sum.sqrt()
