"""The Gram matrix of a layer's inputs and the factor of its inverse, which second-order methods work with."""

from __future__ import annotations

import torch
from torch import Tensor


class Gram:
    """Sum of x x^T over all calibration tokens, [in_features, in_features] of `dtype`, one window at a time."""

    def __init__(self, in_features: int, dtype: torch.dtype = torch.float32) -> None:
        self._in_features = in_features
        self._dtype = dtype
        self._sum: Tensor | None = None

    @classmethod
    def in_float64(cls, in_features: int) -> Gram:
        """For methods that need small eigenvalues right beside those of outliers."""
        return cls(in_features, torch.float64)

    def add(self, inputs: Tensor) -> None:
        """Add inputs [tokens, in_features] of any floating dtype."""
        inputs = inputs.to(self._dtype)
        if self._sum is None:
            self._sum = inputs.new_zeros(self._in_features, self._in_features)
        self._sum.addmm_(inputs.T, inputs)

    def finite(self) -> bool:
        """Whether all inputs seen were finite numbers."""
        return self._sum is None or bool(self._sum.diagonal().isfinite().all())

    def matrix(self) -> Tensor:
        """The sum. It must not be changed in place, layers share it."""
        assert self._sum is not None
        return self._sum


def inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """Upper Cholesky factor U of the damped Hessian's inverse, H^-1 = U^T U, [columns, columns] float32.

    damping: share of the mean diagonal added to the diagonal; raised tenfold, up to 1, while the matrix is not
    positive definite in float32. Raises ValueError when that does not help.
    """
    mean = hessian.diagonal().mean()
    while damping <= 1:
        damped = hessian.clone()
        damped.diagonal().add_(damping * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed:
                return upper
        damping = damping * 10 if damping else 0.01
    raise ValueError("the Gram matrix is not positive definite (NaN or infinity in the activations?)")
