"""Leases: one holder at a time, takeover of the dead, no trusted clock, and a loser that cannot spoil anything."""

from __future__ import annotations

import errno
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from coldpress.storage import leases
from coldpress.storage.digests import digest_of, unseal
from coldpress.storage.journal import Journal
from coldpress.storage.leases import Claim, Heartbeat, Lease, LeaseLost, is_held
from coldpress.storage.store import Store

KEY = "ab" * 32
ABOUT = {"run": "r1", "recipe": "tiny", "node": "pruned", "inputs": {}}


@pytest.fixture
def ticks(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """`ticks(seconds)` advances the monotonic clock that watchers look at."""
    now = [1000.0]
    monkeypatch.setattr(leases.time, "monotonic", lambda: now[0])

    def advance(seconds: float) -> None:
        now[0] += seconds

    return advance


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """`elsewhere(name)`: from now on this process counts as one of another machine."""

    def move(name: str) -> None:
        monkeypatch.setattr(leases, "_system", lambda: name)

    return move


def taken(store: Store, about: dict[str, Any] = ABOUT) -> Lease:
    lease = Claim(store, KEY, about).acquire()
    assert lease is not None
    return lease


def test_one_of_many_claims_gets_the_lease(store: Store) -> None:
    barrier = threading.Barrier(8)

    def claim(number: int) -> Lease | None:
        mine = Claim(store, KEY, ABOUT)
        barrier.wait()
        return mine.acquire()

    with ThreadPoolExecutor(8) as pool:
        got = [lease for lease in pool.map(claim, range(8)) if lease]
    assert len(got) == 1
    assert is_held(store, got[0])


def test_who_waits_learns_on_whom(store: Store) -> None:
    lease = taken(store)
    with Heartbeat(store, lease, ABOUT):
        waiting = Claim(store, KEY, {**ABOUT, "run": "r2"})
        assert waiting.acquire() is None
        assert (waiting.holder["run"], waiting.holder["node"]) == ("r1", "pruned")
    assert waiting.acquire() is not None  # given back


def test_the_lease_of_a_process_that_ended_on_this_machine_is_taken_over_at_once(folder: str) -> None:
    program = (
        "import sys; from coldpress.storage.store import Store; from coldpress.storage.leases import Claim;"
        f"print(*Claim(Store({folder!r}), {KEY!r}, {ABOUT!r}).acquire()); sys.stdout.flush(); input()"
    )
    other = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None
    key, epoch, token = other.stdout.readline().split()
    store = Store(folder)
    claim = Claim(store, KEY, ABOUT)
    assert claim.acquire() is None  # it lives
    other.kill()
    other.wait()
    lease = claim.acquire()
    assert lease is not None
    assert lease.epoch == int(epoch) + 1
    assert not is_held(store, Lease(key, int(epoch), token))


def test_a_silent_holder_on_another_machine_is_taken_over_when_it_is_stale(
    store: Store, ticks: Callable[[float], None], elsewhere: Callable[[str], None]
) -> None:
    elsewhere("one")
    lost = taken(store)
    elsewhere("two")
    claim = Claim(store, KEY, ABOUT)
    assert claim.acquire() is None
    ticks(59)
    assert claim.acquire() is None
    ticks(2)
    lease = claim.acquire()
    assert lease is not None
    assert (is_held(store, lost), is_held(store, lease)) == (False, True)


def test_a_holder_that_beats_is_never_taken_over_whatever_its_clock_says(
    store: Store,
    ticks: Callable[[float], None],
    elsewhere: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    elsewhere("one")
    lease = taken(store)
    elsewhere("two")
    claim = Claim(store, KEY, ABOUT)
    for beats in range(1, 20):
        jump = 3600.0 if beats % 2 else -3600.0
        monkeypatch.setattr(leases.time, "time", lambda jump=jump: 1e9 + jump)
        record = leases._record(lease, ABOUT, beats=beats, doing="")
        store.files.replace(leases._path(KEY, lease.epoch), [leases.seal(record)])
        assert claim.acquire() is None
        ticks(50)
    assert is_held(store, lease)


def test_a_heartbeat_moves_and_tells_what_is_done(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLDPRESS_LEASE_SECONDS", "0.04")
    lease = taken(store)
    seen = set()
    with Heartbeat(store, lease, ABOUT) as heartbeat:
        heartbeat.doing = "pruning 3/30"
        deadline = time.monotonic() + 20
        while len(seen) < 3 and time.monotonic() < deadline:
            record = unseal(store.files.read(leases._path(KEY, lease.epoch)), "")
            if record["doing"] == "pruning 3/30":
                seen.add(record["beats"])
    assert len(seen) == 3


def test_a_heartbeat_outlives_a_read_that_failed(
    store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("COLDPRESS_LEASE_SECONDS", "1")
    lease = taken(store)
    failures = [OSError(errno.ESTALE, "Stale file handle")]
    plain = store.files.read

    def read(path: str) -> memoryview:
        if failures and threading.current_thread().name == "heartbeat":
            raise failures.pop()
        return plain(path)

    monkeypatch.setattr(store.files, "read", read)
    with Heartbeat(store, lease, ABOUT):
        deadline = time.monotonic() + 30
        while leases._read(store, KEY, lease.epoch)[1]["beats"] < 2:  # type: ignore[index]
            assert time.monotonic() < deadline
            time.sleep(0.05)
    assert "a heartbeat could not be written: [Errno 116] Stale file handle" in caplog.text


def test_a_loser_neither_beats_on_nor_takes_the_lease_of_its_successor_away(
    store: Store, monkeypatch: pytest.MonkeyPatch, elsewhere: Callable[[str], None]
) -> None:
    monkeypatch.setenv("COLDPRESS_LEASE_SECONDS", "0.04")
    elsewhere("one")
    lost = taken(store)
    elsewhere("two")
    claim = Claim(store, KEY, ABOUT)
    claim.acquire()
    time.sleep(0.05)
    lease = claim.acquire()
    assert lease is not None
    with Heartbeat(store, lost, ABOUT):
        time.sleep(0.1)
    assert is_held(store, lease)


def test_a_loser_can_commit_nothing_and_its_successor_goes_on_from_what_it_had(
    store: Store, ticks: Callable[[float], None], elsewhere: Callable[[str], None]
) -> None:
    preimage = {"stage": "prune/wanda"}
    key = digest_of(preimage)
    elsewhere("one")
    first = Claim(store, key, ABOUT).acquire()
    slow = Journal(store, preimage, {"run": "r1"}, first)
    slow.commit({"number": 0})
    elsewhere("two")
    claim = Claim(store, key, ABOUT)
    claim.acquire()
    ticks(61)
    second = claim.acquire()
    fresh = Journal(store, preimage, {"run": "r2"}, second)
    assert [step["number"] for step in fresh.steps] == [0]
    with pytest.raises(LeaseLost):
        slow.commit({"number": "of the loser"})
    fresh.commit({"number": 1})
    after = Journal(store, preimage, {"run": "r3"})
    assert [step["number"] for step in after.steps] == [0, 1]
    assert [attempt["run"] for attempt in after.attempts] == ["r1", "r2", "r3"]


def test_a_write_that_began_before_the_takeover_lands_where_it_spoils_nothing(store: Store) -> None:
    preimage = {"stage": "prune/wanda"}
    slow = Journal(store, preimage, {"run": "r1"}, Lease(digest_of(preimage), 1, "a"))
    fresh = Journal(store, preimage, {"run": "r2"}, Lease(digest_of(preimage), 2, "b"))
    for journal in (slow, fresh):
        journal._lease = None  # as if the check had been made just before
        journal.commit({"by": journal.attempts[-1]["run"]})
    slow.commit({"by": "r1"})
    after = Journal(store, preimage, {})
    assert [step["by"] for step in after.steps] == ["r1", "r1"]  # a lineage of its own, not a mixture


def test_a_damaged_lease_blocks_nobody_for_longer_than_a_stale_one(
    store: Store, ticks: Callable[[float], None]
) -> None:
    lease = taken(store)
    store.files.replace(leases._path(KEY, lease.epoch), [b"not a record"])
    claim = Claim(store, KEY, ABOUT)
    assert claim.acquire() is None
    ticks(61)
    assert claim.acquire() is not None


def test_a_nonsensical_setting_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLDPRESS_LEASE_SECONDS", "soon")
    with pytest.raises(leases.ColdpressError, match="COLDPRESS_LEASE_SECONDS is 'soon'"):
        leases.stale_seconds()


def test_a_link_whose_answer_got_lost_counts_as_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    from coldpress.storage.files import LocalFiles

    link = os.link

    def lose_the_answer(source: str, target: str) -> None:
        link(source, target)
        raise FileExistsError(target)

    files = LocalFiles(str(tmp_path))
    monkeypatch.setattr(os, "link", lose_the_answer)
    assert files.create("lease", [b"mine"])
    monkeypatch.setattr(os, "link", link)
    assert not files.create("lease", [b"another"])
