"""The local copy of a remote store's blobs: what it saves, and that nothing wrong with it costs more than time."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import fsspec
import pytest
from coldpress.storage.cache import BlobCache
from coldpress.storage.digests import sha256
from coldpress.storage.errors import DamagedBlob, StoreError
from coldpress.storage.store import Store, blob_path
from sabotage import FailingOs, flip, paths

from tests.faults.flaky_proxy import FlakyProxy

CONTENT = b"coldpress" * 1000
BLOB = sha256(CONTENT)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the cache is."""
    monkeypatch.setenv("COLDPRESS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def reopen(proxy: FlakyProxy, s3_url: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Store]:
    """Opens a store on S3 afresh, as another process would; the proxy counts what is asked of it."""
    monkeypatch.setitem(fsspec.config.conf, "s3", {"endpoint_url": proxy.url})
    return lambda: Store(s3_url)


def blob_of(number: int, size: int = 1000) -> tuple[str, bytes]:
    data = number.to_bytes(4, "big") * (size // 4)
    return sha256(data), data


def kept(folder: Path) -> set[str]:
    """The digests of the blobs in a cache."""
    return {path.parent.name + path.name for path in folder.glob("blobs/sha256/*/*")}


# Before a store


def test_what_was_written_here_is_read_without_asking_the_store(reopen: Callable[[], Store], proxy: FlakyProxy) -> None:
    reopen().put_blob([CONTENT])
    assert reopen().read_blob(BLOB) == CONTENT
    assert proxy.count("GET", "/blobs/") == 0


def test_what_was_written_elsewhere_is_fetched_once(
    reopen: Callable[[], Store], proxy: FlakyProxy, folder: Path, tmp_path: Path
) -> None:
    reopen().put_blob([CONTENT])
    folder.rename(tmp_path / "elsewhere")
    for _ in range(3):
        assert reopen().read_blob(BLOB) == CONTENT
    assert proxy.count("GET", "/blobs/") == 1


def test_a_damaged_copy_is_dropped_and_fetched_anew(
    reopen: Callable[[], Store], proxy: FlakyProxy, folder: Path
) -> None:
    reopen().put_blob([CONTENT])
    for spoilt in (CONTENT[:-1], b"", CONTENT[:-1] + b"!"):
        (folder / blob_path(BLOB)).write_bytes(spoilt)
        assert reopen().read_blob(BLOB) == CONTENT
        assert (folder / blob_path(BLOB)).read_bytes() == CONTENT
    assert proxy.count("GET", "/blobs/") == 3


def test_a_damaged_stored_blob_is_moved_aside_and_not_cached(reopen: Callable[[], Store], folder: Path) -> None:
    reopen().put_blob([CONTENT])
    (folder / blob_path(BLOB)).unlink()
    store = reopen()
    flip(store, blob_path(BLOB))
    with pytest.raises(DamagedBlob, match=f"blob {BLOB} in .* was damaged"):
        store.read_blob(BLOB)
    assert paths(store, "blobs") == []
    assert kept(folder) == set()


def test_a_hit_is_not_proven_by_the_cache(reopen: Callable[[], Store]) -> None:
    store = reopen()
    blob, size = store.put_blob([CONTENT])
    store.files.delete(blob_path(BLOB))
    assert store.missing_blobs({blob: size}) == [BLOB]


@pytest.mark.parametrize("call", ["write", "replace"])
def test_a_full_disk_under_the_cache_is_said_once_and_costs_no_more(
    reopen: Callable[[], Store], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, call: str
) -> None:
    store = reopen()
    monkeypatch.setattr("coldpress.storage.files.os", FailingOs(call, 1, errno.ENOSPC))
    for number in range(3):
        blob, data = blob_of(number)
        store.put_blob([data])
        assert store.read_blob(blob) == data
    (record,) = caplog.records
    assert "is used no further, blobs come from the store: the disk is full" in record.message


def test_a_cache_folder_that_cannot_be_made_costs_no_more(
    reopen: Callable[[], Store], folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder.write_text("a file")
    store = reopen()
    store.put_blob([CONTENT])
    assert store.read_blob(BLOB) == CONTENT
    assert len(caplog.records) == 1


def test_stores_that_are_near_have_no_cache(tmp_path: Path) -> None:
    assert Store(str(tmp_path / "store")).cache is None
    assert Store("memory://near").cache is None


# By itself


def test_the_cache_is_where_caches_are_unless_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLDPRESS_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cache = BlobCache.from_environment()
    assert cache is not None
    cache.put(BLOB, [CONTENT])
    assert kept(tmp_path / "coldpress") == {BLOB}


def test_no_gigabytes_are_no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLDPRESS_CACHE_GB", "0")
    assert BlobCache.from_environment() is None


@pytest.mark.parametrize("text", ["much", "-1", "inf", "nan"])
def test_a_limit_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("COLDPRESS_CACHE_GB", text)
    with pytest.raises(StoreError, match=f"COLDPRESS_CACHE_GB is '{text}'; write a number of gigabytes"):
        BlobCache.from_environment()


def test_above_the_limit_those_unused_longest_go(folder: Path) -> None:
    cache = BlobCache(str(folder), 10_000)
    blobs = dict(blob_of(number) for number in range(9))
    for age, (blob, data) in enumerate(blobs.items()):
        cache.put(blob, [data])
        os.utime(folder / blob_path(blob), (age, age))
    first, second, *others = blobs
    assert cache.get(first) == blobs[first]  # used just now
    new = dict(blob_of(number) for number in (100, 101))
    for blob, data in new.items():
        cache.put(blob, [data])
    assert kept(folder) == {first, *others[1:], *new}
    assert second not in kept(folder)


def test_a_blob_larger_than_the_limit_is_not_kept(folder: Path) -> None:
    cache = BlobCache(str(folder), 999)
    blob, data = blob_of(0)
    cache.put(blob, [data])
    assert cache.get(blob) is None
    assert kept(folder) == set()


def test_what_killed_writers_left_is_removed_after_a_day(folder: Path) -> None:
    (folder / "tmp").mkdir(parents=True)
    old, young = folder / "tmp" / "old", folder / "tmp" / "young"
    for path in (old, young):
        path.write_bytes(b"half")
    os.utime(old, (time.time() - 90_000,) * 2)
    BlobCache(str(folder), 10_000).put(BLOB, [CONTENT])
    assert not old.exists()
    assert young.exists()


def test_processes_can_share_a_cache_that_is_too_small_for_them(folder: Path) -> None:
    limit = 20_000
    script = str(Path(__file__).with_name("cache_sharer.py"))
    sharers = [
        subprocess.Popen([sys.executable, script, str(folder), str(limit), str(seed)], stdout=subprocess.PIPE)
        for seed in range(3)
    ]
    for sharer in sharers:
        output, _ = sharer.communicate(timeout=60)
        assert output.split() == [b"all", b"whole"]
    assert sum(path.stat().st_size for path in folder.glob("blobs/sha256/*/*")) <= limit * 1.2
    assert list(folder.glob("tmp/*")) == []
