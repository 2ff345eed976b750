"""What all commands share: how errors are answered, which store they work on, and options that several take."""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Callable
from typing import Any

import click

from ..storage.errors import ColdpressError


def answers_errors(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapped(*arguments: Any, **keywords: Any) -> Any:
        try:
            return function(*arguments, **keywords)
        except ColdpressError as error:
            for line in str(error).splitlines():
                click.echo(f"error: {line}", err=True)
            sys.exit(2)
        except KeyboardInterrupt:
            click.echo(
                "interrupted: all finished work is kept; the same command goes on from there",
                err=True,
            )
            sys.exit(130)

    return wrapped


store_option = click.option(
    "--store", "store_url", metavar="URL", help="Folder or fsspec URL. [default: $COLDPRESS_STORE or .coldpress]"
)


set_option = click.option(
    "--set", "overrides", multiple=True, metavar="PATH=VALUE", help="Change the recipe: stages.pruned.sparsity=0.6"
)
only_option = click.option(
    "--only", multiple=True, metavar="NAME", help="Only this stage, what it needs, and its evaluations."
)
device_option = click.option(
    "--device", default="auto", show_default=True, help="cpu, cuda, cuda:1 …; auto takes CUDA where there is some."
)


class Duration(click.ParamType):
    """Seconds, written as 90s, 30m, 2h or 1d."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        found = re.fullmatch(r"([0-9]*\.?[0-9]+)([smhd])", str(value))
        if found is None or float(found[1]) == 0:
            self.fail(f"{value!r} is no duration; write it as 90s, 30m, 2h or 1d", param, ctx)
        return float(found[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86400}[found[2]]


deadline_option = click.option(
    "--deadline", type=Duration(), metavar="2h", help="Stop after this time (90s, 30m, 2h, 1d), with all work kept."
)
budget_option = click.option(
    "--budget",
    type=Duration(),
    metavar="12h",
    help="Stop when stages have had devices for this time (30m, 12h, 2d), over all attempts, with all work kept.",
)
slots_option = click.option(
    "--slots",
    type=click.IntRange(1),
    envvar="COLDPRESS_SLOTS",
    metavar="N",
    help="Compute N stages at the same time. [default: $COLDPRESS_SLOTS, or 1, or the number of devices]",
)
devices_option = click.option(
    "--devices",
    envvar="COLDPRESS_DEVICES",
    metavar="0,1",
    help="CUDA devices to share with other runs, a stage on each. [default: $COLDPRESS_DEVICES]",
)
report_option = click.option(
    "--report", "report_folder", metavar="DIR", help="Where the report goes. [default: reports/<recipe>]"
)


def open_store(url: str | None) -> Any:
    from ..storage.store import Store

    return Store(url) if url else Store.default()
