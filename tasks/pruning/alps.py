"""ALPS: choose weights to remove and repair the rest together: ADMM with a growing penalty, then conjugate gradients.

Pure maths over tensors; Meng et al. 2024 (arXiv:2406.07831), algorithms 1 and 2. With the layer's inputs normalized,
minimize ||X (B' - B)||^2 over sparse B [in_features, out_features]; B' are the dense weights. Layers that read the
same input share the eigendecomposition of its Gram matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .selection import Pattern, keep_all_but, keep_by_pattern

_FIRST_PENALTY = 0.1
_MOST_ITERATIONS = 300
_LEAST_ITERATIONS = 30
_BETWEEN_CHECKS = 3
_SETTLED = 3e-4  # share of the support that still changes
_CG_STEPS = 10
_CG_TOLERANCE = 1e-4


class Inputs(NamedTuple):
    """The damped, normalized Gram matrix of a layer's inputs: G = Q diag(eigenvalues) Q^T, and the norms taken out.

    gram, vectors: [in_features, in_features]; eigenvalues, norms: [in_features]; all float32.
    """

    gram: Tensor
    vectors: Tensor
    eigenvalues: Tensor
    norms: Tensor


def decompose(gram: Tensor, damping: float = 0.01) -> Inputs:
    """For `gram` [in_features, in_features] = sum x x^T. damping: share of the mean diagonal added to the diagonal.

    Raises ValueError when there is NaN or infinity in it.
    """
    damped = gram.to(torch.float64, copy=True)
    if not bool(damped.isfinite().all()):
        raise ValueError("the Gram matrix has NaN or infinity in it")
    damped.diagonal().add_(damping * damped.diagonal().mean())
    norms = damped.diagonal().sqrt() + 1e-8
    damped /= norms[:, None] * norms
    eigenvalues, vectors = torch.linalg.eigh(damped)
    return Inputs(damped.float(), vectors.float(), eigenvalues.float().clamp_(min=0), norms.float())


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
    sparsity: share removed, int(share * elements) exactly of each whole matrix; pattern: of each group of inputs
    instead. masks: what was pruned before stays so. Raises ValueError when there is NaN or infinity in `gram`.
    """
    inputs = decompose(gram, damping)
    before = masks or [None] * len(weights)
    return [_solve(weight, inputs, sparsity, pattern, mask) for weight, mask in zip(weights, before, strict=True)]


def _solve(
    weight: Tensor, inputs: Inputs, sparsity: float, pattern: Pattern | None, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    dense = (weight.float() * inputs.norms).T.contiguous()
    removed = int(sparsity * dense.numel())
    before = None if mask is None else mask.T

    def choose(values: Tensor) -> Tensor:
        score = values.abs()
        if before is not None:
            score.masked_fill_(~before, -1.0)
        if pattern is None:
            keep = keep_all_but(score, removed)
        else:
            keep = keep_by_pattern(score.T.contiguous(), pattern).T.contiguous()
        return keep if before is None else keep & before

    keep, sparse = _admm(dense, inputs, choose)
    solution = _refit(sparse, keep, dense, inputs.gram)
    return (solution / inputs.norms[:, None]).T.contiguous(), keep.T.contiguous()


def _admm(dense: Tensor, inputs: Inputs, choose: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Support and values of the projected variable when the support has settled: algorithm 1 with its penalty rule."""
    target = inputs.gram @ dense
    penalty, raised = _FIRST_PENALTY, False
    seen = choose(dense)
    kept = int(seen.count_nonzero())
    sparse, dual = dense.clone(), torch.zeros_like(dense)
    keep = seen
    for iteration in range(1, _MOST_ITERATIONS + 1):
        right = torch.add(target - dual, sparse, alpha=penalty)
        rotated = inputs.vectors.T @ right
        rotated /= (inputs.eigenvalues + penalty)[:, None]
        primal = inputs.vectors @ rotated
        sparse = torch.add(primal, dual, alpha=1 / penalty)
        keep = choose(sparse)
        sparse *= keep
        dual.add_(primal - sparse, alpha=penalty)
        if iteration % _BETWEEN_CHECKS:
            continue
        changed = int((keep ^ seen).count_nonzero())
        seen = keep
        if iteration >= _LEAST_ITERATIONS and changed < _SETTLED * kept:
            break
        if changed > 0.005 * kept:
            penalty *= 1.3 if changed > 0.1 * kept else 1.2
            raised = True
        elif raised:
            if not changed:
                break
            penalty *= 1.1
        else:  # the first penalty froze the support
            penalty /= 5
            sparse, dual = dense.clone(), torch.zeros_like(dense)
    return keep, sparse


def _refit(sparse: Tensor, keep: Tensor, dense: Tensor, gram: Tensor) -> Tensor:
    """Values on the support nearer to the least-squares optimum: conjugate gradients, each output by itself."""
    values = sparse.clone()
    residual = (gram @ (dense - values)).mul_(keep)
    direction = residual.clone()
    size = residual.square().sum(0)
    goal = size * _CG_TOLERANCE**2
    for _ in range(_CG_STEPS):
        if bool((size <= goal).all()):
            break
        image = (gram @ direction).mul_(keep)
        step = size / (direction * image).sum(0).clamp_(min=torch.finfo(torch.float32).tiny)
        values.add_(direction * step)
        residual.sub_(image * step)
        before, size = size, residual.square().sum(0)
        direction = torch.addcmul(residual, direction, size / before.clamp(min=torch.finfo(torch.float32).tiny))
    return values
