"""Fixtures of the storage tests: a store in a folder, in memory and on S3, and a second look at the same place."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from coldpress.storage.files import Files, open_files
from coldpress.storage.store import Store


@pytest.fixture
def folder(tmp_path: Path) -> str:
    """Where a local store can be made; it doesn't exist yet."""
    return str(tmp_path / "store")


@pytest.fixture(params=["folder", "memory", "s3"])
def url(request: pytest.FixtureRequest, folder: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A store URL of each kind, used by nobody else, without a cache that would hide what is there."""
    if request.param == "folder":
        yield folder
        return
    if request.param == "s3":
        monkeypatch.setenv("COLDPRESS_CACHE_GB", "0")
        yield request.getfixturevalue("s3_url")
        return
    root = f"memory://{uuid.uuid4().hex}"
    yield root
    left = open_files(root)
    for path, _ in list(left.list("")):
        left.delete(path)


@pytest.fixture
def files(url: str) -> Files:
    return open_files(url)


@pytest.fixture
def store(url: str) -> Store:
    return Store(url)


@pytest.fixture
def reopen(url: str) -> Callable[[], Store]:
    """Opens the store of this test afresh, as a later process would: nothing is remembered as seen or verified."""
    return lambda: Store(url)
