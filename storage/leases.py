"""Leases: of several jobs that need the same key, one computes it and the others wait for its result.

    leases/<key>/<epoch>     created only if it isn't there; rewritten by its holder every few seconds, a count in it

A lease counts as dead when its content has not changed for a while on the *watcher's* monotonic clock (no other clock
is trusted), or at once when its holder was a process of this very system that no longer exists. Then a watcher takes
over by creating the next epoch. Only one can; and whoever held an earlier epoch finds out before it commits anything
more to the key's journal. A lease saves work and nothing else: two jobs that both believe to hold one (a store without
conditional writes, a process that slept through its takeover) write the same content to different journals.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

from .digests import seal, sha256, unseal
from .errors import ColdpressError, DamagedBlob, StoreError
from .store import Store

logger = logging.getLogger("coldpress")

_BEATS_BEFORE_STALE = 4


class LeaseLost(ColdpressError):
    """Another job has taken over what this one was computing."""


class Lease(NamedTuple):
    """The right to compute a key. token: tells this lease from any other, also from one of the same epoch later on."""

    key: str
    epoch: int
    token: str

    @property
    def name(self) -> str:
        """Unique for ever; sorts by epoch."""
        return f"{self.epoch:06}-{self.token}"


def stale_seconds() -> float:
    """After how long without a heartbeat a lease is taken over: $COLDPRESS_LEASE_SECONDS, 60 by default."""
    text = os.environ.get("COLDPRESS_LEASE_SECONDS", "60")
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if seconds <= 0:
        raise ColdpressError(f"COLDPRESS_LEASE_SECONDS is {text!r}; write a positive number of seconds")
    return seconds


def is_held(store: Store, lease: Lease) -> bool:
    """Whether the lease is still the newest of its key."""
    if max(_epochs(store, lease.key), default=0) != lease.epoch:
        return False
    record = _read(store, lease.key, lease.epoch)[1]
    return record is not None and record["token"] == lease.token


def holders(store: Store) -> list[dict[str, Any]]:
    """The newest lease of each key, as its holder wrote it, with "key", and "dead": is its process gone from here?"""
    newest: dict[str, int] = {}
    for path, _ in store.files.list("leases"):
        _, key, epoch = path.split("/")
        newest[key] = max(int(epoch), newest.get(key, 0))
    records = ((key, _read(store, key, epoch)[1]) for key, epoch in sorted(newest.items()))
    return [{**record, "key": key, "dead": _is_dead_here(record)} for key, record in records if record is not None]


class Claim:
    """A job's wish for a key's lease: `acquire` until it gives one, or until the result is there.

    about: JSON values that tell others whose lease it is (run, recipe, node), and inputs: what it must not lose.
    """

    def __init__(self, store: Store, key: str, about: Mapping[str, Any]) -> None:
        self._store = store
        self._key = key
        self._about = dict(about)
        self._seen: tuple[int, str] | None = None
        self._since = 0.0
        self.holder: dict[str, Any] = {}

    def acquire(self) -> Lease | None:
        """The lease, or None while another job has it; `holder` then says what is known of that job."""
        newest = self._look()
        return None if newest is None else self._create(newest + 1)

    def is_taken(self) -> bool:
        """Whether another job has the lease; `holder` then says what is known of that job."""
        return self._look() is None

    def _look(self) -> int | None:
        """The newest epoch, 0 if there is none yet; None while it is alive."""
        epochs = _epochs(self._store, self._key)
        if not epochs:
            return 0
        newest = max(epochs)
        state, record = _read(self._store, self._key, newest)
        if state != (self._seen[1] if self._seen and self._seen[0] == newest else None):
            self._seen, self._since = (newest, state), time.monotonic()
        self.holder = record or {}
        if _is_dead_here(self.holder) or time.monotonic() - self._since >= stale_seconds():
            return newest
        return None

    def _create(self, epoch: int) -> Lease | None:
        lease = Lease(self._key, epoch, secrets.token_hex(8))
        record = _record(lease, self._about, beats=0, doing="")
        return lease if self._store.files.create(_path(lease.key, epoch), [seal(record)]) else None


class Heartbeat:
    """Keeps a lease alive from a thread of its own while the `with` block runs, and gives it back at the end.

    doing: may be set at any time; those who wait can read it.
    """

    def __init__(self, store: Store, lease: Lease, about: Mapping[str, Any]) -> None:
        self._store = store
        self._lease = lease
        self._about = dict(about)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self.doing = ""

    def __enter__(self) -> Heartbeat:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        try:
            if not is_held(self._store, self._lease):
                return
            for epoch in sorted(_epochs(self._store, self._lease.key)):
                if epoch <= self._lease.epoch:
                    self._delete(epoch)
        except (StoreError, OSError) as error:
            logger.warning("a lease could not be given back, others will wait until it is stale: %s", error)

    def _beat(self) -> None:
        beats = 0
        while not self._over.wait(stale_seconds() / _BEATS_BEFORE_STALE):
            try:
                if not is_held(self._store, self._lease):
                    return
                beats += 1
                record = _record(self._lease, self._about, beats=beats, doing=self.doing)
                self._store.files.replace(_path(self._lease.key, self._lease.epoch), [seal(record)])
            except (StoreError, OSError) as error:
                logger.warning("a heartbeat could not be written: %s", error)

    def _delete(self, epoch: int) -> None:
        try:
            self._store.files.delete(_path(self._lease.key, epoch))
        except FileNotFoundError:  # somebody who found it dead has taken over
            return


def _record(lease: Lease, about: Mapping[str, Any], *, beats: int, doing: str) -> dict[str, Any]:
    return {**about, **_this_process(), "token": lease.token, "beats": beats, "doing": doing}


def _path(key: str, epoch: int) -> str:
    return f"leases/{key}/{epoch:06}"


def _epochs(store: Store, key: str) -> list[int]:
    return [int(path.rsplit("/", 1)[1]) for path, _ in store.files.list(f"leases/{key}")]


def _read(store: Store, key: str, epoch: int) -> tuple[str, dict[str, Any] | None]:
    """The digest of a lease's content, and its record unless that is damaged or gone."""
    path = _path(key, epoch)
    try:
        data = store.files.read(path)
    except FileNotFoundError:
        return "", None
    try:
        return sha256(data), unseal(data, path)
    except DamagedBlob:  # nobody can prolong it; it will be stale
        return sha256(data), None


def _this_process() -> dict[str, Any]:
    pid = os.getpid()
    return {"host": socket.gethostname(), "system": _system(), "pid": pid, "started": _start_time(pid)}


def _system() -> str | None:
    """Names this boot of this machine and this namespace of process ids; None where neither can be known."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return f"{file.read().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def _start_time(pid: int) -> str | None:
    """When a process of this system began, in the system's own ticks; None if there is none."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            fields = file.read().rsplit(")", 1)[1].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


def _is_dead_here(holder: Mapping[str, Any]) -> bool:
    """Whether the holder was a process of this very system that has ended."""
    system = _system()
    return (
        system is not None
        and holder.get("system") == system
        and _start_time(int(holder["pid"])) != holder.get("started")
    )
