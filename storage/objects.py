"""Object stores: what has an fsspec driver, and what all of them have in common.

An object appears whole or not at all, and is durable once written. Whether the server decides who creates an object is
tried once, by creating a tiny one twice. Where it doesn't, `create` looks and then writes, `atomic_create` is False,
and the log says so. Each request is made again when it fails in a way that may pass (retries.py). fsspec's listing
cache is off, since with it on another client's new object is not seen.
"""

from __future__ import annotations

import contextlib
import datetime
import logging
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from .digests import Buffer, total_bytes
from .errors import StoreError
from .files import new_buffer
from .retries import NotSupported, Requests, answer, limit_seconds

PART_BYTES = 16 << 20  # what is larger is read, and to S3 written, in parts of this size

logger = logging.getLogger("coldpress")

# Drivers that have the server decide; others look and then write, whatever they call it.
_DECIDED_BY_THE_SERVER = ("s3", "s3a", "gs", "gcs")
_IN_MEMORY = threading.Lock()  # fsspec's memory:// looks and then writes; other threads must not come between


class FsspecFiles:
    """Any fsspec file system that can write an object in one go."""

    def __init__(self, url: str) -> None:
        import fsspec

        self.url = url.rstrip("/")
        self._protocol = url.split("://", 1)[0]
        self.remote = self._protocol != "memory"
        try:
            # endpoint and credentials come from fsspec's own configuration and the driver's environment
            self._fs: Any = fsspec.filesystem(self._protocol, use_listings_cache=False, **self._options())
        except (ImportError, ValueError) as error:
            raise StoreError(f"the store {url} needs a driver that is not installed: {error}") from error
        self._root = self._fs._strip_protocol(self.url).rstrip("/")
        self._requests = Requests()
        self._writing = contextlib.nullcontext() if self.remote else _IN_MEMORY
        self._atomic: bool | None = None if self.remote else True
        self._probing = threading.Lock()

    @property
    def atomic_create(self) -> bool:
        """Whether of several clients that create an object at once exactly one succeeds; the first use finds out."""
        with self._probing:
            if self._atomic is None:
                self._atomic = self._protocol in _DECIDED_BY_THE_SERVER and self._creates_once()
                if not self._atomic:
                    logger.warning(
                        "%s has no conditional writes: two runs that publish the same thing at the same moment are "
                        "not told of each other, and the later one's record stays",
                        self.url,
                    )
        return self._atomic

    def read(self, path: str) -> memoryview:
        first = self._get(path, 0, PART_BYTES)
        if len(first) < PART_BYTES:
            data = new_buffer(len(first))
            data[:] = first
            return data
        size = self.size(path)
        if size is None:
            raise FileNotFoundError(self._where(path))
        data = new_buffer(size)
        data[: len(first)] = first
        del first
        for start in range(PART_BYTES, size, PART_BYTES):
            end = min(start + PART_BYTES, size)
            part = self._get(path, start, end)
            if len(part) != end - start:
                raise StoreError(f"{self._where(path)} changed while it was read")
            data[start:end] = part
        return data

    def size(self, path: str) -> int | None:
        try:
            return int(self._request("look at", path, lambda: self._fs.info(self._full(path), **self._limit())["size"]))
        except FileNotFoundError:
            return None

    def list(self, folder: str) -> Iterator[tuple[str, int]]:
        for path, entry in self._entries(folder):
            yield path, int(entry["size"])

    def ages(self, folder: str) -> dict[str, float]:
        probe = f"tmp/{uuid.uuid4().hex}"
        self.replace(probe, [])
        now = _modified(dict(self._entries("tmp"))[probe], probe)
        self.delete(probe)
        return {path: now - _modified(entry, path) for path, entry in self._entries(folder)}

    def create(self, path: str, buffers: Sequence[Buffer]) -> bool:
        if self.atomic_create:
            return self._write(path, buffers, absent=True)
        return self.size(path) is None and self._write(path, buffers, absent=False)

    def replace(self, path: str, buffers: Sequence[Buffer]) -> None:
        self._write(path, buffers, absent=False)

    def move(self, path: str, target: str) -> None:
        self._request("copy", path, lambda: self._fs.cp_file(self._full(path), self._full(target)))
        with contextlib.suppress(FileNotFoundError):  # another client has moved or deleted it meanwhile
            self.delete(path)

    def delete(self, path: str) -> None:
        tries = 0

        def request() -> None:
            nonlocal tries
            tries += 1
            self._fs.rm_file(self._full(path), **self._limit())

        try:
            self._request("delete", path, request)
        except FileNotFoundError:
            if tries == 1:  # otherwise the try before was carried out and its answer lost
                raise

    def sync(self) -> None:
        """Objects are durable once written."""

    def keep(self, path: str) -> None:
        """Objects are durable once written; most drivers can't make one count as new without writing it again."""

    def free_bytes(self) -> int | None:
        return None

    def _options(self) -> dict[str, Any]:
        """What the driver is opened with, besides its own configuration."""
        return {}

    def _entries(self, folder: str) -> Iterator[tuple[str, dict[str, Any]]]:
        """Every object below the folder with what the driver knows of it, its "size" and when it was written."""
        try:
            found = self._request("list", folder, lambda: self._fs.find(self._full(folder), detail=True))
        except FileNotFoundError:
            return
        for name, entry in found.items():
            yield name[len(self._root) + 1 :], entry

    def _write(self, path: str, buffers: Sequence[Buffer], *, absent: bool) -> bool:
        """Write an object; with `absent` only if none is there, else False."""
        data = b"".join(buffers)
        mode = "create" if absent else "overwrite"

        def request() -> None:
            with self._writing:
                self._fs.pipe_file(self._full(path), data, mode=mode, **self._limit(len(data)))

        return self._appear(path, buffers, request)

    def _appear(self, path: str, buffers: Sequence[Buffer], request: Callable[[], object]) -> bool:
        """Make the request that lets an object appear. False when another one is there already.

        The answer to a try that was carried out may be lost; then the next one finds the object there. With our bytes
        in it, it is taken for ours: what must tell its writers apart has to name them.
        """
        tries = 0

        def counted() -> None:
            nonlocal tries
            tries += 1
            request()

        try:
            self._request("write", path, counted)
        except FileExistsError:
            return tries > 1 and self._holds(path, buffers)
        return True

    def _holds(self, path: str, buffers: Sequence[Buffer]) -> bool:
        """Whether the object is there with exactly these bytes."""
        if self.size(path) != total_bytes(buffers):
            return False
        try:
            stored = self.read(path)
        except FileNotFoundError:
            return False
        for buffer in buffers:
            expected = memoryview(buffer).cast("B")
            if stored[: len(expected)] != expected:
                return False
            stored = stored[len(expected) :]
        return not stored

    def _creates_once(self) -> bool:
        """Whether a second `create` of one object is refused, tried on an object that is deleted afterwards."""
        path = f"tmp/{uuid.uuid4().hex}"
        try:
            self._write(path, [b"first"], absent=True)
            return not self._write(path, [b"second"], absent=True)
        except NotSupported:
            return False
        finally:
            with contextlib.suppress(FileNotFoundError, StoreError):
                self.delete(path)

    def _get(self, path: str, start: int, end: int) -> bytes:
        """Those of the bytes from `start` to `end` that are there."""

        def request() -> bytes:
            try:
                return bytes(self._fs.cat_file(self._full(path), start=start, end=end, **self._limit(end - start)))
            except OSError as error:
                if answer(error)[1] == 416:  # nothing at or after `start`, as in an empty object
                    return b""
                raise

        return self._request("read", path, request)

    def _request(self, verb: str, path: str, request: Callable[[], Any]) -> Any:
        return self._requests.make(request, f"{verb} {self._where(path)}")

    def _limit(self, size: int = 0) -> dict[str, float]:
        """The time limit of a call that moves so many bytes, for drivers that take one."""
        return {"timeout": limit_seconds(size)} if getattr(self._fs, "async_impl", False) else {}

    def _where(self, path: str) -> str:
        return f"{self.url}/{path}".rstrip("/")

    def _full(self, path: str) -> str:
        return f"{self._root}/{path}"


def _modified(entry: dict[str, Any], path: str) -> float:
    """When an object was last written, in seconds; drivers call it differently."""
    for name in ("LastModified", "last_modified", "updated", "mtime", "created"):
        value = entry.get(name)
        if isinstance(value, datetime.datetime):
            return value.timestamp()
        if isinstance(value, int | float):
            return float(value)
    raise StoreError(f"this kind of store doesn't tell when {path} was written, which gc needs to know")
