"""The seam under the store: read, size, list, create-if-absent, replace, move, delete.

`LocalFiles` does it in a folder, with plain `os` calls: a file appears under its name whole or not at all, and after
`sync()` it survives a power cut. `s3://` is in s3.py, everything else that fsspec has a driver for in objects.py.
Paths are relative to the store's root, with forward slashes.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import numpy as np

from .digests import Buffer, total_bytes
from .errors import StoreError, write_error

# The C library keeps freed memory of this and greater sizes in the arenas of the threads that once asked for it.
_MAPPED_BYTES = 1 << 20
_TRIES = 20  # against others who remove the folder that they have just emptied


class Files(Protocol):
    """What the store needs of the place where it lives."""

    url: str
    remote: bool  # each call takes a round trip over a network

    @property
    def atomic_create(self) -> bool:
        """Whether of several clients that `create` a file at once exactly one gets True."""
        ...

    def read(self, path: str) -> memoryview:
        """The whole file, in a writable buffer of its own. Raises FileNotFoundError."""
        ...

    def size(self, path: str) -> int | None:
        """Bytes of the file, None when it isn't there."""
        ...

    def list(self, folder: str) -> Iterator[tuple[str, int]]:
        """Every file below `folder` with its size in bytes, in any order."""
        ...

    def ages(self, folder: str) -> dict[str, float]:
        """Seconds since each file below `folder` was written or kept, by the clock of the place itself."""
        ...

    def create(self, path: str, buffers: Sequence[Buffer]) -> bool:
        """Write the file if it isn't there. False when another one is there already, which then stays."""
        ...

    def replace(self, path: str, buffers: Sequence[Buffer]) -> None:
        """Write the file, over an older one if need be."""
        ...

    def move(self, path: str, target: str) -> None: ...

    def delete(self, path: str) -> None:
        """Make the file be gone. May raise FileNotFoundError when it wasn't there; not every object store can tell."""
        ...

    def sync(self) -> None:
        """Returns when everything written so far survives a power cut."""
        ...

    def keep(self, path: str) -> None:
        """Count a file that another writer made as new; the next `sync` covers it, synced by that one or not."""
        ...

    def free_bytes(self) -> int | None:
        """Space left, None where nobody knows."""
        ...


def open_files(url: str) -> Files:
    """The files at a store URL: a folder, or anything fsspec has a driver for."""
    if "://" not in url or url.startswith("file://"):
        return LocalFiles(url.removeprefix("file://"))
    if url.startswith(("s3://", "s3a://")):
        from .s3 import S3Files

        return S3Files(url)
    from .objects import FsspecFiles

    return FsspecFiles(url)


class LocalFiles:
    """A folder. Files are written under a temporary name, fsynced, then linked or renamed into place."""

    remote = False
    atomic_create = True

    def __init__(self, folder: str, *, durable: bool = True) -> None:
        """durable: whether files must survive a power cut."""
        self._durable = durable
        self.root = os.path.abspath(os.path.expanduser(folder))
        self.url = self.root
        self._lock = threading.Lock()
        self._unsynced: set[str] = set()
        self._known: set[str] = set()  # folders whose own names have been noted, whoever made them
        self._syncing = threading.Lock()

    def read(self, path: str) -> memoryview:
        with open(self._full(path), "rb", buffering=0) as file:
            data = new_buffer(os.fstat(file.fileno()).st_size)
            done = 0
            while done < len(data):
                count = file.readinto(data[done:])
                if not count:
                    raise StoreError(f"{self._full(path)} became shorter while it was read")
                done += count
        return data

    def size(self, path: str) -> int | None:
        try:
            return os.stat(self._full(path)).st_size
        except (FileNotFoundError, NotADirectoryError):
            return None

    def list(self, folder: str) -> Iterator[tuple[str, int]]:
        for parent, _, names in os.walk(self._full(folder), onerror=_unless_gone):
            for name in names:
                full = os.path.join(parent, name)
                try:
                    size = os.stat(full).st_size
                except FileNotFoundError:  # deleted since it was listed
                    continue
                yield os.path.relpath(full, self.root).replace(os.sep, "/"), size

    def ages(self, folder: str) -> dict[str, float]:
        probe = self._write_temporary(self._full("tmp/now"), [])
        try:
            now = os.stat(probe).st_mtime
        finally:
            os.unlink(probe)
        found = {}
        for path, _ in self.list(folder):
            with contextlib.suppress(FileNotFoundError):  # deleted since it was listed
                found[path] = now - os.stat(self._full(path)).st_mtime
        return found

    def create(self, path: str, buffers: Sequence[Buffer]) -> bool:
        full = self._full(path)
        temporary = self._write_temporary(full, buffers)
        try:
            self._into_place(os.link, temporary, full)
        except FileExistsError:
            self._note(os.path.dirname(full))
            # Over NFS the answer to a link that worked can get lost; asked again, the server says that it exists.
            return os.stat(temporary).st_nlink == 2
        except OSError as error:
            if error.errno in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS):
                raise StoreError(
                    f"the file system under {self.root} has no hard links, which the store needs to publish safely; "
                    "put the store on another one (--store or COLDPRESS_STORE)"
                ) from error
            raise write_error(full, error) from error
        finally:
            os.unlink(temporary)
        self._note(os.path.dirname(full))
        return True

    def replace(self, path: str, buffers: Sequence[Buffer]) -> None:
        full = self._full(path)
        temporary = self._write_temporary(full, buffers)
        try:
            self._into_place(os.replace, temporary, full)
        except OSError as error:
            os.unlink(temporary)
            raise write_error(full, error) from error
        self._note(os.path.dirname(full))

    def move(self, path: str, target: str) -> None:
        self._make_folder(os.path.dirname(self._full(target)))
        os.replace(self._full(path), self._full(target))
        self._note(os.path.dirname(self._full(path)))
        self._note(os.path.dirname(self._full(target)))

    def delete(self, path: str) -> None:
        full = self._full(path)
        os.unlink(full)
        folder = os.path.dirname(full)
        while os.path.dirname(folder) != self.root and _remove_if_empty(folder):
            folder = os.path.dirname(folder)
        self._note(folder)

    def sync(self) -> None:
        with self._syncing:
            with self._lock:
                folders = set(self._unsynced)
                self._unsynced -= folders
            try:
                for folder in folders:
                    try:
                        descriptor = os.open(folder, os.O_RDONLY)
                    except FileNotFoundError:  # emptied and removed meanwhile
                        continue
                    try:
                        os.fsync(descriptor)
                    finally:
                        os.close(descriptor)
            except OSError as error:
                with self._lock:
                    self._unsynced |= folders
                raise write_error(self.root, error) from error

    def keep(self, path: str) -> None:
        with contextlib.suppress(FileNotFoundError):  # whoever relies on it finds out before publishing
            os.utime(self._full(path))
        self._note(os.path.dirname(self._full(path)))

    def free_bytes(self) -> int | None:
        folder = self.root
        while not os.path.isdir(folder):
            folder = os.path.dirname(folder)
        status = os.statvfs(folder)
        return status.f_bavail * status.f_frsize

    def _full(self, path: str) -> str:
        return os.path.join(self.root, path)

    def _note(self, folder: str) -> None:
        with self._lock:
            self._unsynced.add(folder)
            while folder not in self._known and len(folder) >= len(self.root):
                self._known.add(folder)
                folder = os.path.dirname(folder)
                self._unsynced.add(folder)

    def _into_place(self, move: Callable[[str, str], None], temporary: str, full: str) -> None:
        for _ in range(_TRIES):
            try:
                return move(temporary, full)
            except FileNotFoundError:  # whoever deleted the folder's last file has removed the folder just now
                self._make_folder(os.path.dirname(full))
        return move(temporary, full)

    def _make_folder(self, folder: str) -> None:
        for _ in range(_TRIES):
            if os.path.isdir(folder):
                return
            parent = os.path.dirname(folder)
            self._make_folder(parent)
            try:
                os.mkdir(folder)
            except (FileExistsError, FileNotFoundError):  # somebody else made it, or has removed its empty parent
                continue
            except OSError as error:
                raise write_error(folder, error) from error
            self._note(parent)
            return
        if not os.path.isdir(folder):
            raise StoreError(f"could not make the folder {folder}; is there a file of that name?")

    def _write_temporary(self, full: str, buffers: Sequence[Buffer]) -> str:
        self._make_folder(os.path.dirname(full))
        self._make_folder(os.path.join(self.root, "tmp"))
        temporary = os.path.join(self.root, "tmp", uuid.uuid4().hex)
        try:
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
            try:
                for buffer in buffers:
                    view = memoryview(buffer).cast("B")
                    while len(view):
                        view = view[os.write(descriptor, view) :]
                if self._durable:
                    os.fsync(descriptor)
            finally:
                os.close(descriptor)
        except OSError as error:
            if os.path.exists(temporary):
                os.unlink(temporary)
            raise write_error(full, error) from error
        return temporary


def _remove_if_empty(folder: str) -> bool:
    try:
        os.rmdir(folder)
    except FileNotFoundError:
        return True
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            return False
        raise write_error(folder, error) from error
    return True


def new_buffer(size: int) -> memoryview:
    """Memory to read a file into; large ones are mapped, so that all of it goes back to the system with the tensor."""
    if size < _MAPPED_BYTES:
        return np.empty(size, np.uint8).data.cast("B")
    return memoryview(mmap.mmap(-1, size))


def _unless_gone(error: OSError) -> None:
    """A folder that can't be listed is no empty one: what it names would be garbage."""
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise StoreError(f"{error.filename} can't be listed: {error.strerror}") from error


__all__ = ["Files", "LocalFiles", "new_buffer", "open_files", "total_bytes"]
