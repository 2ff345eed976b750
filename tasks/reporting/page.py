"""The report's page, one file that needs nothing else, and its short form in Markdown."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from typing import Any

from .charts import Chart, charts
from .choice import COSTS, most_measured, quality, summary
from .dag import draw_graph
from .explain import ancestors, dashes, evaluations, hardware_words, loading, mixed_protocols, what_failed
from .report import NOISE_MARK, cells, columns, markdown_table, values
from .significance import words
from .tradeoffs import compression_ratios, fronts, memory_by_time

_MOST_PAIRS = 12  # of variants that can't be told apart, before the rest is folded away


def page(document: Mapping[str, Any]) -> str:
    """The HTML page of a run's document."""
    from jinja2 import Environment, FunctionLoader

    table = values(document)
    variants = [row for row in table if row["variant"] in document["variants"]]
    shown = columns(document)
    by, cost = quality(variants), most_measured(variants, COSTS)
    further = [memory_by_time(document, variants), compression_ratios(document)]
    environment = Environment(loader=FunctionLoader(_source), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["svg"] = _numbered_svg()
    environment.filters["settings"] = settings
    environment.filters["breakable"] = _breakable
    return environment.get_template("report.html").render(
        document=document,
        summary=summary(document, table),
        warnings=[*mixed_protocols(document), *_hardware_warning(document)],
        recommendations=document.get("recommendations", []),
        columns=shown,
        table=list(zip(table, cells(document), strict=True)),
        by=by,
        cost=cost,
        failed=what_failed(document),
        dashes=[f"{titles} of {of}" for titles, of in _grouped(document, dashes(document, table, shown))],
        noise_mark=NOISE_MARK,
        differences=difference_rows(document),
        alike=indistinguishable(document),
        fronts=fronts(document, variants),
        charts=[chart for chart in further if chart is not None] + charts(document),
        generations=by_prompt(document),
        graph=draw_graph(document),
        variants=[_details(document, variant) for variant in document["variants"]],
        runtimes=_runtimes(document),
    )


def markdown(document: Mapping[str, Any]) -> str:
    """The table with what has to be known to read it, and what is recommended."""
    table = values(document)
    parts = [f"# {document['recipe']}", summary(document, table), markdown_table(document).rstrip()]
    if any(cell.within_noise for row in cells(document) for cell in row):
        parts.append(
            f"{NOISE_MARK} differs from the model it was made of by no more than noise (95 %, paired bootstrap)."
        )
    parts += [f"**{answer['words']}**" for answer in document.get("recommendations", [])]
    parts += [f"Warning: {warning}" for warning in (*mixed_protocols(document), *_hardware_warning(document))]
    if failed := what_failed(document):
        parts.append("\n".join(f"- {variant}: {' '.join(sentence.split())}" for variant, sentence in failed))
    return "\n\n".join(parts) + "\n"


def difference_rows(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One mapping for each variant and metric that was compared item by item with the base."""
    return [
        {"variant": row, "metric": metric, "words": words(entry), **entry}
        for row, found in document.get("differences", {}).items()
        for metric, entry in found.items()
    ]


def indistinguishable(document: Mapping[str, Any]) -> list[tuple[str, list[str], list[str]]]:
    """(metric, pairs that can't be told apart, further ones), each pair as "a and b"."""
    found = []
    for metric, pairs in document.get("indistinguishable", {}).items():
        said = [" and ".join(pair) for pair in pairs]
        found.append((metric, said[:_MOST_PAIRS], said[_MOST_PAIRS:]))
    return found


def by_prompt(document: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """[(prompt, [(variant, continuation)])], in the order in which they first appear."""
    found: dict[str, list[tuple[str, str]]] = {}
    for variant, texts in document.get("generations", {}).items():
        for text in texts:
            found.setdefault(text["prompt"], []).append((variant, text["continuation"]))
    return list(found.items())


def settings(parameters: Mapping[str, Any] | None) -> str:
    """Parameters as "bits 4, group_size 64"."""
    return ", ".join(f"{name} {value}" for name, value in (parameters or {}).items())


def _grouped(document: Mapping[str, Any], missing: Sequence[tuple[str, list[str]]]) -> list[tuple[str, str]]:
    """(titles, variants) of columns that the same variants lack; "all but a, b" where that is shorter."""
    explained = {name for name, _ in what_failed(document)}
    together: dict[tuple[str, ...], list[str]] = {}
    for title, without in missing:
        together.setdefault(tuple(without), []).append(title)
    said = []
    for lacking, titles in together.items():
        others = [name for name in document["variants"] if name not in lacking and name not in explained]
        of = f"all but {', '.join(others)}" if len(others) < len(lacking) else ", ".join(lacking)
        said.append((", ".join(titles), of))
    return said


def _details(document: Mapping[str, Any], variant: str) -> dict[str, Any]:
    made_by = ancestors(document, variant)
    return {
        "stage": made_by[-1],
        "chain": [*made_by, *evaluations(document, variant)],
        "loading": loading(document, variant),
    }


def _hardware_warning(document: Mapping[str, Any]) -> Sequence[str]:
    machines = hardware_words(document)
    if not machines:
        return ()
    return (f"Speed and memory were measured on different hardware, and can be compared only within it: {machines}.",)


def _runtimes(document: Mapping[str, Any]) -> list[tuple[str, dict[str, list[str]]]]:
    """[(evaluation, {what it ran in: rows})]."""
    found: dict[str, dict[str, list[str]]] = {}
    for row, runtimes in document.get("runtimes", {}).items():
        for evaluation, runtime in runtimes.items():
            found.setdefault(evaluation, {}).setdefault(runtime, []).append(row)
    return list(found.items())


def _source(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def _breakable(name: str) -> str:
    """A variant's name that a narrow column may break before and between its settings."""
    from markupsafe import Markup, escape

    return Markup(str(escape(name)).replace("[", "<wbr>[").replace(",", ",<wbr>"))


def _numbered_svg() -> Callable[[Chart], str]:
    """A filter that gives each chart's SVG ids of its own, since all charts of a page share one space of ids."""
    from markupsafe import Markup

    made: list[Chart] = []

    def number(chart: Chart) -> str:
        made.append(chart)
        return Markup(re.sub(r'(id="|href="#|url\(#)', rf"\g<1>c{len(made)}-", chart.svg))

    return number
