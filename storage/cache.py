"""The local copy of a remote store's blobs: each is fetched once, and what a stage wrote the next one reads from here.

    <folder>/blobs/sha256/ab/cdef…      content, checked against its digest at its first read

Only a convenience: whatever is wrong with the folder (full, read-only, damaged) costs time and never a run. It may be
shared by any number of stores and processes, since a name says its content and files appear whole. Above its limit
those that were unused longest go; processes count only their own writes between looks at the folder, so together
they may exceed it by a twentieth each.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import threading
import time
from collections.abc import Sequence

from .digests import Buffer, sha256, total_bytes
from .errors import StoreError
from .files import LocalFiles

FOLDER, LIMIT = "COLDPRESS_CACHE", "COLDPRESS_CACHE_GB"
_SLACK = 20  # the folder is looked at again after writing this part of the limit
_ABANDONED_SECONDS = 24 * 3600

logger = logging.getLogger("coldpress")


class BlobCache:
    """Blobs in a local folder, at most `limit` bytes of them."""

    def __init__(self, folder: str, limit: int) -> None:
        self._files = LocalFiles(folder, durable=False)  # what a power cut spoils is noticed and fetched again
        self._limit = limit
        self._verified: set[str] = set()
        self._unlooked: float = math.inf  # bytes written since the folder was looked at
        self._works = True
        self._lock = threading.Lock()
        self._evicting = threading.Lock()

    @classmethod
    def from_environment(cls) -> BlobCache | None:
        """The cache of `$COLDPRESS_CACHE` with at most `$COLDPRESS_CACHE_GB` (50) gigabytes; None if that is 0."""
        home = os.environ.get("XDG_CACHE_HOME") or os.path.join("~", ".cache")
        text = os.environ.get(LIMIT, "50")
        try:
            limit = int(float(text) * 1e9)
        except (ValueError, OverflowError):
            limit = -1
        if limit < 0:
            raise StoreError(f"{LIMIT} is {text!r}; write a number of gigabytes, 0 for no cache")
        return cls(os.environ.get(FOLDER) or os.path.join(home, "coldpress"), limit) if limit else None

    def get(self, blob: str) -> memoryview | None:
        """A blob's content, or None. One that does not hash to its name is dropped."""
        try:
            data = self._files.read(_path(blob))
        except FileNotFoundError:
            return None
        except (OSError, StoreError) as error:
            self._give_up(error)
            return None
        self._touch(blob)
        if blob not in self._verified:
            if sha256(data) != blob:
                self._drop(_path(blob))
                return None
            with self._lock:
                self._verified.add(blob)
        return data

    def put(self, blob: str, buffers: Sequence[Buffer]) -> None:
        """Keep a blob's content, whose digest has been checked."""
        size = total_bytes(buffers)
        if not self._works or size > self._limit:
            return
        try:
            if self._files.size(_path(blob)) == size:
                self._touch(blob)
                return
            self._files.replace(_path(blob), buffers)
        except (OSError, StoreError) as error:
            self._give_up(error)
            return
        with self._lock:
            self._unlooked += size
            due = self._unlooked > self._limit / _SLACK
        if due:
            self._evict()

    def _touch(self, blob: str) -> None:
        """Note that the blob was used now."""
        with contextlib.suppress(OSError):  # another process has evicted it, or the folder is not ours to change
            os.utime(self._full(_path(blob)))

    def _evict(self) -> None:
        """Look at the folder and delete what was unused longest, until a slack's worth is free below the limit."""
        if not self._evicting.acquire(blocking=False):  # another thread is at it
            return
        try:
            with self._lock:
                self._unlooked = 0
            found = sorted(self._found())
            excess = sum(size for _, size, _ in found) - (self._limit - self._limit // _SLACK)
            for _, size, path in found:
                if excess <= 0:
                    return
                self._drop(path)
                excess -= size
        finally:
            self._evicting.release()

    def _found(self) -> list[tuple[float, int, str]]:
        """When each blob was used last, its size and its path; deletes what killed writers left on the way."""
        for path, _ in self._files.list("tmp"):
            if (self._used(path) or math.inf) < time.time() - _ABANDONED_SECONDS:
                self._drop(path)
        every = ((self._used(path), size, path) for path, size in self._files.list("blobs"))
        return [(used, size, path) for used, size, path in every if used is not None]

    def _used(self, path: str) -> float | None:
        try:
            return os.stat(self._full(path)).st_mtime
        except OSError:  # another process deleted it
            return None

    def _drop(self, path: str) -> None:
        with contextlib.suppress(OSError):  # another process was faster, or the folder is not ours to change
            os.unlink(self._full(path))

    def _give_up(self, error: Exception) -> None:
        with self._lock:
            working, self._works = self._works, False
        if working:
            logger.warning("the cache in %s is used no further, blobs come from the store: %s", self._files.url, error)

    def _full(self, path: str) -> str:
        return os.path.join(self._files.root, path)


def _path(blob: str) -> str:
    return f"blobs/sha256/{blob[:2]}/{blob[2:]}"
