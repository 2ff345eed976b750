"""The commands that look at results without computing any: `report` and `compare`."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import click

from .command import answers_errors, open_store, set_option, store_option

if TYPE_CHECKING:
    from ..storage.store import Store
    from .recipe import Recipe


@click.command()
@click.argument("recipes", nargs=-1, required=True, metavar="RECIPE...")
@click.option(
    "--store", "urls", multiple=True, metavar="URL",
    help="Folder or fsspec URL; may be given several times. [default: $COLDPRESS_STORE or .coldpress]",
)  # fmt: skip
@set_option
@click.option("--output", metavar="DIR", help="Where the report goes. [default: reports/<recipe>]")
@click.option("--fit-vram", metavar="SIZE", help="Recommend the best variant for so much memory, like 8GB.")
@click.option("--fit-size", metavar="SIZE", help="Recommend the best variant of at most this size on disk, like 500MB.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on standard output.")
@answers_errors
def report(
    recipes: tuple[str, ...],
    urls: tuple[str, ...],
    overrides: tuple[str, ...],
    output: str | None,
    fit_vram: str | None,
    fit_size: str | None,
    as_json: bool,
) -> None:
    """Report on RECIPEs from what the store has, as one page, Markdown, CSV and JSON. Computes nothing."""
    from ..tasks.reporting.choice import MEMORY_FIGURES, SIZE_FIGURES, parse_bytes, recommend
    from ..tasks.reporting.combine import combine
    from ..tasks.reporting.report import values, write_report
    from .recipe import load_recipe

    wanted = [
        (parse_bytes(text), figures)
        for text, figures in ((fit_vram, MEMORY_FIGURES), (fit_size, SIZE_FIGURES))
        if text is not None
    ]
    checked = [load_recipe(name, overrides) for name in recipes]
    names = list(dict.fromkeys(recipe.name for recipe in checked))
    stores = [open_store(url) for url in urls or (None,)]
    document = combine([_known(recipe, store) for store in stores for recipe in checked])
    table = values(document)
    document["recommendations"] = [recommend(document, table, budget, figures) for budget, figures in wanted]
    document["report"] = write_report(document, output or os.path.join("reports", "+".join(names)))
    if as_json:
        click.echo(json.dumps(document, indent=2))
        return
    from .terminal import print_results

    print_results(document)
    for answer in document["recommendations"]:
        click.echo(answer["words"])


def _known(recipe: Recipe, store: Store) -> dict[str, Any]:
    """The document of a recipe as a run would give it now, had it ended before computing anything."""
    from .plan import prepare
    from .result import NOT_COMPUTED, RunResult
    from .run import collect_metrics

    result = RunResult("", recipe.name, store.url, recipe.variants)
    for planned in prepare(recipe, store).values():
        result.record(planned.node, "cached" if planned.action else NOT_COMPUTED, planned.action)
    collect_metrics(recipe, store, result)
    return result.to_json()


@click.command()
@click.argument("first", metavar="A")
@click.argument("second", metavar="B")
@store_option
@click.option(
    "--top", default=10, show_default=True, metavar="N", help="How many layers to list, most different first."
)
@click.option("--json", "as_json", is_flag=True, help="One JSON document on standard output.")
@answers_errors
def compare(first: str, second: str, store_url: str | None, top: int, as_json: bool) -> None:
    """Compare two results A and B (names like recipe/stage, ids or their beginnings): weights, figures, origin."""
    from rich.console import Console
    from rich.progress import Progress

    from .comparison import compare_artifacts

    store = open_store(store_url)
    a, b = store.resolve(first), store.resolve(second)
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("comparing blocks", total=None)
        found = compare_artifacts(store, a, b, lambda what, done, total: bar.update(task, completed=done, total=total))
    if as_json:
        named = {"a": {"ref": first, **found["a"]}, "b": {"ref": second, **found["b"]}}
        click.echo(json.dumps({**found, **named}, indent=2))
        return
    _print_comparison(first, second, found, top)


def _print_comparison(first: str, second: str, found: Mapping[str, Any], top: int) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 140, highlight=False)

    def table(titles: tuple[str, ...], lines: Iterable[tuple[str, ...]]) -> None:
        made = Table()
        for number, title in enumerate(titles):
            made.add_column(escape(title), justify="right" if number else "left", overflow="fold")
        for line in lines:
            made.add_row(*map(escape, line))
        console.print(made)

    for side, name in (("a", first), ("b", second)):
        console.print(f"{side.upper()}: {escape(name)}, {found[side]['kind']} {found[side]['artifact'][:12]}")
    if found["identical"]:
        console.print("A and B are the same artifact")
    for line in found["structure"]:
        console.print(escape(f"they differ in structure: {line}"))
    if found["weights"] is not None and not found["identical"]:
        weights = found["weights"]
        console.print(
            f"weights: |B - A| / |A| is {weights['difference']:.4f} over all, {weights['equal']} of "
            f"{len(weights['layers'])} tensors are equal"
        )
        shown = [layer for layer in weights["layers"] if layer["difference"] != 0][:top]
        if shown:
            lines = [
                (layer["name"], f"{layer['difference']:.4f}", f"{layer['zeros_a']:.1%}", f"{layer['zeros_b']:.1%}")
                for layer in shown
            ]
            table(("tensor", "|B - A| / |A|", "zeros in A", "zeros in B"), lines)
    if found["metrics"]:
        from ..tasks.reporting.report import write_value

        figures = []
        for one in found["metrics"]:
            key = str(one["metric"])
            change = ("-" if one["change"] < 0 else "+") + write_value(key, abs(one["change"]))
            sides = (write_value(key, one["a"]), write_value(key, one["b"]))
            name = f"{key} ({one['with']})" if one["with"] else key
            figures.append((name, *sides, change, str(one.get("words", "-"))))
        table(("metric", "A", "B", "B - A", "95 % interval"), figures)
    elif not found["identical"]:
        console.print("nothing was measured of both in the same way")
    for line in found["origin"]:
        console.print(escape(line))


REPORT_COMMANDS = (report, compare)
