"""Texts in: documents of a source, dealt into splits.

Sources without splits of their own (local files, `python-docs`) are dealt block by block: every fourth block is
"test", the rest is "train"; "all" is everything. The deal depends on the text alone, not on a seed, so that
calibration windows of any seed never overlap held-out ones.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from .locate import Located, SourceError, file_digest, hub_commit, locate

PYTHON_DOCS = "python-docs"
DEALT_SPLITS = ("train", "test", "all")
# Characters of the pieces in which running text is dealt.
BLOCK_CHARACTERS = 4000
TEST_EVERY = 4

Piece = TypeVar("Piece")


def text_content(source: str, revision: str | None, name: str | None) -> dict[str, Any]:
    """The content id of a text source."""
    if source == PYTHON_DOCS:
        return {"python-docs": file_digest(_topics_file())}
    located = _locate_text(source)
    if located.kind == "hub":
        return {"dataset": source, "name": name, "commit": hub_commit(source, revision, "dataset")}
    return {"jsonl" if _is_json_lines(located.path) else "text": file_digest(located.path)}


def text_bytes(source: str, split: str) -> int | None:
    """An upper bound of the split's size in bytes, None when only loading would tell."""
    if source == PYTHON_DOCS:
        size = os.path.getsize(_topics_file())
    else:
        located = _locate_text(source)
        if located.kind == "hub":
            return None
        size = os.path.getsize(located.path)
    return size


def check_text(source: str, split: str, *, of_records: bool = False) -> None:
    """Errors of a text source that show without reading it. of_records: whether it must have prompts and responses."""
    if source != PYTHON_DOCS:
        located = _locate_text(source)
        if located.kind == "hub":
            return
        if located.path.endswith((".parquet", ".csv", ".arrow", ".zip", ".gz")):
            raise SourceError(f"{source} is not plain text or jsonl; convert it, or name a Hub data set")
    if of_records and (source == PYTHON_DOCS or not _is_json_lines(located.path)):
        raise SourceError(
            f"{source} is running text without prompts and responses; name a jsonl file or a Hub data set, or drop "
            "prompt, response and template"
        )
    if split not in DEALT_SPLITS:
        raise SourceError(f"split {split!r} is none of {', '.join(DEALT_SPLITS)}, which {source} can be dealt into")


def documents(source: str, split: str, field: str, name: str | None, revision: str | None) -> Iterator[str]:
    """The documents of a split, in a fixed order. Raises SourceError."""
    check_text(source, split)
    if source == PYTHON_DOCS:
        yield from _dealt(_running_blocks(_python_docs()), split)
        return
    located = _locate_text(source)
    if located.kind == "hub" or _is_json_lines(located.path):
        for record in _records(located, source, split, name, revision):
            yield record.text(field, "set `field:`")
    else:
        with open(located.path, encoding="utf-8") as file:
            try:
                text = file.read()
            except UnicodeDecodeError as error:
                raise SourceError(f"{located.path} is not UTF-8 text: {error}") from error
        yield from [text] if split == "all" else _dealt(_running_blocks([text]), split)


def records(
    source: str,
    split: str,
    fields: Sequence[str],
    name: str | None,
    revision: str | None,
    *,
    optional: frozenset[str] = frozenset(),
) -> Iterator[dict[str, str]]:
    """These text fields of a split's records, in a fixed order; optional ones are empty where there are none.

    Raises SourceError.
    """
    check_text(source, split, of_records=True)
    for record in _records(_locate_text(source), source, split, name, revision):
        yield {
            field: "" if field in optional and record.value_of(field) is None else record.text(field, _RECORDS_ADVICE)
            for field in fields
        }


_RECORDS_ADVICE = "set `prompt:` and `response:` to the fields that hold them"


@dataclass(frozen=True)
class _Record:
    """A line of a jsonl file or a row of a data set. place: how errors call it."""

    place: str
    value: Any

    def value_of(self, field: str) -> Any:
        return self.value.get(field) if isinstance(self.value, dict) else None

    def text(self, field: str, advice: str) -> str:
        """The text of a field. Raises SourceError."""
        text = self.value_of(field)
        if not isinstance(text, str):
            has = ", ".join(self.value) if isinstance(self.value, dict) else type(self.value).__name__
            raise SourceError(f"{self.place} has no text field {field!r} (it has: {has}); {advice}")
        return text


def _records(located: Located, source: str, split: str, name: str | None, revision: str | None) -> Iterator[_Record]:
    if located.kind == "hub":
        return _hub_records(source, split, name, revision)
    return _dealt(_json_lines(located.path), split)


def _is_json_lines(path: str) -> bool:
    return path.endswith((".jsonl", ".ndjson"))


def _locate_text(source: str) -> Located:
    located = locate(source)
    if located.kind == "folder":
        raise SourceError(f"{source} is a folder; name a text or jsonl file, a Hub data set, or {PYTHON_DOCS}")
    return located


def _topics_file() -> str:
    import pydoc_data.topics

    return str(pydoc_data.topics.__file__)


def _python_docs() -> list[str]:
    """The language reference that every CPython carries, one text for each topic."""
    from pydoc_data.topics import topics

    return [topics[name] for name in sorted(topics)]


def _running_blocks(texts: Iterable[str]) -> Iterator[str]:
    """Texts cut at blank lines into blocks of about `BLOCK_CHARACTERS`."""
    gathered: list[str] = []
    size = 0
    for text in texts:
        for paragraph in text.split("\n\n"):
            gathered.append(paragraph)
            size += len(paragraph)
            if size >= BLOCK_CHARACTERS:
                yield "\n\n".join(gathered)
                gathered, size = [], 0
    if gathered:
        yield "\n\n".join(gathered)


def _dealt(pieces: Iterable[Piece], split: str) -> Iterator[Piece]:
    for index, piece in enumerate(pieces):
        is_test = index % TEST_EVERY == TEST_EVERY - 1
        if split == "all" or is_test == (split == "test"):
            yield piece


def _json_lines(path: str) -> Iterator[_Record]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            place = f"{path} line {number}"
            try:
                yield _Record(place, json.loads(line.decode("utf-8")))
            except UnicodeDecodeError as error:
                raise SourceError(f"{place} is not UTF-8 text: {error}") from error
            except ValueError as error:
                raise SourceError(f"{place} is not JSON: {error}") from error


def _hub_records(source: str, split: str, name: str | None, revision: str | None) -> Iterator[_Record]:
    import datasets

    try:
        commit = hub_commit(source, revision, "dataset")
        loaded = datasets.load_dataset(source, name, split=split, revision=commit, streaming=True)
    except (ValueError, OSError, datasets.exceptions.DatasetsError) as error:
        raise SourceError(f"could not load split {split!r} of data set {source!r}: {error}") from error
    for record in loaded:
        yield _Record(f"data set {source!r}", record)
