"""Low-rank compensation of a compressed weight: EoRA (Liu et al. 2024, arXiv:2410.21271) and plain SVD.

W is the original weight [out_features, in_features], W_c the compressed one, and B A the term of rank r that is added
to W_c. With X the calibration inputs [tokens, in_features] and C = X^T X, EoRA's term is the one of rank r with the
least ||(W - W_c - B A) X^T||; SVD's has the least ||W - W_c - B A||. Everything is computed in float64.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Factors(NamedTuple):
    """The term B A: `a` [rank, in_features] and `b` [out_features, rank], float64."""

    a: Tensor
    b: Tensor


class Eigenspace(NamedTuple):
    """C without the directions in which there are no inputs: C = Q diag(values) Q^T.

    vectors: Q [in_features, kept]; values: [kept], all positive.
    """

    vectors: Tensor
    values: Tensor


def eigenspace(gram: Tensor) -> Eigenspace:
    """Eigenvectors of C [in_features, in_features] and its eigenvalues, truncated.

    Eigenvalues of at most in_features * eps * the largest, eps being float64's, are rounding errors of zero, negative
    ones among them. They are left out with their eigenvectors, as in a pseudo-inverse: the term is zero for inputs in
    these directions, which calibration has none of. Raises ValueError for C with infinities or NaN.
    """
    gram = gram.double()
    if not bool(gram.isfinite().all()):
        raise ValueError("the Gram matrix has infinities or NaN (the activations overflow in this dtype?)")
    values, vectors = torch.linalg.eigh(gram)
    least = len(gram) * torch.finfo(torch.float64).eps * values.max().clamp(min=0)
    kept = values > least
    return Eigenspace(vectors[:, kept], values[kept])


def eora(difference: Tensor, inputs: Eigenspace, rank: int) -> Factors:
    """EoRA's term for W - W_c. With P = Q values^1/2 and (W - W_c) P = U S V^T:

    B = U_r S_r^1/2, A = S_r^1/2 V_r^T values^-1/2 Q^T. What is left, ||(W - W_c - B A) X^T||^2, is the sum of the
    squares of the other singular values. Factors are zero from the number of directions on, if rank is above it.
    """
    roots = inputs.values.sqrt()
    projected = _truncated(difference.double() @ (inputs.vectors * roots), rank)
    return Factors(projected.a / roots @ inputs.vectors.T, projected.b)


def svd(difference: Tensor, rank: int) -> Factors:
    """The term nearest to W - W_c in the Frobenius norm: B = U_r S_r^1/2, A = S_r^1/2 V_r^T."""
    return _truncated(difference.double(), rank)


def _truncated(matrix: Tensor, rank: int) -> Factors:
    """The `rank` largest singular values' part of a matrix; zeros where it has fewer."""
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    count = min(rank, len(values))
    roots = values[:count].sqrt()
    a = matrix.new_zeros(rank, matrix.shape[1])
    b = matrix.new_zeros(matrix.shape[0], rank)
    a[:count] = roots[:, None] * right[:count]
    b[:, :count] = left[:, :count] * roots
    return Factors(a, b)
