"""What can go wrong under a store: bytes that change, files that go, system calls that fail."""

from __future__ import annotations

import os
import stat
import threading
from typing import Any

from coldpress.storage.store import Store


def flip(store: Store, path: str, position: int = -1) -> None:
    """Change the byte at a position of a stored file."""
    data = bytearray(store.files.read(path))
    data[position] ^= 0xFF
    store.files.replace(path, [data])


def cut(store: Store, path: str, length: int) -> None:
    """Leave only the first `length` bytes of a stored file; a negative `length` counts from its end."""
    store.files.replace(path, [bytes(store.files.read(path))[:length]])


def paths(store: Store, folder: str) -> list[str]:
    """Every stored file below a folder."""
    return sorted(path for path, _ in store.files.list(folder))


class FailingOs:
    """Stands in for the `os` module and lets one call fail: the `at`-th of a name ("write", "fsync" …).

    "fsync" is of files and "fsync folder" of folders. `happened` tells whether the call came.
    """

    def __init__(self, call: str, at: int, error_number: int) -> None:
        self.happened = False
        self._call = call
        self._at = at
        self._error = OSError(error_number, os.strerror(error_number))
        self._lock = threading.Lock()

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        if not self._call.startswith(name):
            return real

        def perhaps(*arguments: Any, **options: Any) -> Any:
            if name == "fsync" and stat.S_ISDIR(os.fstat(arguments[0]).st_mode) != (self._call == "fsync folder"):
                return real(*arguments, **options)
            with self._lock:
                self._at -= 1
                if self._at == 0:
                    self.happened = True
                    if name == "write":  # a disk takes what fits before it says that it is full
                        real(arguments[0], bytes(arguments[1])[: len(arguments[1]) // 2])
                    raise self._error
            return real(*arguments, **options)

        return perhaps
