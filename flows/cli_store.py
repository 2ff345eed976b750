"""The commands that look after a store: what is in it, whether it is sound, what can go."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import click

from .command import answers_errors, open_store, store_option


@click.command("ls")
@store_option
@click.option("--json", "as_json", is_flag=True, help="One JSON document on standard output.")
@answers_errors
def list_refs(store_url: str | None, as_json: bool) -> None:
    """List the results that have names."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    store = open_store(store_url)
    refs = sorted(store.refs().items())
    if as_json:
        click.echo(json.dumps({name: {"kind": a.kind, "artifact": a.id} for name, a in refs}, indent=2))
        return
    if not refs:
        click.echo(f"{store.url} holds nothing yet")
        return
    table = Table()
    for title in ("name", "kind", "artifact"):
        table.add_column(title, overflow="fold")  # names of a matrix differ at their ends
    table.add_column("size", justify="right")
    for name, artifact in refs:
        size = f"{store.manifest(artifact).stored_bytes() / 1e6:.1f} MB" if store.holds(artifact) else "damaged"
        table.add_row(escape(name), artifact.kind, artifact.short, size)
    Console(width=None if sys.stdout.isatty() else 120).print(table)


@click.command()
@click.argument("ref")
@store_option
@answers_errors
def show(ref: str, store_url: str | None) -> None:
    """Show an artifact (a name, an id or its beginning) and how it came about, as JSON."""
    store = open_store(store_url)
    artifact = store.resolve(ref)
    manifest = store.manifest(artifact)
    made_by = [action for action in store.actions() if action.artifact.id == artifact.id]
    document: dict[str, Any] = {
        "artifact": artifact.id,
        "kind": artifact.kind,
        "format": manifest.format,
        "quantization": manifest.quantization,
        "base": manifest.base,
        "tensors": len(manifest.tensors),
        "masks": len(manifest.masks),
        "files": sorted(manifest.files),
        "stored_bytes": manifest.stored_bytes(),
        "made_by": [{"preimage": action.preimage, "provenance": action.provenance} for action in made_by],
    }
    if "metrics.json" in manifest.files:
        document["metrics"] = json.loads(store.read_file(artifact, "metrics.json"))
    click.echo(json.dumps(document, indent=2))


@click.command()
@click.argument("ref")
@click.argument("folder", type=click.Path())
@click.option(
    "--format",
    type=click.Choice(["compressed-tensors"]),
    help="Convert a checkpoint that rtn, gptq or awq quantized; without it folders hold what is stored.",
)
@click.option("--check", is_flag=True, help="load it in a fresh process without coldpress, and compare logits")
@store_option
@answers_errors
def export(ref: str, folder: str, format: str | None, check: bool, store_url: str | None) -> None:
    """Write a checkpoint as a plain Hugging Face folder, or an adapter as a folder for PEFT.

    With --check the exit status is 1 if the logits differ.
    """
    from ..storage.export import export as write

    store = open_store(store_url)
    artifact = store.resolve(ref)
    contents = None
    if format is not None:
        from ..tasks.quantization.compressed_tensors_format import contents as converted

        contents = converted(store, artifact)
    for name in write(store, artifact, folder, contents):
        click.echo(os.path.join(folder, name))
    if base := store.manifest(artifact).base:
        click.echo(f"the adapter of checkpoint {base[:12]}; export that too, to load them together", err=True)
    if check:
        from ..tasks.evaluation.exported import check_export

        found = check_export(store, artifact, os.path.abspath(folder), format)
        click.echo(
            f"loaded without coldpress: logits {'agree' if found.agrees else 'DIFFER'}, by {found.difference:.4f} on "
            f"average (their standard deviation is {found.deviation:.2f}); the most likely next token is the same for "
            f"{found.same} of {found.tokens}"
        )
        if not found.agrees:
            sys.exit(1)


@click.command()
@store_option
@answers_errors
def verify(store_url: str | None) -> None:
    """Hash everything in the store; report what is damaged and who needs it. Exit status 1 if something is."""
    from rich.console import Console
    from rich.progress import Progress

    from ..storage.inspect import verify as check

    store = open_store(store_url)
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("hashing blobs", total=None)
        findings = check(store, lambda done, total: bar.update(task, completed=done, total=total))
    for finding in findings:
        needed = f" (needed by {', '.join(finding.needed_by)})" if finding.needed_by else ""
        click.echo(f"{finding.path}: {finding.problem}{needed}")
    if findings:
        click.echo(f"{len(findings)} problems in {store.url}; running the recipes again recomputes what is gone")
        sys.exit(1)
    click.echo(f"{store.url} is sound")


@click.command()
@store_option
@answers_errors
def du(store_url: str | None) -> None:
    """How much room the store takes, and how much sharing saves."""
    from ..storage.inspect import usage

    used = usage(open_store(store_url))
    click.echo(f"{used.artifacts} artifacts, {used.logical / 1e6:.1f} MB if each were stored alone")
    click.echo(f"{used.blobs} blobs, {used.stored / 1e6:.1f} MB stored")
    click.echo(f"{used.unreferenced / 1e6:.1f} MB belong to no artifact")


@click.command()
@click.argument("ref")
@store_option
@answers_errors
def pin(ref: str, store_url: str | None) -> None:
    """Have gc keep an artifact (a name, an id or its beginning), whatever its names point at later."""
    store = open_store(store_url)
    artifact = store.resolve(ref)
    store.pin(artifact)
    click.echo(f"pinned {artifact.kind} {artifact.id}")


@click.command()
@click.argument("ref")
@store_option
@answers_errors
def unpin(ref: str, store_url: str | None) -> None:
    """Take a pin away."""
    store = open_store(store_url)
    artifact = store.resolve(ref)
    store.unpin(artifact)
    click.echo(f"unpinned {artifact.kind} {artifact.id}")


@click.command()
@click.argument("names", nargs=-1, required=True)
@store_option
@answers_errors
def rm(names: tuple[str, ...], store_url: str | None) -> None:
    """Forget NAMES, which may hold wildcards ('sweep/*'). Results stay until gc finds nothing else that needs them."""
    import fnmatch

    from ..storage.errors import StoreError

    store = open_store(store_url)
    refs = store.refs()
    for name in names:
        chosen = fnmatch.filter(refs, name)
        if not chosen:
            raise StoreError(f"nothing in {store.url} is called '{name}'; `coldpress ls` shows what is there")
        for ref in chosen:
            store.delete_ref(ref)
            click.echo(f"forgot {ref}")


@click.command()
@store_option
@click.option("--delete", is_flag=True, help="Delete; without it only say what would go.")
@click.option(
    "--keep-runs", default=30.0, show_default=True, metavar="DAYS", help="Keep the results of runs of the last days."
)
@click.option(
    "--grace", default=24.0, show_default=True, metavar="HOURS", help="Keep what was written or used more recently."
)
@answers_errors
def gc(store_url: str | None, delete: bool, keep_runs: float, grace: float) -> None:
    """Free room: delete what no name, pin, recent run, running job or unfinished stage needs. Dry run by default."""
    from ..storage.gc import DAY, HOUR, REASONS, delete_garbage, find_garbage

    store = open_store(store_url)
    garbage = find_garbage(store, keep_runs=keep_runs * DAY, grace=grace * HOUR)
    if delete:
        garbage = delete_garbage(store, garbage, grace=grace * HOUR)
    for reason in REASONS:
        sizes = [one.size for one in garbage if one.reason == reason]
        if sizes:
            click.echo(f"{sum(sizes) / 1e6:10.1f} MB  {len(sizes):6} files  {reason}")
    total = sum(one.size for one in garbage)
    if delete:
        click.echo(f"{total / 1e6:10.1f} MB  {len(garbage):6} files  deleted from {store.url}")
    else:
        click.echo(f"{total / 1e6:10.1f} MB  {len(garbage):6} files  would go from {store.url}; `gc --delete` does it")


STORE_COMMANDS = (list_refs, show, export, verify, du, gc, rm, pin, unpin)
