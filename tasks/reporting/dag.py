"""Where the boxes and arrows of a recipe's graph go: columns by depth, evaluations within what they measure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .charts import shortened

_WIDTH, _GAP_X, _GAP_Y, _MARGIN = 190, 60, 18, 10
_LINE = 16
_MOST_LETTERS, _MOST_BOLD = 25, 21
_DONE = ("cached", "computed", "resumed")


@dataclass(frozen=True)
class Box:
    """A stage: its place in pixels, its lines of text, and whether it or an evaluation in it did not finish."""

    name: str
    x: float
    y: float
    width: float
    height: float
    lines: tuple[str, ...]
    broken: bool


@dataclass(frozen=True)
class Graph:
    """Boxes, and arrows as SVG paths; width and height of it all in pixels."""

    boxes: tuple[Box, ...]
    arrows: tuple[str, ...]
    width: float
    height: float
    words: str


def draw_graph(document: Mapping[str, Any]) -> Graph:
    """Lay the document's stages out from left to right; each column ordered by where its inputs are."""
    stages = {stage["name"]: stage for stage in document["stages"]}
    within = {name: _measures(stage, stages) for name, stage in stages.items()}
    shown = [name for name in stages if within[name] is None]
    depth: dict[str, int] = {}
    for name in shown:  # inputs come first in the document
        depth[name] = 1 + max((depth[one] for one in _inputs(stages[name]) if one in depth), default=-1)
    columns: dict[int, list[str]] = {}
    for name in shown:
        columns.setdefault(depth[name], []).append(name)

    boxes: dict[str, Box] = {}
    for column, names in sorted(columns.items()):
        middles = {name: _middle_of_inputs(stages[name], boxes) for name in names}
        y = float(_MARGIN)
        for name in sorted(names, key=lambda name: middles[name]):
            inner = [stages[one] for one, of in within.items() if of == name]
            lines = _lines(name, stages[name], inner)
            broken = any(stage["state"] not in _DONE for stage in (stages[name], *inner))
            height = _LINE * len(lines) + 12
            boxes[name] = Box(name, _MARGIN + column * (_WIDTH + _GAP_X), y, _WIDTH, height, lines, broken)
            y += height + _GAP_Y
    arrows = [_arrow(boxes[one], boxes[name]) for name in shown for one in _inputs(stages[name]) if one in boxes]
    return Graph(
        tuple(boxes.values()),
        tuple(arrows),
        max((box.x + box.width for box in boxes.values()), default=0) + _MARGIN,
        max((box.y + box.height for box in boxes.values()), default=0) + _MARGIN,
        "; ".join(_sentence(name, stages[name]) for name in shown),
    )


def _inputs(stage: Mapping[str, Any]) -> list[str]:
    return list(dict.fromkeys((stage.get("inputs") or {}).values()))


def _measures(stage: Mapping[str, Any], stages: Mapping[str, Any]) -> str | None:
    """The stage that an evaluation measures, in whose box it stands."""
    model = (stage.get("inputs") or {}).get("model")
    return model if stage["stage"].startswith("evaluate/") and model in stages else None


def _middle_of_inputs(stage: Mapping[str, Any], boxes: Mapping[str, Box]) -> float:
    middles = [boxes[one].y + boxes[one].height / 2 for one in _inputs(stage) if one in boxes]
    return sum(middles) / len(middles) if middles else 0.0


def _lines(name: str, stage: Mapping[str, Any], inner: list[Mapping[str, Any]]) -> tuple[str, ...]:
    lines = [name, stage["stage"], _state(stage)]
    for one in inner:
        state = _seconds(one) if one["state"] in _DONE else one["state"]
        lines.append(f"+ {one['name'].removeprefix(name + '/')} {state}".rstrip())
    return shortened(name, _MOST_BOLD), *(shortened(line, _MOST_LETTERS) for line in lines[1:])


def _state(stage: Mapping[str, Any]) -> str:
    return f"{stage['state']} {_seconds(stage)}".strip() if stage["state"] in _DONE else stage["state"].upper()


def _seconds(stage: Mapping[str, Any]) -> str:
    return f"{stage['seconds']:.1f} s" if stage.get("seconds") is not None else ""


def _sentence(name: str, stage: Mapping[str, Any]) -> str:
    inputs = _inputs(stage)
    of = f" of {', '.join(inputs)}" if inputs else ""
    return f"{name}: {stage['stage']}{of}, {_state(stage).lower()}"


def _arrow(start: Box, end: Box) -> str:
    x1, y1 = start.x + start.width, start.y + start.height / 2
    x2, y2 = end.x - 5, end.y + end.height / 2
    bend = max(30.0, (x2 - x1) / 2)
    return f"M{x1:.0f} {y1:.0f}C{x1 + bend:.0f} {y1:.0f} {x2 - bend:.0f} {y2:.0f} {x2:.0f} {y2:.0f}"
