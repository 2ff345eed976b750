"""The commands that look at runs on a Prefect server and act on them: `status`, `cancel`, `logs`.

Its imports are inside the functions, as in `cli.py`.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import Any

import click

from ..storage.errors import ColdpressError
from .command import answers_errors, open_store, store_option


@contextlib.contextmanager
def asking_the_server() -> Iterator[Any]:
    """A client of the server at PREFECT_API_URL. Raises ColdpressError if there is none."""
    from .prefect_server import configure_prefect, reach_server, server_configured

    if not server_configured():
        raise ColdpressError(
            "PREFECT_API_URL is not set: this asks a Prefect server; `coldpress up` starts one and says what to set"
        )
    configure_prefect()
    reach_server()
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        yield client


@click.command("status")
@click.argument("run", required=False)
@store_option
@click.option("--limit", default=10, show_default=True, type=click.IntRange(1, 200), help="How many runs.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on standard output.")
@answers_errors
def status_command(run: str | None, store_url: str | None, limit: int, as_json: bool) -> None:
    """The newest runs on the server, or RUN: their stages, what they wait for, devices, and the store's size."""
    from ..storage.inspect import usage
    from .status import devices, statuses

    with asking_the_server() as client:
        found, shared = statuses(client, run, limit), devices(client)
    store = open_store(store_url)
    stored = usage(store).stored
    if as_json:
        runs = [entry.to_json() for entry in found]
        document = {"runs": runs, "devices": shared, "store": {"url": store.url, "bytes": stored}}
        click.echo(json.dumps(document, indent=2))
        return
    for entry in found:
        _show(entry, whole=run is not None)
    if not found:
        click.echo("no runs yet")
    for device in shared:
        click.echo(f"device {device['device']} of {device['host']}: {'taken' if device['taken'] else 'free'}")
    click.echo(f"store {store.url}: {stored / 1e6:.1f} MB")


def _show(entry: Any, *, whole: bool) -> None:
    times = [f"attempt {entry.attempts}"] if entry.attempts > 1 else []
    times += [
        f"{count} x {word}" for count, word in ((entry.preempted, "pre-empted"), (entry.crashed, "crashed")) if count
    ]
    where = f"pool {entry.pool}" if entry.pool else "not submitted"
    stages = f"{entry.done} of {len(entry.stages)} stages begun are done" if entry.stages else "not begun"
    click.secho(entry.run, bold=True, nl=False)
    click.echo(f"  {', '.join([entry.recipe or '?', entry.user or '?', where, entry.state, *times, stages])}")
    if entry.message and entry.state not in ("Running", "Completed"):
        click.echo(f"    {entry.message}")
    for stage in entry.stages:
        if whole or stage.state == "Running":
            percent = f" ({stage.percent:.0f} %)" if stage.percent else ""
            click.echo(f"    {stage.name}: {stage.doing or stage.state}{percent}")


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
