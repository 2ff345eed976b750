"""Layer-wise allocation: how much of each block goes, when blocks matter differently. Pure maths over a few numbers.

What is measured of the model (statistics.py) does not depend on how much is pruned; these functions turn it into
shares whose mean is the asked one.
"""

from __future__ import annotations

from collections.abc import Sequence

from .selection import Pattern

OWL_SPREAD = 0.08  # lambda of Yin et al. 2023
LEAST_SHARE = 0.01


def rmi_spread(sparsity: float) -> float:
    """How far LoSA lets shares differ from the mean: delta of its reference code, 0.01 to 0.03."""
    return 0.01 if sparsity <= 0.5 else 0.02 if sparsity <= 0.6 else 0.03


def owl_shares(outliers: Sequence[float], sparsity: float, spread: float | None = None) -> list[float]:
    """The share removed of each block: less where more outliers are. Yin et al. 2023 (arXiv:2310.05175), section 3.

    outliers: share of each block's scores that are far above their mean. spread: half of the difference between the
    largest and the smallest share; made smaller where a share would leave [0.01, 1).
    """
    low, high = min(outliers), max(outliers)
    if high == low:
        return [sparsity] * len(outliers)
    relative = [(value - low) / (high - low) for value in outliers]
    mean = sum(relative) / len(relative)
    half = OWL_SPREAD if spread is None else spread
    room = min((sparsity - LEAST_SHARE) / (1 - mean), (1 - LEAST_SHARE - sparsity) / mean)
    width = max(0.0, min(2 * half, room))
    return [sparsity - width * (value - mean) for value in relative]


def rmi_shares(redundancy: Sequence[float], sparsity: float, spread: float | None = None) -> list[float]:
    """The share removed of each block: more where its input resembles other blocks' more. Huang et al. 2025 (LoSA).

    redundancy: for each block the sum of its similarities to all others. The linear program, minimize sum p_l s_l with
    p_l = exp(-redundancy_l), mean(s) = sparsity and |s_l - sparsity| <= spread, is solved exactly: the more redundant
    half is at the upper bound, the other half at the lower, and of an odd number the middle one at the mean.
    """
    delta = _within_bounds(rmi_spread(sparsity) if spread is None else spread, sparsity)
    if max(redundancy) - min(redundancy) < 1e-9:
        return [sparsity] * len(redundancy)
    order = sorted(range(len(redundancy)), key=lambda block: (-redundancy[block], block))
    half = len(order) // 2
    shares = [sparsity] * len(order)
    for block in order[:half]:
        shares[block] = sparsity + delta
    for block in order[len(order) - half :]:
        shares[block] = sparsity - delta
    return shares


def rmi_shares_slsqp(
    redundancy: Sequence[float], sparsity: float, spread: float | None = None, beta: float = 1.0
) -> list[float]:
    """The shares that LoSA's reference code gives: the program of `rmi_shares`, left where scipy's SLSQP stops early.

    With p_l = exp(-beta * redundancy_l / sum of redundancies), started from s = 1 with a tolerance of 1e-6; the code
    has beta 1 for Wanda and 100 for SparseGPT. What the solver leaves of a difference from the mean is taken out.
    """
    import numpy
    from scipy.optimize import minimize

    delta = _within_bounds(rmi_spread(sparsity) if spread is None else spread, sparsity)
    relative = numpy.asarray(redundancy, dtype=numpy.float64)
    importance = numpy.exp(-beta * relative / relative.sum())
    found = minimize(
        lambda shares: float(importance @ shares),
        numpy.ones(len(relative)),
        jac=None,
        bounds=[(sparsity - delta, sparsity + delta)] * len(relative),
        constraints={"type": "eq", "fun": lambda shares: float(shares.mean() - sparsity)},
        method="SLSQP",
        options={"ftol": 1e-6},
    )
    shares: list[float] = (found.x + (sparsity - found.x.mean())).tolist()
    return shares


def mixed_patterns(shares: Sequence[float], pattern: Pattern) -> list[Pattern]:
    """An N:M pattern for each block, N kept on average exactly: blocks that `shares` spares keep one more of a group,
    as many that it does not keep one less.

    shares: what an allocation gives each block, with the pattern's own share as their mean. So many blocks differ from
    N that the mean difference in shares is that of `shares` (which alone would seldom round to another N). Raises
    ValueError where a group has no room for one more and one less.
    """
    if not 2 <= pattern.kept <= pattern.group - 2:
        raise ValueError(
            f"pattern '{pattern.kept}:{pattern.group}' has no room for blocks that keep one more and one less"
        )
    mean = 1 - pattern.kept / pattern.group
    moved = sum(abs(share - mean) for share in shares) * pattern.group
    pairs = min(round(moved / 2), len(shares) // 2)
    order = sorted(range(len(shares)), key=lambda block: (shares[block], block))
    patterns = [pattern] * len(shares)
    for spared, pruned in zip(order[:pairs], order[len(order) - pairs :], strict=True):
        patterns[spared] = Pattern(pattern.kept + 1, pattern.group)
        patterns[pruned] = Pattern(pattern.kept - 1, pattern.group)
    return patterns


def _within_bounds(delta: float, sparsity: float) -> float:
    return max(0.0, min(delta, sparsity - LEAST_SHARE, 1 - LEAST_SHARE - sparsity))


ALLOCATIONS = {"owl": owl_shares, "rmi": rmi_shares}
