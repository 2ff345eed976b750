"""The commands that look at runs on a Prefect server and act on them: `status`, `cancel`, `logs`.

Its imports are inside the functions, as in `cli.py`.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from typing import Any

import click

from ..storage.errors import ColdpressError
from .command import answers_errors, open_store, store_option


@contextlib.contextmanager
def asking_the_server() -> Iterator[Any]:
    """A client of the server at PREFECT_API_URL. Raises ColdpressError if there is none."""
    from .prefect_server import answers_as_sentences, configure_prefect, reach_server, server_configured

    if not server_configured():
        raise ColdpressError(
            "PREFECT_API_URL is not set: this asks a Prefect server; `coldpress up` starts one and says what to set"
        )
    configure_prefect()
    reach_server()
    from prefect.client.orchestration import get_client

    with answers_as_sentences(), get_client(sync_client=True) as client:
        yield client


@click.command("status")
@click.argument("run", required=False)
@store_option
@click.option("--limit", default=10, show_default=True, type=click.IntRange(1, 200), help="How many runs.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on standard output.")
@answers_errors
def status_command(run: str | None, store_url: str | None, limit: int, as_json: bool) -> None:
    """What goes on, and the newest runs on the server, or RUN: stages, devices, who waits for what, the store."""
    from .overview import Table, look

    store = open_store(store_url)
    with asking_the_server() as client:
        overview = look(client, store, run, limit)
    if as_json:
        click.echo(json.dumps(overview.to_json(), indent=2))
        return
    for table in overview.tables():
        _print(table)
    if run is not None:
        rows = [(stage.name, stage.state, stage.doing) for stage in overview.runs[0].stages]
        _print(Table("its stages", ("stage", "state", "does"), rows))
    for line in (*overview.messages(), *overview.troubles(), *overview.summary()):
        click.echo(line)
    if not overview.runs:
        click.echo("no runs yet")


def _print(table: Any) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    shown = Table(
        title=table.title, title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0), header_style="dim"
    )
    for place, column in enumerate(table.columns):
        shown.add_column(column, no_wrap=place == 0, overflow="fold")
    for row in table.rows:
        shown.add_row(*(escape(cell) for cell in row))
    Console(width=None if sys.stdout.isatty() else 100).print(shown, "")


@click.command("cancel")
@click.argument("run")
@answers_errors
def cancel_command(run: str) -> None:
    """End the submitted RUN for good; what it finished is kept. RUN is an id that `status` shows, or its beginning."""
    from .status import cancel

    with asking_the_server() as client:
        click.echo(f"run {cancel(client, run)} is asked to stop")


@click.command("logs")
@click.argument("run")
@answers_errors
def logs_command(run: str) -> None:
    """What RUN has said on the server, in all its attempts."""
    from .status import logs

    with asking_the_server() as client:
        for line in logs(client, run):
            click.echo(line)


RUN_COMMANDS = (status_command, cancel_command, logs_command)
