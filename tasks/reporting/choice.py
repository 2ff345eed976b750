"""Which variant to take: the front of quality against cost, and the best one that fits a budget.

Pure functions of the table's rows (`report.values`). Nothing is guessed: a choice says by which figure it was made.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...storage.errors import ColdpressError

Row = Mapping[str, Any]

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True)
class Figure:
    """Something measured by which variants are compared: its key, its name in sentences. best: "low" or "high"."""

    key: str
    name: str
    best: str = "low"

    def write(self, value: float) -> str:
        """A value with its unit."""
        if self.key.endswith("_bytes"):
            return write_bytes(value)
        if self.key.endswith("_ms") or "_ms_" in self.key:
            return f"{value:.1f} ms"
        return f"{100 * value:.1f} %" if self.best == "high" else f"{value:.2f}"


SIZE = Figure("size_bytes", "size on disk")
PERPLEXITY = Figure("perplexity", "perplexity")
DEVICE_MEMORY = Figure("device_memory_bytes", "device memory")
PROCESS_MEMORY = Figure("process_memory_bytes", "memory of the process")
DECODING = Figure("decode_ms_per_token", "time per token")
# What --fit-vram goes by: the first that was measured, and what the sentence says of it.
MEMORY_FIGURES = {
    DEVICE_MEMORY: "measured device memory",
    PROCESS_MEMORY: "measured resident memory of the process; device memory was not measured",
    SIZE: "size of the weights on disk; memory was not measured, and running needs more",
}
SIZE_FIGURES = {SIZE: "size on disk"}
# What quality is weighed against: what most variants have, the first of equals. A process's memory is mostly its
# libraries' where models are small.
COSTS = (DEVICE_MEMORY, SIZE, PROCESS_MEMORY, DECODING)


def parse_bytes(text: str) -> int:
    """Bytes of "8GB", "500 MB" or "7.5GiB". Raises ColdpressError."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    if found is None or found[2].upper() not in _UNITS or float(found[1]) == 0:
        raise ColdpressError(f"{text!r} is no amount of memory; write it like 8GB, 500MB or 7.5GiB")
    return int(float(found[1]) * _UNITS[found[2].upper()])


def write_bytes(value: float) -> str:
    """ "118.1 MB", "13.50 GB" or "1.0 kB"."""
    if value < 1e5:
        return f"{value / 1e3:.1f} kB"
    return f"{value / 1e9:.2f} GB" if value >= 1e9 else f"{value / 1e6:.1f} MB"


def quality(table: Sequence[Row]) -> Figure | None:
    """By what variants are ranked: perplexity, or else the accuracy of the task that most of them were measured on."""
    if _having(table, PERPLEXITY):
        return PERPLEXITY
    keys = dict.fromkeys(key for row in table for key in row if _metric(key) in ("acc", "exact_match"))
    tasks = [Figure(key, task_title(key), "high") for key in keys]
    return max(tasks, key=lambda figure: len(_having(table, figure)), default=None)


def _metric(key: str) -> str:
    return key.rpartition(".")[2].partition(",")[0]


def task_title(key: str) -> str:
    """ "arc_easy acc" of arc_easy.acc, "gsm8k exact_match (strict-match)" of gsm8k.exact_match,strict-match."""
    name, _, kind = key.replace(".", " ").partition(",")
    return f"{name} ({kind})" if kind else name


def first_measured(table: Sequence[Row], figures: Sequence[Figure]) -> Figure | None:
    """The first figure that some row has."""
    return next((figure for figure in figures if _having(table, figure)), None)


def most_measured(table: Sequence[Row], figures: Sequence[Figure]) -> Figure | None:
    """The figure that most rows have, the first of equals; None if none has any."""
    counts = {figure: len(_having(table, figure)) for figure in figures}
    best = max(figures, key=lambda figure: counts[figure])
    return best if counts[best] else None


def _having(table: Sequence[Row], *figures: Figure) -> list[Row]:
    return [row for row in table if all(row.get(figure.key) is not None for figure in figures)]


def front(table: Sequence[Row], cost: Figure, by: Figure) -> list[Row]:
    """The rows that no other beats in both cost and quality, by rising cost (the Pareto front)."""
    best: list[Row] = []
    for row in sorted(_having(table, cost, by), key=lambda row: (row[cost.key], _badness(row, by))):
        if not best or _badness(row, by) < _badness(best[-1], by):
            best.append(row)
    return best


def _badness(row: Row, by: Figure) -> float:
    return float(-row[by.key] if by.best == "high" else row[by.key])


def recommend(
    document: Mapping[str, Any], table: Sequence[Row], budget: int, figures: Mapping[Figure, str]
) -> dict[str, Any]:
    """The best variant by quality that fits into `budget` bytes, by the first of `figures` that was measured.

    Returns {budget_bytes, figure, best, fits, too_large, not_measured, words}; best is None when none fits.
    """
    variants = [row for row in table if row["variant"] in document["variants"]]
    by, cost = quality(variants), first_measured(variants, list(figures))
    known = _having(variants, by, cost) if by and cost else []
    left = [row["variant"] for row in variants if row not in known]
    answer: dict[str, Any] = {"budget_bytes": budget, "figure": cost.key if cost else None, "best": None}
    if by is None or cost is None or not known:
        words = f"Nothing can be recommended for {write_bytes(budget)}: no variant has both a quality and a size."
        return answer | {"fits": [], "too_large": {}, "not_measured": left, "words": words}
    fits = sorted((row for row in known if row[cost.key] <= budget), key=lambda row: _badness(row, by))
    large = sorted((row for row in known if row[cost.key] > budget), key=lambda row: row[cost.key])
    if fits:
        best = fits[0]
        answer["best"] = best["variant"]
        words = (
            f"For {write_bytes(budget)} take {best['variant']}: {by.name} {by.write(best[by.key])} in "
            f"{write_bytes(best[cost.key])}, by {figures[cost]}."
        )
        alike = [
            row["variant"]
            for row in fits[1:]
            if row[cost.key] < best[cost.key] and _indistinguishable(document, by.key, best["variant"], row["variant"])
        ]
        if alike:
            words += f" Within noise of it, and smaller: {', '.join(alike)}."
    else:
        words = f"Nothing fits into {write_bytes(budget)}, by {figures[cost]}."
        least = large[0]
        words += f" The smallest is {least['variant']} with {write_bytes(least[cost.key])}."
    if fits and large:
        words += f" Too large: {', '.join(_with_cost(row, cost) for row in large)}."
    if left:
        words += f" Not judged, for want of one of these figures: {', '.join(left)}."
    sizes = {row["variant"]: row[cost.key] for row in large}
    return answer | {
        "fits": [row["variant"] for row in fits], "too_large": sizes, "not_measured": left, "words": words,
    }  # fmt: skip


def _with_cost(row: Row, cost: Figure) -> str:
    return f"{row['variant']} ({write_bytes(row[cost.key])})"


def _indistinguishable(document: Mapping[str, Any], metric: str, first: str, second: str) -> bool:
    return any({first, second} == set(pair) for pair in document.get("indistinguishable", {}).get(metric, ()))


def summary(document: Mapping[str, Any], table: Sequence[Row]) -> str:
    """One sentence on which variants are best, for the top of the page."""
    variants = [row for row in table if row["variant"] in document["variants"]]
    sources = {stage["name"] for stage in document["stages"] if stage["stage"] == "source/model"}
    made = [row for row in variants if row["variant"] not in sources]
    by, cost = quality(variants), most_measured(variants, COSTS)
    ranked = sorted(_having(made, by), key=lambda row: _badness(row, by)) if by else []
    if by is None or not ranked:
        return f"{len(variants)} variants; the quality of none of them is known yet."
    best = ranked[0]
    text = f"Of {len(made)} variants {best['variant']} has the best {by.name}, {by.write(best[by.key])}"
    base = next((row for row in variants if row["variant"] in sources and row.get(by.key) is not None), None)
    if base is not None:
        noise = document.get("differences", {}).get(best["variant"], {}).get(by.key, {}).get("within_noise")
        near = ", a difference within noise" if noise else ""
        text += f" ({base['variant']}: {by.write(base[by.key])}{near})"
    sized = _having(ranked, cost) if cost else []
    if cost is not None and sized:
        least = min(sized, key=lambda row: (row[cost.key], _badness(row, by)))
        if least is best:
            text += f", and the least {cost.name}, {cost.write(best[cost.key])}"
        else:
            text += (
                f"; {least['variant']} has the least {cost.name}, {cost.write(least[cost.key])}, "
                f"at {by.write(least[by.key])}"
            )
    return text + "."
