"""Which layer gets how many bits: a multiple-choice knapsack. Pure maths over a few numbers.

An integer program of layers' losses under a limit on their size, as in Yao et al. 2020 (HAWQ-V3, arXiv:2011.10680).
"""

from __future__ import annotations

import math
from collections.abc import Sequence


def cheapest(losses: Sequence[Sequence[float]], sizes: Sequence[Sequence[int]], budget: int) -> list[int]:
    """The choice of each layer: the least total loss, to a millionth, with a total size within the budget.

    losses, sizes: of each layer's choices, sizes in bytes. A choice is left out of account where another is no larger
    and loses no more. Solved by HiGHS's branch and bound. Raises ValueError where no choices fit, or a loss is not
    finite.
    """
    import numpy
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    if not all(math.isfinite(loss) for one in losses for loss in one):
        raise ValueError("losses hold NaN or infinity")
    kept = [_undominated(*pair) for pair in zip(losses, sizes, strict=True)]
    layer = numpy.repeat(numpy.arange(len(kept)), [len(one) for one in kept])
    loss = numpy.array([losses[number][choice] for number, one in enumerate(kept) for choice in one])
    unit = math.gcd(*(size for one in sizes for size in one))
    size = numpy.array([sizes[number][choice] // unit for number, one in enumerate(kept) for choice in one])
    one_each = csr_array((numpy.ones(len(layer)), (layer, numpy.arange(len(layer)))))
    room = budget // unit
    while True:
        found = milp(
            loss / (loss.max() or 1.0),
            integrality=numpy.ones(len(layer)),
            bounds=Bounds(0, 1),
            constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(size[None], -numpy.inf, room)],
            options={"mip_rel_gap": 1e-6},
        )
        if found.x is None:
            raise ValueError(f"not even the smallest choices fit into {budget} bytes")
        chosen = [kept[number][int(found.x[layer == number].argmax())] for number in range(len(kept))]
        total = sum(of_one[choice] for of_one, choice in zip(sizes, chosen, strict=True))
        if total <= budget:
            return chosen
        room -= math.ceil((total - budget) / unit)  # the solver tolerates a millionth too much


def _undominated(losses: Sequence[float], sizes: Sequence[int]) -> list[int]:
    """Choices, by rising size, of which each has a lower loss than all before."""
    kept: list[int] = []
    for choice in sorted(range(len(sizes)), key=lambda one: (sizes[one], losses[one])):
        if not kept or losses[choice] < losses[kept[-1]]:
            kept.append(choice)
    return kept
