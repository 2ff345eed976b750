"""Digests: one canonical way to turn values into bytes, and bytes into a SHA-256.

Keys and ids are SHA-256 over canonical JSON: keys sorted, no spaces, UTF-8, no NaN or infinity, and only
JSON's own types, so the same value gives the same digest in every process and Python version.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Any

from .errors import DamagedBlob

Buffer = bytes | bytearray | memoryview

CHECKSUM = "checksum"


def canonical_json(value: Any) -> bytes:
    """`value` as canonical JSON. Raises TypeError for what JSON lacks, ValueError for NaN and infinity."""
    _refuse_other_keys(value)
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def _refuse_other_keys(value: Any) -> None:
    if isinstance(value, dict):
        for name, item in value.items():
            if not isinstance(name, str):
                raise TypeError(f"{name!r} can't be a key in JSON; only strings can")
            _refuse_other_keys(item)
    elif isinstance(value, list | tuple):
        for item in value:
            _refuse_other_keys(item)


def sha256(*buffers: Buffer) -> str:
    """Hexadecimal SHA-256 of the concatenated buffers."""
    digest = hashlib.sha256()
    for buffer in buffers:
        digest.update(buffer)
    return digest.hexdigest()


def digest_of(value: Any) -> str:
    """Hexadecimal SHA-256 of `value` as canonical JSON."""
    return sha256(canonical_json(value))


def digest_of_file(path: str) -> str:
    """Hexadecimal SHA-256 of a local file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def seal(record: dict[str, Any]) -> bytes:
    """A JSON record with its own checksum, for files whose name doesn't prove their content."""
    return json.dumps({**record, CHECKSUM: digest_of(record)}, sort_keys=True, indent=1, ensure_ascii=False).encode()


def unseal(data: Buffer, where: str) -> dict[str, Any]:
    """The record of `seal`. Raises DamagedBlob, naming `where`, when the checksum doesn't fit."""
    try:
        record = json.loads(bytes(data))
        checksum = record.pop(CHECKSUM)
        expected = digest_of(record)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedBlob(f"{where} is damaged: not a record with a checksum") from error
    if checksum != expected:
        raise DamagedBlob(f"{where} is damaged: its checksum doesn't fit")
    return record


def total_bytes(buffers: Iterable[Buffer]) -> int:
    """How many bytes the buffers hold together."""
    return sum(memoryview(buffer).nbytes for buffer in buffers)
