"""The command line. Every command answers errors with one sentence on standard error and exit status 2.

Exit status: 0 all well; 1 a stage failed, a deadline or budget ended the run, or `verify` found damage; 2 the request
can't be carried out; 130 or 143 stopped by Ctrl-C or SIGTERM.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import sys
from typing import Any

import click

from ..storage.errors import ColdpressError
from .cli_report import REPORT_COMMANDS
from .cli_runs import RUN_COMMANDS
from .cli_server import SERVER_COMMANDS
from .cli_store import STORE_COMMANDS
from .command import (
    answers_errors,
    budget_option,
    deadline_option,
    device_option,
    devices_option,
    only_option,
    open_store,
    report_option,
    set_option,
    slots_option,
    store_option,
)


def _recipe(name: str, overrides: tuple[str, ...], only: tuple[str, ...]) -> Any:
    from .recipe import load_recipe

    recipe = load_recipe(name, overrides)
    return recipe.only(only) if only else recipe


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="coldpress")
@click.option("-v", "--verbose", is_flag=True, help="Log what libraries and the computing process say.")
def main(verbose: bool) -> None:
    """Compress large language models: a recipe's stages run on Prefect, every result is cached by content."""
    gc.set_threshold(50_000, 20, 20)  # Prefect makes so many objects that stay that to look through them delays a start
    # A handler of our own rather than the root logger's, which would repeat what Prefect says.
    logger = logging.getLogger("coldpress")
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger.addHandler(handler)
    logger.propagate = False
    logger.setLevel(logging.DEBUG if verbose else logging.WARNING)


@main.command()
@click.argument("recipe")
@store_option
@set_option
@only_option
@click.option("--json", "as_json", is_flag=True, help="One JSON document on standard output.")
@device_option
@devices_option
@slots_option
@deadline_option
@budget_option
@report_option
@answers_errors
def run(
    recipe: str,
    store_url: str | None,
    overrides: tuple[str, ...],
    only: tuple[str, ...],
    as_json: bool,
    device: str,
    devices: str | None,
    slots: int | None,
    deadline: float | None,
    budget: float | None,
    report_folder: str | None,
) -> None:
    """Run RECIPE (a file, or the name of a shipped recipe); compute only what the store doesn't have."""
    from rich.console import Console

    from ..tasks.reporting.report import write_report
    from .budget import used_up
    from .run import run_recipe
    from .slots import check_devices
    from .terminal import Terminal, print_results

    named, count = check_devices(devices, slots)
    checked = _recipe(recipe, overrides, only)
    with Terminal(Console(stderr=True)) as terminal:
        store = open_store(store_url)
        result = run_recipe(
            checked, store, terminal, device=device, slots=count, devices=named, seconds=deadline, budget=budget
        )
    document = result.to_json()
    folder = report_folder or os.path.join("reports", checked.name)
    document["report"] = write_report(document, folder)
    if as_json:
        click.echo(json.dumps(document, indent=2))
    else:
        print_results(document)
    status = 1 if result.failed else 0
    if result.out_of_budget and result.unfinished and result.device_seconds:
        click.echo(used_up(**result.device_seconds), err=True)
        status = 1  # and not as one that is to be started again
    elif result.out_of_time and result.unfinished:
        click.echo(
            "its deadline has come: all finished work is kept, and the same command goes on from there", err=True
        )
        status = 1
    elif result.stopped_by is not None and result.unfinished:
        click.echo("pre-empted: all finished work is kept; the same command goes on from there", err=True)
        status = 128 + result.stopped_by
    if result.untold:  # at its exit Prefect would try for minutes to tell the server of each event
        sys.stdout.flush()
        os._exit(status)
    sys.exit(status)


@main.command()
@click.argument("recipe")
@store_option
@set_option
@only_option
@click.option("--json", "as_json", is_flag=True, help="One JSON document on standard output.")
@device_option
@answers_errors
def plan(
    recipe: str, store_url: str | None, overrides: tuple[str, ...], only: tuple[str, ...], as_json: bool, device: str
) -> None:
    """Show RECIPE's DAG: each stage cached, to be run, or undecided until its inputs exist. Computes nothing."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from .plan import disk_need, prepare

    checked, store = _recipe(recipe, overrides, only), open_store(store_url)
    planned = prepare(checked, store, device)
    if as_json:
        entries = [
            {
                "name": name,
                "stage": entry.node.stage.name,
                "inputs": dict(entry.node.inputs),
                "state": entry.state,
                "key": entry.key,
                "artifact": entry.action.artifact.id if entry.action else None,
            }
            for name, entry in planned.items()
        ]
        click.echo(json.dumps({"recipe": checked.name, "store": store.url, "stages": entries}, indent=2))
        return
    table = Table(title=f"{checked.name} on {store.url}", title_justify="left")
    for title in ("stage", "does", "takes", "state", "artifact"):
        table.add_column(title, overflow="fold")  # names of a matrix differ at their ends
    for name, entry in planned.items():
        artifact = entry.action.artifact.short if entry.action else ""
        inputs = escape(", ".join(entry.node.inputs.values()))
        table.add_row(escape(name), entry.node.stage.name, inputs, entry.state, artifact)
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(table)
    need = disk_need(planned, store)
    if need:
        console.print(f"up to {need / 1e6:.0f} MB more in the store", highlight=False)


@main.command()
@click.argument("recipe")
@click.argument("stage")
@store_option
@set_option
@device_option
@answers_errors
def why(recipe: str, stage: str, store_url: str | None, overrides: tuple[str, ...], device: str) -> None:
    """Say why STAGE of RECIPE is cached or not: what differs from the nearest earlier run."""
    from ..tasks.catalogue import did_you_mean
    from .plan import nearest_action, prepare

    checked, store = _recipe(recipe, overrides, ()), open_store(store_url)
    planned = prepare(checked, store, device)
    if stage not in planned:
        raise ColdpressError(f"the recipe has no stage '{stage}'; {did_you_mean(stage, list(planned))}")
    entry = planned[stage]
    if entry.action is not None:
        click.echo(f"{stage} is cached: key {entry.key[:12] if entry.key else ''}, artifact {entry.action.artifact.id}")
        return
    if entry.preimage is None:
        waiting = [name for name in entry.node.inputs.values() if planned[name].action is None]
        click.echo(f"{stage} is undecided: its key needs the results of {', '.join(waiting)}")
        for name in waiting:
            click.echo(f"see: coldpress why {recipe} {name}")
        return
    nearest = nearest_action(store, entry.node.stage.name, entry.preimage)
    if nearest is None:
        click.echo(f"{stage} will run: {entry.node.stage.name} has never run in {store.url}")
        return
    action, differences = nearest
    earlier = f"{action.provenance.get('recipe', '?')}/{action.provenance.get('node', '?')}"
    click.echo(f"{stage} will run. The nearest earlier result is {earlier} of {action.provenance.get('started', '?')}:")
    if not differences:
        click.echo("  the key is the same, but its artifact is missing or damaged (see coldpress verify)")
    for difference in differences:
        click.echo(f"  {difference.field}: now {_value(difference.now)}, then {_value(difference.then)}")


def _value(value: Any) -> str:
    return "(default)" if value is None else json.dumps(value)


@main.command()
@click.argument("name", required=False)
@answers_errors
def stages(name: str | None) -> None:
    """The catalogue: methods, parameters, defaults and papers. NAME is like prune or quantize/gptq."""
    from ..tasks.catalogue import did_you_mean
    from ..tasks.stage import CATALOGUE

    chosen = [s for s in CATALOGUE.values() if name is None or name in (s.use, s.method, s.name)]
    if not chosen:
        raise ColdpressError(f"there is no stage '{name}'; {did_you_mean(str(name), list(CATALOGUE))}")
    chosen.sort(key=lambda stage: (stage.use == "statistics", stage.use))  # recipes don't name what is measured
    for stage in chosen:
        click.secho(stage.name, bold=True, nl=False)
        click.echo(f"  {stage.summary}")
        if stage.paper:
            click.echo(f"    paper: {stage.paper}")
        if stage.inputs:
            taken = [
                f"{role} ({kind}{', to measure' if role in stage.passed_on else ''})"
                for role, kind in stage.inputs.items()
            ]
            click.echo(f"    takes: {', '.join(taken)}")
        if name is None:
            continue
        for field, info in stage.parameters.model_fields.items():
            needed = "required" if info.is_required() else f"default {info.default!r}"
            click.echo(f"    {field}: {info.description} [{needed}]")
    if name is None:
        click.echo("\ncoldpress stages NAME shows the parameters")


for _command in (*STORE_COMMANDS, *REPORT_COMMANDS, *SERVER_COMMANDS, *RUN_COMMANDS):
    main.add_command(_command)


if __name__ == "__main__":
    main()
