"""`python -m tests.bench [NAME...]`: run benchmarks, print one table.

Exit status: 0 also when a bound is missed, for these are measurements; 1 when a benchmark could not be carried out.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from . import allocation, cached, gptq, journal, memory, perplexity, sparsegpt, store, team, training, wanda
from .measuring import ProcessFailed, Row, in_fresh_process

BENCHMARKS = {
    "wanda": wanda,
    "sparsegpt": sparsegpt,
    "allocation": allocation,
    "gptq": gptq,
    "perplexity": perplexity,
    "journal": journal,
    "training": training,
    "memory": memory,
    "store": store,
    "cached": cached,
    "team": team,
}


def main() -> int:
    """Run what was asked for; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description="Measure coldpress's claims.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"which of {', '.join(BENCHMARKS)}; all by default")
    names = parser.parse_args().names or list(BENCHMARKS)
    unknown = [name for name in names if name not in BENCHMARKS]
    if unknown:
        parser.error(f"there is no benchmark '{unknown[0]}'; there are {', '.join(BENCHMARKS)}")

    progress = Console(stderr=True)
    rows: dict[str, list[Row]] = {}
    failed = []
    with tempfile.TemporaryDirectory(prefix="coldpress-bench-") as folder:
        _keep_to(folder)
        for name in names:
            began = time.monotonic()
            progress.print(f"measuring {name} …", highlight=False)
            os.mkdir(os.path.join(folder, name))
            os.chdir(os.path.join(folder, name))
            try:
                rows[name] = [Row(**row) for row in in_fresh_process(BENCHMARKS[name].measure)]
            except ProcessFailed as error:
                failed.append(name)
                progress.print(f"{name} failed: {error}", style="red", markup=False, highlight=False)
            progress.print(f"{name} took {time.monotonic() - began:.0f} s", highlight=False)
        os.chdir("/")
    _report(rows, failed)
    return 1 if failed else 0


def _keep_to(folder: str) -> None:
    """Make this process's children write caches, temporary and home files into `folder`, and talk to nobody."""
    for name in ("HOME", "TMPDIR", "XDG_CACHE_HOME", "HF_HOME", "PREFECT_HOME"):
        path = os.path.join(folder, name.lower())
        os.mkdir(path)
        os.environ[name] = path
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE", "DO_NOT_TRACK"):
        os.environ[name] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["PREFECT_SERVER_ANALYTICS_ENABLED"] = "false"
    for name in ("COLDPRESS_STORE", "PREFECT_API_URL", "PREFECT_PROFILE", "PREFECT_PROFILES_PATH"):
        os.environ.pop(name, None)


def _report(rows: dict[str, list[Row]], failed: list[str]) -> None:
    console = Console(width=None if sys.stdout.isatty() else 150)
    table = Table(title=_machine())
    for title in ("benchmark", "claim", "measured", "bound", "", "how"):
        table.add_column(title, justify="right" if title in ("measured", "bound") else "left")
    missed = []
    for name, entries in rows.items():
        for number, row in enumerate(entries):
            if not row.met:
                missed.append(row)
            verdict = "" if row.bound is None else "[green]ok[/]" if row.met else "[bold red]NOT OK[/]"
            bound = "" if row.bound is None else f"<= {row.bound:g} {row.unit}"
            first = name if number == 0 else ""
            value = f"{row.value:.3f} {row.unit}"
            table.add_row(first, escape(row.claim), value, bound, verdict, escape(row.detail))
        table.add_section()
    for name in failed:
        table.add_row(name, "could not be measured", "", "", "[bold red]FAILED[/]", "")
    console.print(table)
    for row in missed:
        console.print(
            f"[bold red]BOUND MISSED:[/] {escape(row.claim)}: {row.value:.3f} {row.unit}, bound {row.bound:g}"
        )
    if not missed and not failed:
        console.print("[green]every bound is kept[/]")


def _machine() -> str:
    load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "gptqmodel", "prefect"))
    return f"{_processor()}, {os.cpu_count()} cores{load}; Python {platform.python_version()}, {versions}"


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        return platform.machine()
    return platform.machine()


if __name__ == "__main__":
    sys.exit(main())
