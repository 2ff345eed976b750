"""The report's charts, as SVG to be put into a page: readable in black and white, text drawn as shapes."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MARKERS = "os^Dv<>Pp*Xh"
LETTERS = 32  # of a variant's name beside a chart
_LINES = ("-", "--", "-.", ":")
_MOST_PANELS = 16
_MOST_LOSSES = 12
_SMOOTHED = 20  # a loss is smoothed over one such part of the steps
_MOST_TIMES = 100  # a perplexity so many times the least is drawn at the upper edge


@dataclass(frozen=True)
class Chart:
    """A chart of the report: its heading, what it says in words (for those who can't see it), and the SVG.

    note: what everyone has to know who looks at it, below the chart.
    """

    title: str
    words: str
    svg: str
    note: str = ""


def shortened(text: str, most: int) -> str:
    """The text, or where it is longer than `most` letters its beginning and its end, where variants' names differ."""
    if len(text) <= most:
        return text
    end = (most - 1) // 2
    return f"{text[: most - 1 - end]}…{text[len(text) - end :]}"


def charts(document: Mapping[str, Any]) -> list[Chart]:
    """All charts for which the document of `run --json` has figures."""
    made = (perplexity_by_sparsity, shares_by_block, bits_by_block, losses_by_step)
    found = [make(document) for make in made]
    return [chart for chart in found if chart is not None]


def curves(document: Mapping[str, Any]) -> dict[str, list[tuple[float, float]]]:
    """{stage in the recipe: [(share removed of its first model's block weights, perplexity)]}, by rising share.

    A stage's variants of a matrix are one curve: "wanda[sparsity=0.5]" belongs to "wanda".
    """
    metrics = document["metrics"]
    stages = {stage["name"]: stage for stage in document["stages"]}
    found: dict[str, list[tuple[float, float]]] = {}
    for variant in document["variants"]:
        values = metrics.get(variant, {})
        whole = stages.get(stages[variant].get("root"), {}).get("linear_weights")
        measured = {"perplexity", "sparsity", "linear_weights"} <= values.keys()
        if stages[variant]["stage"] == "source/model" or not measured or not whole:
            continue
        left = (1 - values["sparsity"]) * values["linear_weights"] / whole
        found.setdefault(re.sub(r"\[.*\]$", "", variant), []).append((max(0.0, 1 - left), values["perplexity"]))
    return {name: sorted(points) for name, points in found.items()}


def perplexity_by_sparsity(document: Mapping[str, Any]) -> Chart | None:
    """Perplexity against what was removed, a curve a stage; None unless one has several points."""
    found = curves(document)
    if not any(len({share for share, _ in points}) > 1 for points in found.values()):
        return None
    figure, (axes,) = new_figure(1, 4.2)
    values = [perplexity for points in found.values() for _, perplexity in points]
    most = _MOST_TIMES * min(values)
    for number, (name, points) in enumerate(found.items()):
        axes.plot(
            [100 * share for share, _ in points],
            [min(perplexity, most) for _, perplexity in points],
            clip_on=False,
            marker=MARKERS[number % len(MARKERS)],
            linestyle=_LINES[number // 2 % len(_LINES)],
            label=shortened(name, LETTERS),
        )
    sources = [stage["name"] for stage in document["stages"] if stage["stage"] == "source/model"]
    for source in sources:
        if "perplexity" in document["metrics"].get(source, {}):
            value = document["metrics"][source]["perplexity"]
            axes.axhline(value, color="0.5", linewidth=1)
            axes.annotate(f"{source} {value:.1f}", (1, value), xycoords=("axes fraction", "data"), ha="right",
                          va="bottom", color="0.3", fontsize=9)  # fmt: skip
    if max(values) > most:
        axes.set_title(f"points at the upper edge lie above {most:.0f}", fontsize=9, loc="left")
    if max(values) > 8 * min(values):
        axes.set_yscale("log")
        plain_log_ticks(axes.yaxis)
        if max(values) > most:
            axes.set_ylim(top=most)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlabel("block weights removed, %")
    axes.set_ylabel("perplexity" + (", logarithmic" if axes.get_yscale() == "log" else ""))
    axes.grid(alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=9)
    words = "; ".join(
        f"{name}: " + ", ".join(f"{perplexity:.1f} at {100 * share:.0f} %" for share, perplexity in points)
        for name, points in found.items()
    )
    return Chart("Perplexity against what was removed", words, to_svg(figure))


def shares_by_block(document: Mapping[str, Any]) -> Chart | None:
    """The share removed of each block, bars for each stage whose blocks differ; None when none do."""
    shares = _uneven(document, "shares_by_block", 0.002)
    percent = {name: [100 * share for share in values] for name, values in shares.items()}
    return _bars("Share of each block that was removed", "%", percent, lambda share: f"{share:.1f} %")


def bits_by_block(document: Mapping[str, Any]) -> Chart | None:
    """The mean bits of each block's weights, bars for each stage whose blocks differ; None when none do."""
    bits = _uneven(document, "bits_by_block", 0.01)
    return _bars("Bits of each block's codes, on average", "bits", bits, lambda mean: f"{mean:.2f}")


def _uneven(document: Mapping[str, Any], key: str, least: float) -> dict[str, list[float]]:
    """{stage: its blocks' values} where they differ by more than `least`."""
    given = {stage["name"]: stage.get(key) or [] for stage in document["stages"]}
    return {name: values for name, values in given.items() if values and max(values) - min(values) > least}


def _bars(title: str, unit: str, values: Mapping[str, list[float]], write: Callable[[float], str]) -> Chart | None:
    if not values:
        return None
    shown = dict(list(values.items())[:_MOST_PANELS])
    figure, panels = new_figure(len(shown), 1.3 * len(shown) + 0.6)
    for axes, (name, heights) in zip(panels, shown.items(), strict=True):
        axes.bar(range(len(heights)), heights, color="0.45")
        room = max(max(heights) - min(heights), 1e-9)
        axes.set_ylim(max(0.0, min(heights) - room), max(heights) + 0.2 * room)
        axes.axhline(sum(heights) / len(heights), color="black", linewidth=0.8, linestyle="--")
        axes.set_title(name, fontsize=9, loc="left")
        axes.set_ylabel(unit)
    panels[-1].set_xlabel("block (dashed: the mean of all blocks)")
    words = "; ".join(f"{name}: " + ", ".join(map(write, heights)) for name, heights in shown.items())
    left = f" The first {len(shown)} of {len(values)}." if len(values) > len(shown) else ""
    return Chart(title, words + left, to_svg(figure))


def losses_by_step(document: Mapping[str, Any]) -> Chart | None:
    """The loss of each training step, a smoothed curve a stage over a faint one; None when nothing was trained."""
    stages = [stage for stage in document["stages"] if len(stage.get("losses") or []) > 1]
    if not stages:
        return None
    shown = stages[:_MOST_LOSSES]
    figure, (axes,) = new_figure(1, 4.2)
    faint = False
    for number, stage in enumerate(shown):
        steps = range(1, len(stage["losses"]) + 1)
        means = smoothed(stage["losses"])
        (curve,) = axes.plot(
            steps,
            means,
            linestyle=_LINES[number % len(_LINES)],
            marker=MARKERS[number % len(MARKERS)],
            markevery=max(1, len(steps) // 8),
            markersize=5,
            label=shortened(stage["name"], LETTERS),
        )
        if means != stage["losses"]:
            faint = True
            axes.plot(steps, stage["losses"], color=curve.get_color(), alpha=0.25, linewidth=0.8, zorder=1)
    if faint:
        axes.set_title("means over a twentieth of the steps; faint: each step", fontsize=9, loc="left")
    axes.set_xlabel("step")
    axes.set_ylabel("training loss, nats per token")
    axes.grid(alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=9)
    words = "; ".join(
        f"{stage['name']}: {ends[0]:.3f} to {ends[-1]:.3f} nats in {len(ends)} steps"
        for stage, ends in ((stage, smoothed(stage["losses"])) for stage in shown)
    )
    left = f". The first {len(shown)} of {len(stages)}." if len(stages) > len(shown) else ""
    return Chart("Loss while training", words + left, to_svg(figure))


def smoothed(losses: Sequence[float]) -> list[float]:
    """Each loss's mean with its neighbours, a twentieth of all together; at the ends some on one side only."""
    reach = len(losses) // _SMOOTHED // 2
    parts = (losses[max(0, step - reach) : step + reach + 1] for step in range(len(losses)))
    return [sum(part) / len(part) for part in parts]


def new_figure(panels: int, height: float) -> tuple[Figure, list[Any]]:
    """A figure of so many inches' height, and its panels below each other, which share their x axis."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.5, height), layout="constrained", facecolor="white")
    return figure, list(figure.subplots(panels, 1, sharex=True, squeeze=False)[:, 0])


def plain_log_ticks(axis: Any) -> None:
    """Ticks of a logarithmic axis at 1, 2, 3, 5, 10 … as plain numbers."""
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    plain = ScalarFormatter()
    plain.set_scientific(False)
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 3.0, 5.0)))
    axis.set_major_formatter(plain)
    axis.set_minor_formatter(NullFormatter())


def to_svg(figure: Figure) -> str:
    """The figure as an <svg> element, to be put into a page."""
    import matplotlib

    text = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "coldpress"}):  # equal charts are equal bytes
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    return text.getvalue()[text.getvalue().index("<svg") :]
