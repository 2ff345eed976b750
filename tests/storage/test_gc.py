"""Garbage collection: what is needed stays whatever points at it, what isn't goes, and running jobs lose nothing."""

from __future__ import annotations

import errno
import os
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from coldpress.storage import gc
from coldpress.storage.artifacts import Artifact, ArtifactWriter
from coldpress.storage.digests import digest_of, seal
from coldpress.storage.errors import StoreError
from coldpress.storage.gc import DAY, delete_garbage, find_garbage
from coldpress.storage.inspect import verify
from coldpress.storage.journal import Journal
from coldpress.storage.leases import Claim
from coldpress.storage.store import Store, artifact_path
from sabotage import flip
from samples import action, block, large, publish

Age = Callable[[float], None]


@pytest.fixture
def store(folder: str) -> Store:
    return Store(folder)


@pytest.fixture
def age(folder: str) -> Age:
    """`age(days)`: everything in the store becomes so much older."""

    def make_older(days: float) -> None:
        for path in Path(folder).rglob("*"):
            if path.is_file():
                then = path.stat().st_mtime - days * DAY
                os.utime(path, (then, then))

    return make_older


def reasons(store: Store) -> Counter[str]:
    return Counter(one.reason for one in find_garbage(store))


def collect(store: Store) -> None:
    delete_garbage(store, find_garbage(store))


def unneeded(store: Store, seed: int = 5) -> Artifact:
    """An artifact with an action, to which nothing leads."""
    artifact = publish(store, block(0, seed))
    store.record(action(artifact, seed))
    return artifact


def test_what_nothing_leads_to_goes_with_its_action_and_the_rest_stays_whole(store: Store, age: Age) -> None:
    kept, lost = publish(store), unneeded(store)
    store.record(action(kept, 1))
    store.set_ref("demo/pruned", kept)
    age(2)
    before = dict(store.files.list(""))
    found = find_garbage(store)
    assert dict(store.files.list("")) == before  # looking deletes nothing
    assert Counter(one.reason for one in found) == {gc.ACTION: 1, gc.RESULT: 1, gc.BLOB: 2}
    assert sum(one.size for one in found if one.reason == gc.BLOB) > large().nbytes
    collect(store)
    assert (store.holds(kept), store.holds(lost)) == (True, False)
    assert verify(store) == []
    assert [a.artifact for a in store.actions()] == [kept]
    assert find_garbage(store) == []


def test_blobs_that_a_kept_result_shares_stay(store: Store, age: Age) -> None:
    kept = publish(store)
    publish(store, {**block(0), "model.layers.0.more.weight": large(9)})
    store.set_ref("demo/pruned", kept)
    age(2)
    assert reasons(store) == {gc.RESULT: 1, gc.BLOB: 1}
    collect(store)
    assert store.holds(kept)


@pytest.mark.parametrize("how", ["pin", "recent run", "lease", "journal", "adapter"])
def test_everything_that_can_lead_to_a_result_keeps_it(store: Store, age: Age, how: str) -> None:
    artifact = unneeded(store)
    age(2)
    if how == "pin":
        store.pin(artifact)
    elif how == "recent run":
        store.save_run("r1", {"stages": [{"artifact": artifact.id}, {"artifact": None}]})
    elif how == "lease":
        assert Claim(store, "ab" * 32, {"inputs": {"model": artifact.id}}).acquire()
    elif how == "journal":
        journal = Journal(store, {"stage": "prune/wanda", "inputs": {"model": artifact.id}}, {})
        journal.commit({"blobs": {}})
    else:
        with ArtifactWriter(store, "adapter") as writer:
            writer.add_tensors({"a": large(7)})
            store.set_ref("demo/adapter", writer.publish(base=artifact.id))
    if how != "lease":
        age(0.9)  # still within thirty days, a lease within an hour
    assert find_garbage(store) == []
    if how == "pin":
        store.unpin(artifact)
        assert reasons(store)[gc.RESULT] == 1


def test_old_runs_and_abandoned_journals_keep_nothing(store: Store, age: Age) -> None:
    artifact = unneeded(store)
    store.save_run("r1", {"stages": [{"artifact": artifact.id}]})
    journal = Journal(store, {"stage": "prune/wanda", "inputs": {"model": artifact.id}}, {})
    blob, size = store.put_blob([b"a block"])
    journal.commit({"blobs": {blob: size}})
    age(29)
    assert find_garbage(store) == []
    age(2)
    assert reasons(store) == {gc.ACTION: 1, gc.RESULT: 1, gc.BLOB: 4, gc.JOURNAL: 2}


def test_the_journal_of_a_stage_that_is_done_goes(store: Store, age: Age) -> None:
    artifact = publish(store)
    done = action(artifact)
    store.record(done)
    store.set_ref("demo/pruned", artifact)
    Journal(store, {**done.preimage, "inputs": {}}, {}).commit({})  # another key, unfinished
    assert digest_of(done.preimage) == done.key
    Journal(store, done.preimage, {}).commit({})
    age(2)
    found = find_garbage(store)
    assert {one.reason for one in found} == {gc.JOURNAL}
    assert all(one.path.startswith(f"journals/{done.key}/") for one in found)


def test_leftovers_and_dead_leases_go_after_the_grace_period(store: Store, age: Age, folder: str) -> None:
    assert Claim(store, "ab" * 32, {"inputs": {}}).acquire()
    (Path(folder) / "tmp").mkdir(exist_ok=True)
    (Path(folder) / "tmp/half").write_bytes(b"half")
    assert find_garbage(store) == []
    age(2)
    assert reasons(store) == {gc.LEASE: 1, gc.LEFTOVER: 1}


def test_what_given_up_runs_used_of_their_budgets_goes_when_runs_do(store: Store, age: Age) -> None:
    store.files.replace("spent/account/run-1", [seal({"seconds": 5.0})])
    age(2)
    assert find_garbage(store) == []
    age(30)
    assert reasons(store) == {gc.SPENT: 1}
    collect(store)
    assert list(store.files.list("spent")) == []


def test_what_a_writer_relied_on_between_looking_and_deleting_stays(store: Store, age: Age) -> None:
    lost = unneeded(store)
    age(2)
    garbage = find_garbage(store)
    again = publish(store, block(0, 5))  # finds its blobs and manifest there already
    assert again == lost
    store.set_ref("demo/pruned", again)
    delete_garbage(store, garbage)
    assert store.holds(again)


def test_a_blob_that_goes_before_the_manifest_is_noticed(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    create = store.files.create

    def create_late(path: str, buffers: list[bytes]) -> bool:
        if path.startswith("artifacts/"):
            (blob, *_) = [path for path, _ in store.files.list("blobs")]
            store.files.delete(blob)
        return create(path, buffers)

    monkeypatch.setattr(store.files, "create", create_late)
    with pytest.raises(StoreError, match="vanished"):
        publish(store)


@pytest.mark.parametrize("kind", ["refs", "runs", "artifacts"])
def test_nothing_is_deleted_when_a_record_that_leads_somewhere_is_damaged(store: Store, age: Age, kind: str) -> None:
    artifact = unneeded(store)
    store.set_ref("demo/pruned", artifact)
    store.save_run("r1", {"stages": [{"artifact": artifact.id}]})
    age(2)
    paths = {"refs": "refs/demo/pruned.json", "runs": "runs/r1", "artifacts": artifact_path(artifact.id)}
    flip(store, paths[kind])
    with pytest.raises(StoreError, match="nothing was deleted"):
        find_garbage(store)


def test_no_clock_but_the_stores_own_counts(store: Store, age: Age, monkeypatch: pytest.MonkeyPatch) -> None:
    unneeded(store)
    monkeypatch.setattr(time, "time", lambda: 4e9)
    assert find_garbage(store) == []
    age(2)
    monkeypatch.setattr(time, "time", lambda: 0.0)
    assert reasons(store)[gc.RESULT] == 1


def test_a_store_in_memory_has_ages_too() -> None:
    store = Store("memory://gc-ages")
    unneeded(store)
    assert find_garbage(store) == []
    assert Counter(one.reason for one in find_garbage(store, grace=-1.0)) == {gc.ACTION: 1, gc.RESULT: 1, gc.BLOB: 3}


def test_nothing_is_garbage_when_a_folder_cannot_be_listed(
    store: Store, age: Age, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.set_ref("demo/pruned", publish(store))
    age(2)
    plain = os.scandir

    def scandir(path: str) -> object:
        if str(path) == os.path.join(folder, "refs"):
            raise OSError(errno.EIO, "Input/output error", path)
        return plain(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(StoreError, match="refs can't be listed: Input/output error"):
        find_garbage(store)


def test_what_is_relied_on_while_other_things_are_deleted_stays(
    store: Store, age: Age, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed in range(8):
        publish(store, block(0, seed))
    age(2)
    found = find_garbage(store)
    *_, last = sorted(one.path for one in found if one.reason == gc.BLOB)
    plain = store.files.delete

    def delete(path: str) -> None:
        plain(path)
        if path.startswith("blobs/"):
            store.files.keep(last)  # as a writer does that has the same content

    monkeypatch.setattr(store.files, "delete", delete)
    gone = {one.path for one in delete_garbage(store, found)}
    assert gone == {one.path for one in found} - {last}
    assert store.files.size(last) is not None


def test_a_manifest_that_goes_while_it_is_written_again_is_written_again(
    store: Store, age: Age, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = publish(store)
    plain = store.files.keep

    def keep(path: str) -> None:
        plain(path)
        if path == artifact_path(before.id):
            store.files.delete(path)

    monkeypatch.setattr(store.files, "keep", keep)
    assert store.holds(publish(store))
