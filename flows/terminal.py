"""What a person sees while a recipe runs: a live bar for each running stage, a line for each finished one."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

MARKS = {
    "cached": "[cyan]=[/]", "computed": "[green]+[/]", "resumed": "[green]+[/]",
    "pre-empted": "[yellow]~[/]", "failed": "[red]x[/]", "skipped": "[yellow]-[/]",
}  # fmt: skip
# Without a terminal a line is written at most so often for each stage.
SECONDS_BETWEEN_LINES = 20.0


def remaining(seconds: float) -> str:
    """ "4 min left"."""
    if seconds < 90:
        return f"{seconds:.0f} s left"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min left"
    return f"{seconds / 3600:.1f} h left"


class Pace:
    """Estimates the time left from the steps done so far of what a stage is at; each activity has its own pace."""

    def __init__(self) -> None:
        self._start: tuple[float, int] | None = None
        self._at: tuple[str, int] | None = None

    def describe(self, what: str, done: int, total: int) -> str:
        """ "pruning 17/32, 4 min left"; `what` may go on after a comma with a figure that changes."""
        now = time.monotonic()
        at = (what.partition(",")[0], total)
        if self._start is None or at != self._at or done < self._start[1]:
            self._start, self._at = (now, done), at
        began, first = self._start
        text = f"{what} {done}/{total}"
        if done > first and done < total:
            text += ", " + remaining((now - began) / (done - first) * (total - done))
        return text


class Terminal:
    """Thread-safe; writes to standard error, so that standard output stays for results."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._live = console.is_terminal
        self._progress = Progress(
            TextColumn("  [bold]{task.fields[stage]}"),
            BarColumn(bar_width=24),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            console=console,
            transient=True,
        )
        self._lock = threading.Lock()
        self._bars: dict[str, TaskID] = {}
        self._paces: dict[str, Pace] = {}
        self._spoke: dict[str, float] = {}
        self._waits: dict[str, str] = {}

    def __enter__(self) -> Terminal:
        if self._live:
            self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._progress.stop()

    def say(self, text: str) -> None:
        """A line of its own."""
        self.console.print(text, highlight=False)

    def advance(self, stage: str, what: str, done: int, total: int) -> None:
        """Progress of a running stage."""
        with self._lock:
            text = self._paces.setdefault(stage, Pace()).describe(what, done, total)
            if self._live:
                if stage not in self._bars:
                    self._bars[stage] = self._progress.add_task(text, total=total, stage=escape(stage))
                self._progress.update(self._bars[stage], description=text, completed=done, total=total)
            elif time.monotonic() - self._spoke.setdefault(stage, time.monotonic()) > SECONDS_BETWEEN_LINES:
                self._spoke[stage] = time.monotonic()
                self.say(f"  {escape(stage)}: {text}")

    def wait(self, stage: str, why: str, detail: str) -> None:
        """A stage waits: a live line with the detail, and the reason as a line of its own when it changes."""
        with self._lock:
            if self._live:
                if stage not in self._bars:
                    self._bars[stage] = self._progress.add_task(why, total=None, stage=escape(stage))
                self._progress.update(self._bars[stage], description=f"{why} {detail}".strip())
            elif self._waits.get(stage) != why:
                self._waits[stage] = why
                self.say(f"  {escape(stage)}: {why}")

    def finish(self, stage: str, state: str, seconds: float, detail: str = "") -> None:
        """A stage has ended."""
        with self._lock:
            if stage in self._bars:
                self._progress.remove_task(self._bars.pop(stage))
            took = f" in {seconds:.1f} s" if state in ("computed", "resumed") else ""
            words = f": {escape(detail)}" if detail else ""
            self.say(f"{MARKS[state]} [bold]{escape(stage)}[/] {state}{took}{words}")


def print_results(document: Mapping[str, Any]) -> None:
    """The table of `run`, on standard output; `document` is that of `run --json`, with the report's path."""
    from ..tasks.reporting.report import columns, rows

    run = f", run {document['run']}" if document["run"] else ""
    console = Console(width=None if sys.stdout.isatty() else 120)
    titled, cells = columns(document), rows(document)
    widths = [max(map(len, (column.title, *each))) for column, *each in zip(titled, *cells, strict=True)]
    shown = fitting(widths, [column.optional for column in titled], console.width)
    table = Table(title=f"{document['recipe']}{run}", title_justify="left")
    for place in shown:
        justify: Any = titled[place].justify
        table.add_column(titled[place].title, justify=justify, overflow="fold")
    for row in cells:
        table.add_row(*(escape(row[place]) for place in shown))
    if document["variants"]:
        console.print(table)
        if left := [column.title for place, column in enumerate(titled) if place not in shown]:
            console.print(f"in the report also: {', '.join(left)}", highlight=False)
    states = [stage["state"] for stage in document["stages"]]
    counts = ", ".join(f"{states.count(s)} {s}" for s in MARKS if s in states)
    console.print(f"{len(states)} stages: {counts}", highlight=False)
    console.print(f"report: {document['report']}", highlight=False, soft_wrap=True)


def fitting(widths: Sequence[int], optional: Sequence[bool], room: int) -> list[int]:
    """Which columns are shown on `room` characters: those that always are, and of the others the first that fit too."""
    left = room - 1 - sum(width + 3 for width, may_go in zip(widths, optional, strict=True) if not may_go)
    shown = []
    for place, (width, may_go) in enumerate(zip(widths, optional, strict=True)):
        if not may_go or width + 3 <= left:
            shown.append(place)
            left -= width + 3 if may_go else 0
    return shown
