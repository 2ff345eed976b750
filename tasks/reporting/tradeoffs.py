"""Charts of what is paid for what: quality against size, memory and time, memory against time, compression ratios."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from .charts import LETTERS, Chart, new_figure, plain_log_ticks, shortened, to_svg
from .choice import COSTS, DECODING, DEVICE_MEMORY, PROCESS_MEMORY, SIZE, Figure, front, most_measured, quality
from .explain import hardware_words, mixed_hardware
from .ratios import ratios

Row = Mapping[str, Any]
_LETTER = 5.0  # points that a letter of a label takes, on average
_LABEL_HEIGHT = 10.0
_NEAR = 10.0  # a label further from its point gets a line to it
_MOST_BARS = 30
_MOST_TIMES = 10  # a perplexity so many times the least is drawn there, its value in words
MACHINES = "o^Dv<>"  # markers


def fronts(document: Mapping[str, Any], table: Sequence[Row]) -> list[Chart]:
    """Quality against each cost that two or more variants have; first the one that most have."""
    by = quality(table)
    if by is None:
        return []
    counts = {cost: sum(row.get(cost.key) is not None for row in table) for cost in COSTS}
    made = (_front(document, table, cost, by) for cost in sorted(COSTS, key=lambda cost: -counts[cost]))
    return [chart for chart in made if chart is not None]


def _front(document: Mapping[str, Any], table: Sequence[Row], cost: Figure, by: Figure) -> Chart | None:
    known = [row for row in table if row.get(cost.key) is not None and row.get(by.key) is not None]
    if len(known) < 2:
        return None
    machines = _by_machine(document, known, cost)
    fronts = [front(rows, cost, by) for rows in machines.values()]
    figure, (axes,) = new_figure(1, 4.6)
    scale, unit = _scale(cost)
    level = 100.0 if by.best == "high" else 1.0
    highest = _MOST_TIMES * min(row[by.key] for row in known) if by.best == "low" else math.inf
    beyond = {row["variant"]: f" ↑ {by.write(row[by.key])}" for row in known if row[by.key] > highest}
    points = {row["variant"]: (row[cost.key] * scale, min(row[by.key] * level, highest)) for row in known}
    on_front = [row["variant"] for best in fronts for row in best]
    for best in fronts:
        line = zip(*(points[row["variant"]] for row in best), strict=True)
        axes.plot(*line, color="0.35", linewidth=1, linestyle="--", zorder=1)
    _points(document, axes, points, machines, on_front)
    _spread_axis(axes, [y for _, y in points.values()])
    axes.margins(x=0.15)
    axes.set_xlabel(f"{cost.name}, {unit}")
    axes.set_ylabel(by.name + (", %" if by.best == "high" else ""))
    axes.grid(alpha=0.3)
    axes.set_title(
        "filled and joined: no other is better in both"
        + (" on the same hardware" if len(machines) > 1 else "; squares: models as they came")
        + ("; ↑: off the scale" if beyond else ""),
        fontsize=9,
        loc="left",
    )
    _label(figure, axes, points, beyond)
    words = f"{by.name} against {cost.name}: " + "; ".join(
        f"{row['variant']} {by.write(row[by.key])} at {cost.write(row[cost.key])}" for row in known
    )
    title = f"{by.name[0].upper()}{by.name[1:]} against {cost.name}"
    words += f". On the front: {', '.join(on_front)}."
    return Chart(title, words, to_svg(figure), _warning(document, machines) + _absent(table, known))


def memory_by_time(document: Mapping[str, Any], table: Sequence[Row]) -> Chart | None:
    """Memory against the time of a token, a point a variant; None unless two have both."""
    memory = most_measured(table, (DEVICE_MEMORY, PROCESS_MEMORY))
    if memory is None:
        return None
    known = [row for row in table if row.get(memory.key) is not None and row.get(DECODING.key) is not None]
    if len(known) < 2:
        return None
    figure, (axes,) = new_figure(1, 4.2)
    scale, unit = _scale(memory)
    points = {row["variant"]: (row[DECODING.key], row[memory.key] * scale) for row in known}
    machines = _by_machine(document, known, memory)
    _points(document, axes, points, machines, ())
    axes.set_xlabel("time per token while decoding, ms")
    axes.set_ylabel(f"{memory.name}, {unit}")
    axes.margins(0.15)
    axes.grid(alpha=0.3)
    _label(figure, axes, points)
    words = "; ".join(
        f"{row['variant']} {memory.write(row[memory.key])} at {DECODING.write(row[DECODING.key])} a token"
        for row in known
    )
    return Chart(
        "Memory against time", words + ".", to_svg(figure), _warning(document, machines) + _absent(table, known)
    )


def compression_ratios(document: Mapping[str, Any]) -> Chart | None:
    """Bars of how many times smaller each variant is than the model it was made of, on disk and in memory."""
    stages = {stage["name"]: stage for stage in document["stages"]}
    made = [name for name in document["variants"] if stages[name]["stage"] != "source/model"]
    found = {name: given for name, given in ratios(document).items() if name in made and given}
    shown = dict(list(found.items())[:_MOST_BARS])
    kinds = [kind for kind in ("size", "memory") if any(kind in given for given in shown.values())]
    if not shown:
        return None
    figure, (axes,) = new_figure(1, 0.9 + 0.15 * len(shown) * (len(kinds) + 0.6))
    names = list(shown)
    for number, kind in enumerate(kinds):
        places = [
            index + (number - (len(kinds) - 1) / 2) * 0.36 for index, name in enumerate(names) if kind in shown[name]
        ]
        widths = [given[kind] for given in shown.values() if kind in given]
        look = {"size": {"color": "0.45"}, "memory": {"color": "white", "hatch": "///"}}[kind]
        label = {"size": "on disk", "memory": "in memory"}[kind]
        bars = axes.barh(places, widths, height=0.34, edgecolor="black", linewidth=0.8, label=label, **look)
        axes.bar_label(bars, [f"{width:.2f}" for width in widths], padding=3, fontsize=8)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(range(len(names)), [shortened(name, LETTERS) for name in names])
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.set_xlabel("times smaller than the model it was made of (1: as large)")
    if len(kinds) > 1:
        figure.legend(loc="outside upper right", ncols=2, frameon=False, fontsize=9)
    words = "; ".join(
        f"{name} "
        + ", ".join(
            f"{given[kind]:.2f} {'on disk' if kind == 'size' else 'in memory'}" for kind in kinds if kind in given
        )
        for name, given in shown.items()
    )
    left = f". The first {len(shown)} of {len(found)}." if len(found) > len(shown) else "."
    return Chart("Compression ratios", words + left, to_svg(figure))


def _warning(document: Mapping[str, Any], machines: Mapping[str, Sequence[Row]]) -> str:
    if len(machines) < 2:
        return ""
    return f"Measured on different hardware, so compare only within it: {hardware_words(document)}."


def _absent(table: Sequence[Row], known: Sequence[Row]) -> str:
    left = [row["variant"] for row in table if row not in known]
    return f" Not in this chart, for want of a figure: {', '.join(left)}." if left else ""


def _by_machine(document: Mapping[str, Any], known: Sequence[Row], cost: Figure) -> dict[str, list[Row]]:
    """{hardware: rows whose cost was measured on it}; all rows under "" where it makes no difference."""
    mixed = {} if cost is SIZE else mixed_hardware(document)
    machine = {name: hardware for hardware, names in mixed.items() for name in names}
    found: dict[str, list[Row]] = {}
    for row in known:
        found.setdefault(machine.get(row["variant"], ""), []).append(row)
    return found


def _points(
    document: Mapping[str, Any],
    axes: Any,
    points: Mapping[str, tuple[float, float]],
    machines: Mapping[str, Sequence[Row]],
    filled: Sequence[str],
) -> None:
    """Draw the points; squares are models as they came, or where hardware differs each has a marker, in a legend."""
    sources = {stage["name"] for stage in document["stages"] if stage["stage"] == "source/model"}
    machine = {row["variant"]: number for number, rows in enumerate(machines.values()) for row in rows}
    look = {"s": 34, "edgecolor": "black", "zorder": 2}
    for name, point in points.items():
        plain = "s" if name in sources else "o"
        marker = MACHINES[machine[name] % len(MACHINES)] if len(machines) > 1 else plain
        axes.scatter(*point, marker=marker, facecolor="black" if name in filled else "white", **look)
    if len(machines) > 1:
        for number, hardware in enumerate(machines):
            marker = MACHINES[number % len(MACHINES)]
            axes.scatter([], [], marker=marker, facecolor="white", label=shortened(hardware, 60), **look)
        axes.figure.legend(loc="outside lower left", frameon=False, fontsize=9)


def _scale(figure: Figure) -> tuple[float, str]:
    return (1e-6, "MB") if figure.key.endswith("_bytes") else (1.0, "ms")


def _spread_axis(axes: Any, values: Sequence[float]) -> None:
    """A logarithmic y axis where values differ by more than a factor of four."""
    if min(values) > 0 and max(values) > 4 * min(values):
        axes.set_yscale("log")
        plain_log_ticks(axes.yaxis)
    axes.margins(y=0.12)


def _label(
    figure: Any, axes: Any, points: Mapping[str, tuple[float, float]], further: Mapping[str, str] | None = None
) -> None:
    """Write each point's name beside it, where it covers no other, and what `further` says behind the name."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure)
    figure.draw_without_rendering()  # places the axes
    to_points = 72 / figure.dpi
    frame = axes.get_window_extent()
    pixels: dict[str, tuple[float, float]] = {}
    for names in _together({name: axes.transData.transform(point) * to_points for name, point in points.items()}):
        more = f" and {len(names) - 2} more" if len(names) > 3 else ""
        said = [shortened(name, LETTERS) + (further or {}).get(name, "") for name in (names[:2] if more else names)]
        label = ", ".join(said) + more
        pixels[label] = tuple(axes.transData.transform(points[names[0]]) * to_points)
    edges = (frame.x0 * to_points, frame.y0 * to_points, frame.x1 * to_points, frame.y1 * to_points)
    for label, (dx, dy) in place_labels(pixels, edges).items():
        corner = ((pixels[label][0] + dx) / to_points, (pixels[label][1] + dy) / to_points)
        place = axes.transAxes.inverted().transform(corner)
        behind = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.5}  # the front's line
        axes.text(*place, label, transform=axes.transAxes, fontsize=8.5, va="bottom", bbox=behind)
        if math.hypot(*_nearest(dx, dy, label)) > _NEAR:
            end = [(pixel + gap) / to_points for pixel, gap in zip(pixels[label], _nearest(dx, dy, label), strict=True)]
            start = [pixel / to_points for pixel in pixels[label]]
            line = axes.transAxes.inverted().transform([start, end])
            axes.plot(*line.T, transform=axes.transAxes, color="0.5", linewidth=0.6, zorder=1.5)


def _nearest(dx: float, dy: float, label: str) -> tuple[float, float]:
    """From a point to the nearest place of its label's box."""
    return min(max(0.0, dx), dx + _LETTER * len(label)), min(max(0.0, dy), dy + _LABEL_HEIGHT)


def _together(points: Mapping[str, Sequence[float]]) -> list[list[str]]:
    """Names of points that lie upon each other, which get one label."""
    found: list[list[str]] = []
    for name, (x, y) in points.items():
        near = (one for one in found if abs(points[one[0]][0] - x) < 2 and abs(points[one[0]][1] - y) < 2)
        group = next(near, None)
        if group is None:
            found.append([name])
        else:
            group.append(name)
    return found


def place_labels(
    points: Mapping[str, tuple[float, float]], frame: tuple[float, float, float, float]
) -> dict[str, tuple[float, float]]:
    """{name: offset of its label's lower left corner from its point}, in points of 1/72 inch.

    Each label takes the place around its point that covers the least of other points and labels already placed, and
    stays within the frame (left, bottom, right, top) where it can.
    """
    taken = [(x - 4, y - 4, x + 4, y + 4) for x, y in points.values()]
    placed = {}
    for name, (x, y) in sorted(points.items(), key=lambda item: item[1]):
        width, height = _LETTER * len(name), _LABEL_HEIGHT
        places = [
            (dx, dy)
            for far in (6.0, 16.0, 28.0)
            for dx, dy in (
                (far, -height / 2), (-far - width, -height / 2), (-width / 2, far), (-width / 2, -far - height),
                (far, far / 2), (far, -far / 2 - height), (-far - width, far / 2), (-far - width, -far / 2 - height),
            )
        ]  # fmt: skip
        boxes = {(dx, dy): (x + dx, y + dy, x + dx + width, y + dy + height) for dx, dy in places}
        placed[name] = min(places, key=lambda place: _cost(place, boxes[place], taken, frame))
        taken.append(boxes[placed[name]])
    return placed


def _cost(
    offset: tuple[float, float], box: Sequence[float], taken: Sequence[Sequence[float]], frame: Sequence[float]
) -> float:
    """Of a label's place: what it covers, how far it leaves the frame, how far it is away."""
    outside = sum(max(0.0, frame[side] - box[side]) for side in (0, 1)) + sum(
        max(0.0, box[side] - frame[side]) for side in (2, 3)
    )
    return sum(_overlap(box, other) for other in taken) + 20 * outside + 0.5 * math.hypot(*offset)


def _overlap(first: Sequence[float], second: Sequence[float]) -> float:
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    return max(0.0, width) * max(0.0, height)
