"""Canonical JSON, digests, and records that carry their own checksum."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from coldpress.storage.digests import canonical_json, digest_of, digest_of_file, seal, sha256, total_bytes, unseal
from coldpress.storage.errors import DamagedBlob
from hypothesis import given, settings
from hypothesis import strategies as st

SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
VALUES: st.SearchStrategy[Any] = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4), max_leaves=12
)
RECORDS = st.dictionaries(st.text().filter(lambda name: name != "checksum"), VALUES, max_size=4)


def reversed_order(value: Any) -> Any:
    """The value with the keys of each of its objects put in the other way round."""
    if isinstance(value, dict):
        return {name: reversed_order(value[name]) for name in reversed(value)}
    return [reversed_order(item) for item in value] if isinstance(value, list) else value


def unsealed(data: bytes | bytearray) -> dict[str, Any] | None:
    """The record in the bytes, None when they are damaged."""
    try:
        return unseal(data, "here")
    except DamagedBlob:
        return None


@settings(deadline=None)
@given(VALUES)
def test_canonical_json_is_read_back_as_the_same_value(value: Any) -> None:
    assert json.loads(canonical_json(value)) == value


@settings(deadline=None)
@given(VALUES)
def test_the_order_of_keys_does_not_matter(value: Any) -> None:
    assert canonical_json(reversed_order(value)) == canonical_json(value)


def test_canonical_json_is_pinned_to_the_byte() -> None:
    value = {"é": [1, 2.5, None, True], "a": {"c": "x\n", "b": -0.1}}
    expected = '{"a":{"b":-0.1,"c":"x\\n"},"é":[1,2.5,null,true]}'.encode()
    assert canonical_json(value) == expected
    assert digest_of(value) == hashlib.sha256(expected).hexdigest()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), [-float("inf")]], ids=str)
def test_numbers_that_json_lacks_are_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical_json(value)


@pytest.mark.parametrize("value", [b"bytes", {1, 2}, {"when": object()}, 1j], ids=lambda value: type(value).__name__)
def test_types_that_json_lacks_are_refused(value: Any) -> None:
    with pytest.raises(TypeError):
        canonical_json(value)


@pytest.mark.parametrize("value", [{1: "a"}, {"blocks": {True: "a"}}, [{None: "a"}]], ids=str)
def test_keys_that_are_not_strings_are_refused(value: Any) -> None:
    with pytest.raises(TypeError):
        canonical_json(value)


def test_numbers_that_differ_only_in_type_have_different_digests() -> None:
    assert len({digest_of(value) for value in (1, 1.0, True, "1")}) == 4


def test_buffers_are_hashed_as_if_they_were_one() -> None:
    assert sha256(b"cold", bytearray(b"pre"), memoryview(b"ss")) == hashlib.sha256(b"coldpress").hexdigest()


def test_buffers_are_measured_in_bytes_whatever_their_items_are() -> None:
    assert total_bytes([b"abc", memoryview(bytes(16)).cast("H"), bytearray()]) == 19


def test_a_file_has_the_digest_of_its_content(tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(b"coldpress" * 100_000)
    assert digest_of_file(str(tmp_path / "weights")) == sha256(b"coldpress" * 100_000)


@settings(deadline=None)
@given(RECORDS)
def test_a_sealed_record_is_read_back_as_the_same_record(record: dict[str, Any]) -> None:
    assert unseal(seal(record), "here") == record


@settings(deadline=None, max_examples=300)
@given(RECORDS, st.floats(0, 1, exclude_max=True), st.integers(1, 255))
def test_a_changed_byte_in_a_record_is_found_or_changes_nothing(
    record: dict[str, Any], where: float, change: int
) -> None:
    data = bytearray(seal(record))
    data[int(where * len(data))] ^= change
    # What is not found is white space, or another way to write the same number or letter.
    assert unsealed(data) in (None, record)


@settings(deadline=None)
@given(RECORDS, st.floats(0, 1, exclude_max=True))
def test_a_record_cut_short_is_found(record: dict[str, Any], where: float) -> None:
    data = seal(record)
    with pytest.raises(DamagedBlob):
        unseal(data[: int(where * len(data))], "here")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"null",
        b"[]",
        b"7",
        b'"checksum"',
        b"{}",
        b'{"checksum": 7}',
        b'{"seconds": 1e999, "checksum": ""}',
        b'{"seconds": NaN, "checksum": ""}',
        b'{"name": "\\ud800", "checksum": ""}',
        b"\xff\xfe",
        bytes(200),
    ],
)
def test_whatever_is_not_a_sealed_record_is_called_damaged(data: bytes) -> None:
    with pytest.raises(DamagedBlob, match="here is damaged"):
        unseal(data, "here")
