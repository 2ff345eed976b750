"""Errors that a person can act on: each message is a sentence that says what is wrong and what to do."""

from __future__ import annotations

import errno


class ColdpressError(Exception):
    """Base of every error that coldpress raises on purpose. Shown as one sentence, without a traceback."""


class StoreError(ColdpressError):
    """The store can't be read or written."""


class DamagedBlob(StoreError):
    """A blob or record whose bytes are missing or don't match its digest."""


def write_error(where: str, error: OSError) -> StoreError:
    """The sentence for a failed write at `where`."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StoreError(
            f"the disk is full: could not write {where}; free some space (`coldpress du` shows what the store holds) "
            "and run the same command again, finished stages are kept"
        )
    return StoreError(f"could not write {where}: {error.strerror or error}")
