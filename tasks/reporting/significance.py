"""Whether two variants differ by more than the choice of windows or questions would explain: the paired bootstrap.

Variants measured on the same items are compared item by item. Items are drawn again with replacement, the same ones
for both, and the spread of the mean difference over such draws gives its interval. All pure functions of the items.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from numpy.typing import NDArray

RESAMPLES = 5_000
SEED = 0
LEVEL = 0.95
LEAST_ITEMS = 6  # of five differences all have one sign by chance alone more often than in 5 % of cases
PERPLEXITY = "perplexity"  # its items are the mean losses of windows, in nats
_DRAWN_AT_ONCE = 1 << 22


@dataclass(frozen=True)
class Items:
    """What one row of the report scored on each window or question.

    data: identifies what was asked and how; only items of equal metric, data and number are compared.
    """

    row: str
    metric: str
    data: str
    values: Sequence[float]


@dataclass(frozen=True)
class Difference:
    """The mean over items of one variant's value minus another's, and its 95 % interval."""

    mean: float
    low: float
    high: float

    @property
    def within_noise(self) -> bool:
        return self.low <= 0 <= self.high


def paired_difference(ours: Sequence[float], theirs: Sequence[float]) -> Difference:
    """The mean of ours - theirs, items in the same order, with its interval. Raises ValueError for too few items."""
    import numpy

    return paired_differences(numpy.asarray(ours, dtype=float)[None] - numpy.asarray(theirs, dtype=float)[None])[0]


def paired_differences(differences: NDArray[Any]) -> list[Difference]:
    """The means of rows of differences [pairs, items] in float64, with intervals by the bootstrap, its seed fixed.

    Percentiles of the resampled means, taken further out by sqrt(n / (n - 1)) and from Student's t, without which
    intervals of few items are too narrow (Hesterberg 2015, "What Teachers Should Know About the Bootstrap", section
    5.3: the expanded percentile interval).
    """
    import numpy
    from scipy.special import ndtr, stdtrit

    items = differences.shape[1]
    if items < LEAST_ITEMS:
        raise ValueError(f"{items} items are too few to compare; {LEAST_ITEMS} or more are needed")
    draw = numpy.random.default_rng(SEED)
    means = []
    at_once = max(1, _DRAWN_AT_ONCE // items)
    for start in range(0, RESAMPLES, at_once):
        count = min(at_once, RESAMPLES - start)
        chosen = draw.integers(0, items, size=(count, items)) + items * numpy.arange(count)[:, None]
        times = numpy.bincount(chosen.ravel(), minlength=count * items).reshape(count, items)
        means.append(times @ differences.T / items)  # [resamples, pairs]
    tail = ndtr(-numpy.sqrt(items / (items - 1)) * stdtrit(items - 1, (1 + LEVEL) / 2))
    low, high = numpy.quantile(numpy.concatenate(means), [tail, 1 - tail], axis=0)
    return [
        Difference(float(mean), float(least), float(most))
        for mean, least, most in zip(differences.mean(axis=1), low, high, strict=True)
    ]


def compare_all(items: Sequence[Items], references: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """What the report says of differences: {"differences": …, "indistinguishable": …}.

    references: row -> the rows it may be compared with, the first that was measured on the same items is taken.
    differences: {row: {metric: {reference, difference, low, high, unit, items, within_noise}}}. unit: "ratio" of
    perplexities; "points" for what is right or wrong, in percent; "difference" otherwise.
    indistinguishable: {metric: [[row, row]]}, the pairs whose difference is within noise.
    """
    import numpy

    differences: dict[str, dict[str, Any]] = {}
    alike: dict[str, list[list[str]]] = {}
    for group in _comparable(items):
        metric = group[0].metric
        values = {one.row: numpy.asarray(one.values, dtype=float) for one in group}
        pairs = list(combinations(values, 2))
        found = dict(
            zip(pairs, paired_differences(numpy.stack([values[a] - values[b] for a, b in pairs])), strict=True)
        )
        alike.setdefault(metric, []).extend(list(pair) for pair in pairs if found[pair].within_noise)
        unit = _unit(metric, values.values())
        for row in values:
            reference = next((one for one in references.get(row, ()) if one in values and one != row), None)
            if reference is not None:
                known = found.get((row, reference)) or _turned(found[reference, row])
                differences.setdefault(row, {})[metric] = _entry(known, unit, reference, len(values[row]))
    return {
        "differences": differences,
        "indistinguishable": {metric: pairs for metric, pairs in alike.items() if pairs},
    }


def _comparable(items: Sequence[Items]) -> list[list[Items]]:
    """Groups of two or more rows measured on the same items."""
    groups: dict[tuple[str, str, int], list[Items]] = {}
    for one in items:
        if len(one.values) >= LEAST_ITEMS:
            groups.setdefault((one.metric, one.data, len(one.values)), []).append(one)
    return [group for group in groups.values() if len(group) > 1]


def _unit(metric: str, values: Any) -> str:
    if metric == PERPLEXITY:
        return "ratio"
    return "points" if all(((one == 0) | (one == 1)).all() for one in values) else "difference"


def _turned(difference: Difference) -> Difference:
    return Difference(-difference.mean, -difference.high, -difference.low)


def _entry(difference: Difference, unit: str, reference: str, items: int) -> dict[str, Any]:
    import math

    shown = {"ratio": math.exp, "points": lambda value: 100 * value}.get(unit, float)
    return {
        "reference": reference,
        "difference": shown(difference.mean),
        "low": shown(difference.low),
        "high": shown(difference.high),
        "unit": unit,
        "items": items,
        "within_noise": difference.within_noise,
    }


def words(entry: Mapping[str, Any]) -> str:
    """An entry of `differences` as text: "x 1.93 (1.88 to 1.99)" or "-2.1 points (-4.0 to -0.3)"."""
    low, high, value = entry["low"], entry["high"], entry["difference"]
    if entry["unit"] == "ratio":
        return f"× {value:.3f} ({low:.3f} to {high:.3f})"
    if entry["unit"] == "points":
        return f"{value:+.1f} points ({low:+.1f} to {high:+.1f})"
    return f"{value:+.4g} ({low:+.4g} to {high:+.4g})"
