"""The report of a run: one row a variant, as HTML (with charts), Markdown, CSV and JSON."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any

from ...storage.errors import write_error

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Column:
    """A column of the table: its title, key in the row's values, and how a value is written.

    optional: left out where no row has a value.
    """

    title: str
    key: str
    write: Callable[[Any], str]
    justify: str = "right"
    optional: bool = False


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
    Column("seconds", "seconds", lambda v: f"{v:.1f}"),
    Column("state", "state", str, "left"),
)


def values(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One mapping a variant, from the document of `run --json`; what was not measured is absent.

    After it come its evaluations that have names of their own, as "variant/name".
    """
    stages = {stage["name"]: stage for stage in document["stages"]}
    metrics = document["metrics"]
    further = [name for name in metrics if name not in document["variants"]]
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


def columns(document: Mapping[str, Any]) -> list[Column]:
    """The table's columns."""
    measured = {key for row in values(document) for key in row}
    return [column for column in COLUMNS if column.key in measured or not column.optional]


def rows(document: Mapping[str, Any]) -> list[list[str]]:
    """The table's cells as text; a dash for what was not measured."""
    return [
        ["-" if row.get(column.key) is None else column.write(row[column.key]) for column in columns(document)]
        for row in values(document)
    ]


def write_report(document: Mapping[str, Any], folder: str) -> str:
    """Write report.html, .md, .csv and .json into `folder`; returns the path of the HTML page."""
    contents = {
        "report.html": _html(document),
        "report.md": markdown_table(document),
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


def _html(document: Mapping[str, Any]) -> str:
    from jinja2 import Template

    from .charts import charts

    source = resources.files(__package__).joinpath("report.html").read_text(encoding="utf-8")
    runtimes = sorted({v["runtime"] for v in document["metrics"].values() if "runtime" in v})
    return Template(source, autoescape=True).render(
        document=document, columns=columns(document), rows=rows(document), runtimes=runtimes, charts=charts(document)
    )
