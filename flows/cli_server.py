"""The commands that need a Prefect server: `up` starts one with a worker, `submit` sends it recipes.

Its imports are inside the functions, as in `cli.py`.
"""

from __future__ import annotations

import os
import sys

import click

from ..storage.errors import ColdpressError
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

pool_option = click.option("--pool", default="coldpress", show_default=True, metavar="NAME", help="The work pool.")
heartbeat_option = click.option(
    "--heartbeat",
    default=30,
    show_default=True,
    type=click.IntRange(30),
    help="Seconds between a run's signs of life. Without three of them it counts as dead.",
)


@click.command("up")
@click.option("--host", default="127.0.0.1", show_default=True, help="The address to listen on.")
@click.option("--port", default=4200, show_default=True, type=click.IntRange(1, 65535))
@pool_option
@click.option("--limit", default=1, show_default=True, type=click.IntRange(1), help="How many runs at the same time.")
@heartbeat_option
@click.option("--no-server", is_flag=True, help="Only a worker, for the server at PREFECT_API_URL.")
@devices_option
@slots_option
@answers_errors
def up_command(
    host: str,
    port: int,
    pool: str,
    limit: int,
    heartbeat: int,
    no_server: bool,
    devices: str | None,
    slots: int | None,
) -> None:
    """Start a Prefect server, a work pool and a worker; recipes sent with `submit` survive crashes."""
    from ..tasks.hardware import absent_gpus
    from .slots import check_devices
    from .up import Options, up

    named, _ = check_devices(devices, slots)
    if absent := absent_gpus(named):
        click.echo(f"warning: no GPU {', '.join(absent)} here; runs need `submit --device cpu`", err=True)
    if devices:
        os.environ["COLDPRESS_DEVICES"] = devices  # for the runs that its worker starts
    if slots:
        os.environ["COLDPRESS_SLOTS"] = str(slots)
    up(Options(host, port, pool, limit, heartbeat, not no_server), click.echo)


@click.command("submit")
@click.argument("recipe")
@store_option
@set_option
@only_option
@pool_option
@device_option
@click.option(
    "--priority",
    type=click.Choice(("high", "normal", "low")),
    default="normal",
    show_default=True,
    help="Which of a pool's waiting runs a worker takes first.",
)
@deadline_option
@budget_option
@click.option("--cron", metavar="'0 3 * * *'", help="Run it at these times (UTC) rather than once.")
@click.option(
    "--spread",
    default=1,
    show_default=True,
    type=click.IntRange(1),
    metavar="N",
    help="Send it to N workers, which share its branches through the store.",
)
@click.option("--wait", is_flag=True, help="Follow the run; exit as `run` would.")
@report_option
@answers_errors
def submit_command(
    recipe: str,
    store_url: str | None,
    overrides: tuple[str, ...],
    only: tuple[str, ...],
    pool: str,
    device: str,
    priority: str,
    deadline: float | None,
    budget: float | None,
    cron: str | None,
    spread: int,
    wait: bool,
    report_folder: str | None,
) -> None:
    """Send RECIPE to the server at PREFECT_API_URL, where a worker runs it, again if need be."""
    from .overview import starts_worker
    from .submit import follow, record_of, submit

    if cron and wait:
        raise ColdpressError("--wait follows one run, and --cron makes a schedule; leave one of them out")
    if cron and spread > 1:
        raise ColdpressError("--spread is for one run, and --cron makes a schedule; leave one of them out")

    store = open_store(store_url)
    submitted = submit(
        recipe,
        store,
        overrides=overrides,
        only=only,
        pool=pool,
        device=device,
        priority=priority,
        deadline=deadline,
        budget=budget,
        cron=cron,
        spread=spread,
    )
    click.echo(f"{'schedule' if cron else 'run'} {submitted.run}, on the server {submitted.id}")
    if submitted.url:
        click.echo(submitted.url)
    if submitted.idle:
        click.echo(f"nothing starts it yet: pool {pool} has no worker; {starts_worker(pool)}", err=True)
    if not wait:
        return
    try:
        ended = follow(submitted, lambda line: click.echo(line, err=True))
    except KeyboardInterrupt:
        click.echo("the run goes on without being watched", err=True)
        sys.exit(130)
    document = record_of(store, submitted.run)
    if document is not None:
        from ..tasks.reporting.report import write_report
        from .terminal import print_results

        document["report"] = write_report(document, report_folder or os.path.join("reports", document["recipe"]))
        print_results(document)
    sys.exit(0 if ended == "Completed" else 1)


@click.command("prepare")
@click.option("--pool", "pools", multiple=True, metavar="NAME", help="Give this work pool queues for --priority.")
@heartbeat_option
@click.option("--webhook", metavar="URL", help="Call this address when a run fails, or is interrupted too often.")
@click.option("--mail", metavar="URL", help="Send mail then, by mailtos://USER:PASSWORD@SERVER?to=ADDRESS.")
@click.option(
    "--interruptions", default=3, show_default=True, type=click.IntRange(1), help="How often within a day is too often."
)
@answers_errors
def prepare_command(
    pools: tuple[str, ...], heartbeat: int, webhook: str | None, mail: str | None, interruptions: int
) -> None:
    """Tell the server at PREFECT_API_URL how interrupted runs go on (`up` does that itself), and whom to notify."""
    from .cli_runs import asking_the_server
    from .deployment import prepare_automations, prepare_queues
    from .notify import notify_by_mail, notify_by_webhook

    with asking_the_server() as client:
        for pool in pools:
            prepare_queues(client, pool)
        prepare_automations(client, heartbeat, scheduling=bool(pools))
        if webhook:
            notify_by_webhook(client, webhook, interruptions)
        if mail:
            notify_by_mail(client, mail, interruptions)
    click.echo("the server is prepared")


SERVER_COMMANDS = (up_command, submit_command, prepare_command)
