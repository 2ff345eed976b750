"""Layer-wise allocation: how much of each block goes, when blocks matter differently. Pure maths over a few numbers.

What is measured of the model (statistics.py) does not depend on how much is pruned; these functions turn it into
shares whose mean is the asked one.
"""

from __future__ import annotations

from collections.abc import Sequence

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
    delta = rmi_spread(sparsity) if spread is None else spread
    delta = max(0.0, min(delta, sparsity - LEAST_SHARE, 1 - LEAST_SHARE - sparsity))
    order = sorted(range(len(redundancy)), key=lambda block: (-redundancy[block], block))
    half = len(order) // 2
    shares = [sparsity] * len(order)
    for block in order[:half]:
        shares[block] = sparsity + delta
    for block in order[len(order) - half :]:
        shares[block] = sparsity - delta
    return shares


ALLOCATIONS = {"owl": owl_shares, "rmi": rmi_shares}
