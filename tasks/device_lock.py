"""Who may use a device now: any number of computing stages, or one measurement alone.

Two files for each user, host and device, in the temporary directory or in `$COLDPRESS_LOCKS` (for containers that
share a device, a folder that all of them see). Locks are advisory `flock`s, which the kernel drops with the process,
also after `kill -9`. A stage holds the device's lock shared, a measurement alone. Whoever waits for it alone first
takes the gate, which others pass to get in, so those who keep coming can't keep it out for ever.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import tempfile
import time
from collections.abc import Callable, Iterator

from ..storage.errors import ColdpressError
from .hardware import device_id

SECONDS_BETWEEN_LOOKS = 0.2


@contextlib.contextmanager
def device_lock(device: str, *, alone: bool, waiting: Callable[[], None]) -> Iterator[None]:
    """Hold a device ("cpu", "cuda:1" …), alone or with others, once it is free.

    `waiting` is called again and again until then; what it raises ends the waiting. Not for one who holds it already.
    Raises ColdpressError when the lock's files can't be written.
    """
    kind = fcntl.LOCK_EX if alone else fcntl.LOCK_SH
    with _lock_file(device, "gate") as gate, _lock_file(device, "lock") as lock:
        if alone:
            while not _taken(gate, kind):
                _pause(waiting)
            while not _taken(lock, kind):
                _pause(waiting)
        else:
            # The gate is not kept while waiting for the device: then it would be those who share who keep others out.
            while not (_taken(gate, kind) and _taken(lock, kind)):
                fcntl.flock(gate, fcntl.LOCK_UN)
                _pause(waiting)
        fcntl.flock(gate, fcntl.LOCK_UN)
        yield


def _pause(waiting: Callable[[], None]) -> None:
    waiting()
    time.sleep(SECONDS_BETWEEN_LOOKS)


def _taken(file: int, kind: int) -> bool:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
            raise
        return False
    return True


@contextlib.contextmanager
def _lock_file(device: str, what: str) -> Iterator[int]:
    """An open lock file, whose lock ends with it. It stays there: one that is deleted could be locked by two."""
    folder = os.environ.get("COLDPRESS_LOCKS") or tempfile.gettempdir()
    path = os.path.join(folder, f"coldpress-{os.getuid()}-{socket.gethostname()}-{device_id(device)}.{what}")
    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise ColdpressError(
            f"{path} can't be opened ({error.strerror}), with which coldpress keeps measurements undisturbed; name a "
            "folder that can be written to in COLDPRESS_LOCKS"
        ) from error
    try:
        yield file
    finally:
        os.close(file)
