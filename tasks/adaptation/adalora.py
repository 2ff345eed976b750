"""AdaLoRA's maths: which of all triplets (singular value, its two vectors) of a model are worth keeping.

Zhang et al. 2023 (AdaLoRA), arXiv:2303.10512. A term P Lambda Q has P [out_features, rank], Lambda diagonal, kept as
[rank], and Q [rank, in_features].
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def orthogonality(pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """The mean of |P^T P - I|_F and |Q Q^T - I|_F over all terms (P, Q).

    Equation 4 sums the squares; this is what the authors' code and PEFT minimize, whose size doesn't depend on how many
    layers a model has.
    """
    norms = [_distance(p.T @ p) for p, _ in pairs] + [_distance(q @ q.T) for _, q in pairs]
    return torch.stack(norms).mean()


def _distance(products: Tensor) -> Tensor:
    return torch.linalg.matrix_norm(products - torch.eye(len(products), device=products.device))


class Importance:
    """How much each triplet matters, from the gradients of the steps so far.

    terms: (P, Lambda, Q) of each layer, all of one rank. tensors: all that it remembers, by name, changed in place.
    """

    def __init__(self, terms: Sequence[tuple[Tensor, Tensor, Tensor]]) -> None:
        self._terms = terms
        self._averages = [tuple((torch.zeros_like(w), torch.zeros_like(w)) for w in term) for term in terms]
        self.tensors = {
            f"{layer}.{part}.{name}": average
            for layer, parts in enumerate(self._averages)
            for part, averages in zip(("p", "lambda", "q"), parts, strict=True)
            for name, average in zip(("sensitivity", "uncertainty"), averages, strict=True)
        }

    @torch.no_grad()
    def observe(self, beta1: float, beta2: float) -> None:
        """Take the present gradients into the averages of sensitivity |w dL/dw| and of its uncertainty, eq. 8 to 10."""
        for term, averages in zip(self._terms, self._averages, strict=True):
            for value, (sensitivity, uncertainty) in zip(term, averages, strict=True):
                assert value.grad is not None
                now = (value * value.grad).abs()
                sensitivity.lerp_(now, 1 - beta1)
                uncertainty.lerp_((now - sensitivity).abs(), 1 - beta2)

    def scores(self) -> Tensor:
        """[layers, rank]: an element's score is sensitivity times uncertainty (eq. 11), a triplet's that of its
        singular value plus the means over its two vectors (eq. 7).
        """
        rows = []
        for averages in self._averages:
            p, singular, q = (sensitivity * uncertainty for sensitivity, uncertainty in averages)
            rows.append(singular + p.mean(0) + q.mean(1))
        return torch.stack(rows)


def most_important(scores: Tensor, budget: int) -> Tensor:
    """True for the `budget` highest of all scores, of any shape; among equals for those that come first."""
    kept = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    kept[scores.flatten().sort(descending=True, stable=True).indices[:budget]] = True
    return kept.view_as(scores)


def budget_after(updates: int, steps: int, initial: int, target: int, t_init: int, t_final: int) -> int:
    """How many triplets the model has after so many of its updates (1 to steps).

    Equation 12: `initial` in the first t_init, `target` in the last t_final, between them falling as a cubic does.
    """
    if updates <= t_init:
        return initial
    if updates >= steps - t_final:
        return target
    left = 1 - (updates - t_init) / (steps - t_final - t_init)
    return int(target + (initial - target) * left**3)
