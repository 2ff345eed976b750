"""The report of a run: one row a variant, as HTML (with charts), Markdown, CSV and JSON."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...storage.errors import write_error
from .choice import task_title

Row = Mapping[str, Any]
NOISE_MARK = "≈"  # behind a value within noise of the base


@dataclass(frozen=True)
class Column:
    """A column of the table: its title, key in the row's values, and how a value is written.

    optional: left out where no row has a value. spread: the key of the value's spread, and how it is written behind it.
    """

    title: str
    key: str
    write: Callable[[Any], str]
    justify: str = "right"
    optional: bool = False
    spread: tuple[str, Callable[[Any], str]] | None = None


@dataclass(frozen=True)
class Cell:
    """A cell of the table: its text, what it is sorted by (None where nothing was measured), and whether it differs
    from the base by no more than noise.
    """

    text: str
    value: Any = None
    within_noise: bool = False


def _milliseconds(value: float) -> str:
    return f"{value:.1f} ms"


def _quartiles(value: float) -> str:
    return f" (IQR {value:.1f})"


def _megabytes(value: float) -> str:
    return f"{value / 1e6:.1f} MB"


COLUMNS = (
    Column("variant", "variant", str, "left"),
    Column("weights", "linear_weights", lambda v: f"{v / 1e6:.1f} M"),
    Column("sparsity", "sparsity", lambda v: f"{100 * v:.1f} %"),
    Column("bits per weight", "bits_per_weight", lambda v: f"{v:.2f}"),
    Column("size on disk", "size_bytes", lambda v: f"{v / 1e6:.1f} MB"),
    Column("perplexity", "perplexity", lambda v: f"{v:.2f}"),
    Column("perplexity per token", "perplexity_per_token", lambda v: f"{v:.2f}", optional=True),
    Column("mean of lines", "perplexity_mean_of_windows", lambda v: f"{v:.1f}", optional=True),
    Column("median of lines", "perplexity_median_of_windows", lambda v: f"{v:.2f}", optional=True),
    Column("KL to base", "kl_nats", lambda v: f"{v:.4f} nats", optional=True),
    Column("top-1 changed", "top1_changed", lambda v: f"{100 * v:.1f} %", optional=True),
    Column("KV cache", "kv_cache_bytes", lambda v: f"{v / 1e6:.2f} MB", optional=True),
    Column("in full", "kv_cache_bytes_in_full", lambda v: f"{v / 1e6:.2f} MB", optional=True),
    Column("device memory", "device_memory_bytes", _megabytes, optional=True),
    Column("process memory", "process_memory_bytes", _megabytes, optional=True),
    Column("prompt", "prefill_ms", _milliseconds, optional=True, spread=("prefill_ms_iqr", _quartiles)),
    Column(
        "per token", "decode_ms_per_token", _milliseconds, optional=True,
        spread=("decode_ms_per_token_iqr", _quartiles),
    ),
    Column("tokens/s", "tokens_per_second", lambda v: f"{v:.1f}", optional=True),
    Column("energy per token", "energy_joules_per_token", lambda v: f"{v:.3g} J", optional=True),
    Column("seconds", "seconds", lambda v: f"{v:.1f}"),
    Column("state", "state", str, "left"),
)  # fmt: skip
_BEFORE_TASKS = "KV cache"  # scores of tasks stand before this column, next to perplexity
_SHARES = frozenset({"acc", "acc_norm", "exact_match", "em", "f1", "mc1", "mc2", "pass@1"})  # written in percent


def values(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One mapping a variant, from the document of `run --json`; what was not measured is absent.

    After it come its evaluations that have names of their own, as "variant/name", if a column shows a figure of theirs.
    """
    stages = {stage["name"]: stage for stage in document["stages"]}
    metrics = document["metrics"]
    further = [name for name in metrics if name not in document["variants"] and _in_table(metrics[name])]
    return [
        {
            "variant": name,
            **metrics.get(name, {}),
            "seconds": stages[name]["seconds"],
            "state": stages[name]["state"],
            "artifact": stages[name]["artifact"],
        }
        for variant in document["variants"]
        for name in (variant, *(one for one in further if one.rpartition("/")[0] == variant))
    ]


def _in_table(metrics: Row) -> bool:
    return bool(metrics.keys() & {column.key for column in COLUMNS}) or bool(task_columns([metrics]))


def write_value(key: str, value: float) -> str:
    """A figure as the table writes it; one without a column with six digits."""
    found = [column for column in (*COLUMNS, *task_columns([{key: value}])) if column.key == key]
    return found[0].write(value) if found else f"{value:.6g}"


def columns(document: Mapping[str, Any]) -> list[Column]:
    """The table's columns: those above for which something was measured, and one for each score of a task."""
    table = values(document)
    measured = {key for row in table for key, value in row.items() if value is not None}
    shown = [column for column in COLUMNS if column.key in measured or not column.optional]
    place = [column.title for column in COLUMNS].index(_BEFORE_TASKS)
    before = sum(column in shown for column in COLUMNS[:place])
    return [*shown[:before], *task_columns(table), *shown[before:]]


def task_columns(table: Sequence[Row]) -> list[Column]:
    """Columns of metrics named "task.metric", with their standard errors "task.metric_stderr" beside them."""
    keys = dict.fromkeys(key for row in table for key, value in row.items() if isinstance(value, int | float))
    found = []
    for key in keys:
        _, dot, metric = key.rpartition(".")
        if not dot or metric == "n" or key.endswith("_stderr"):
            continue
        title = task_title(key)
        if metric.partition(",")[0] in _SHARES:
            spread = (f"{key}_stderr", lambda v: f" ± {100 * v:.1f}")
            found.append(Column(title, key, lambda v: f"{100 * v:.1f} %", spread=spread))
        else:
            spread = (f"{key}_stderr", lambda v: f" ± {v:.2g}")
            found.append(Column(title, key, lambda v: f"{v:.4g}", spread=spread))
    return found


def cells(document: Mapping[str, Any]) -> list[list[Cell]]:
    """The table; a dash for what was not measured."""
    differences = document.get("differences", {})
    return [
        [_cell(column, row, differences.get(row["variant"], {})) for column in columns(document)]
        for row in values(document)
    ]


def _cell(column: Column, row: Row, differences: Mapping[str, Any]) -> Cell:
    value = row.get(column.key)
    if value is None:
        return Cell("-")
    spread = ""
    if column.spread is not None and row.get(column.spread[0]) is not None:
        spread = column.spread[1](row[column.spread[0]])
    return Cell(column.write(value) + spread, value, differences.get(column.key, {}).get("within_noise", False))


def rows(document: Mapping[str, Any]) -> list[list[str]]:
    """The table's cells as text."""
    return [
        [f"{cell.text} {NOISE_MARK}" if cell.within_noise else cell.text for cell in row] for row in cells(document)
    ]


def write_report(document: Mapping[str, Any], folder: str) -> str:
    """Write report.html, .md, .csv and .json into `folder`; returns the path of the HTML page."""
    from .page import markdown, page

    contents = {
        "report.html": page(document),
        "report.md": markdown(document),
        "report.csv": _csv(document),
        "report.json": json.dumps(document, indent=2) + "\n",
    }
    try:
        os.makedirs(folder, exist_ok=True)
        for name, text in contents.items():
            temporary = os.path.join(folder, f".{name}")
            with open(temporary, "w", encoding="utf-8") as file:
                file.write(text)
            os.replace(temporary, os.path.join(folder, name))
    except OSError as error:
        raise write_error(folder, error) from error
    return os.path.abspath(os.path.join(folder, "report.html"))


def markdown_table(document: Mapping[str, Any]) -> str:
    """The comparison as a Markdown table."""
    shown = columns(document)
    titles = [column.title for column in shown]
    rules = ["---" if column.justify == "left" else "---:" for column in shown]
    lines = [titles, rules, *rows(document)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + "\n"


def _csv(document: Mapping[str, Any]) -> str:
    table = values(document)
    fields = list(dict.fromkeys(key for row in table for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, fields)
    writer.writeheader()
    writer.writerows(table)
    return text.getvalue()
