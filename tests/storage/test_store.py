"""The store: blobs, actions, names; and what is left of them after damage, kills and power cuts."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from coldpress.storage.artifacts import Artifact, ArtifactWriter, Manifest
from coldpress.storage.digests import sha256
from coldpress.storage.errors import DamagedBlob, StoreError
from coldpress.storage.inspect import verify
from coldpress.storage.store import Action, Store, action_path, artifact_path, blob_path
from power_cut import RecordingOs, Tree, late_power_cuts, power_cuts, read_tree, undisturbed, write_tree
from sabotage import FailingOs, cut, flip, paths
from samples import CONFIG, STAGE, action, block, large, publish, read, ref_path, same

Reopen = Callable[[], Store]

CONTENT = b"coldpress" * 1000
BLOB = sha256(CONTENT)


@pytest.fixture
def artifact(store: Store) -> Artifact:
    """A published block."""
    return publish(store)


@pytest.fixture
def recorded(store: Store, artifact: Artifact) -> Action:
    """The action that gave `artifact`."""
    return store.record(action(artifact, seconds=1.5))


def a_blob_of(store: Store, artifact: Artifact) -> str:
    return min(store.manifest(artifact).blobs)


def lookup(store: Store, action: Action) -> Action | None:
    return store.lookup(action.stage, action.key)


# Blobs


def test_a_blob_is_named_by_its_sha256_and_read_back(store: Store, reopen: Reopen) -> None:
    assert store.put_blob([CONTENT[:100], CONTENT[100:]]) == (BLOB, len(CONTENT))
    assert reopen().read_blob(BLOB) == CONTENT


def test_an_empty_blob_is_a_blob(store: Store, reopen: Reopen) -> None:
    blob, size = store.put_blob([])
    assert size == 0
    assert bytes(reopen().read_blob(blob)) == b""


def test_a_blob_that_is_there_is_not_written_again(
    store: Store, reopen: Reopen, monkeypatch: pytest.MonkeyPatch
) -> None:
    def written(*_: Any) -> bool:
        raise AssertionError("written again")

    store.put_blob([CONTENT])
    for other in (store, reopen()):
        monkeypatch.setattr(other.files, "create", written)
        assert other.put_blob([CONTENT]) == (BLOB, len(CONTENT))


def test_many_threads_can_put_the_same_blob(store: Store) -> None:
    barrier = threading.Barrier(8)
    results: list[tuple[str, int]] = []

    def put() -> None:
        barrier.wait()
        results.append(store.put_blob([CONTENT]))

    in_threads(8, put)
    assert results == [(BLOB, len(CONTENT))] * 8
    assert paths(store, "") == [blob_path(BLOB)]


def in_threads(count: int, work: Callable[[], None]) -> None:
    threads = [threading.Thread(target=work) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_a_blob_that_is_not_there_is_an_error_that_says_what_to_do(store: Store) -> None:
    with pytest.raises(DamagedBlob, match=f"blob {BLOB} is missing from .*; running the recipe again"):
        store.read_blob(BLOB)


@pytest.mark.parametrize("length", [0, 1, len(CONTENT) // 2, -1])
def test_a_blob_cut_short_by_a_power_failure_is_written_again(store: Store, reopen: Reopen, length: int) -> None:
    store.put_blob([CONTENT])
    cut(store, blob_path(BLOB), length)
    assert reopen().put_blob([CONTENT]) == (BLOB, len(CONTENT))
    assert reopen().read_blob(BLOB) == CONTENT


def damage(store: Store, blob: str, how: str) -> None:
    match how:
        case "flipped":
            flip(store, blob_path(blob), 5)
        case "cut":
            cut(store, blob_path(blob), -1)
        case "emptied":
            cut(store, blob_path(blob), 0)


@pytest.mark.parametrize("how", ["flipped", "cut", "emptied"])
def test_a_damaged_blob_is_found_at_its_first_read_and_moved_aside(store: Store, reopen: Reopen, how: str) -> None:
    store.put_blob([CONTENT])
    damage(store, BLOB, how)
    damaged = bytes(store.files.read(blob_path(BLOB)))
    with pytest.raises(DamagedBlob, match=f"blob {BLOB} in .* was damaged .* running the recipe again"):
        reopen().read_blob(BLOB)
    (aside,) = paths(store, "")
    assert aside.startswith(f"damaged/{BLOB}")
    assert bytes(store.files.read(aside)) == damaged


@pytest.mark.parametrize("how", ["flipped", "cut", "emptied"])
def test_a_blob_that_was_moved_aside_is_written_again(store: Store, reopen: Reopen, how: str) -> None:
    store.put_blob([CONTENT])
    damage(store, BLOB, how)
    later = reopen()
    with pytest.raises(DamagedBlob):
        later.read_blob(BLOB)
    later.put_blob([CONTENT])
    assert reopen().read_blob(BLOB) == CONTENT


class Meeting:
    """Makes the first call of each of `count` threads wait until all have come, or a second has passed."""

    def __init__(self, count: int, call: Callable[..., Any]) -> None:
        self._barrier = threading.Barrier(count, timeout=1)
        self._call = call
        self._met = threading.local()

    def before(self, *arguments: Any) -> Any:
        self._meet()
        return self._call(*arguments)

    def after(self, *arguments: Any) -> Any:
        result = self._call(*arguments)
        self._meet()
        return result

    def _meet(self) -> None:
        if not hasattr(self._met, "done"):
            self._met.done = True
            with contextlib.suppress(threading.BrokenBarrierError):
                self._barrier.wait()


def outcomes(count: int, work: Callable[[], Any]) -> list[str]:
    """What `count` threads get out of the work: "done", or the name of an error."""
    results: list[str] = []

    def run() -> None:
        try:
            work()
            results.append("done")
        except Exception as error:  # noqa: BLE001  whichever it is, the test compares its name
            results.append(type(error).__name__)

    in_threads(count, run)
    return results


def test_readers_that_find_the_same_damage_at_once_are_all_told_so(
    store: Store, reopen: Reopen, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.put_blob([CONTENT])
    damage(store, BLOB, "flipped")
    shared = reopen()
    monkeypatch.setattr(shared.files, "read", Meeting(4, shared.files.read).after)
    assert outcomes(4, lambda: shared.read_blob(BLOB)) == ["DamagedBlob"] * 4


def test_writers_that_find_the_same_blob_cut_short_all_succeed(
    store: Store, reopen: Reopen, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.put_blob([CONTENT])
    damage(store, BLOB, "cut")
    shared = reopen()
    monkeypatch.setattr(shared.files, "move", Meeting(4, shared.files.move).before)
    assert outcomes(4, lambda: shared.put_blob([CONTENT])) == ["done"] * 4
    assert reopen().read_blob(BLOB) == CONTENT


def test_blobs_that_are_gone_or_cut_short_are_missing(store: Store, reopen: Reopen) -> None:
    blobs = dict(store.put_blob([CONTENT, bytes([number])]) for number in range(4))
    whole, gone, short, longer = blobs
    store.files.delete(blob_path(gone))
    cut(store, blob_path(short), -1)
    store.files.replace(blob_path(longer), [CONTENT, b"more"])
    later = reopen()
    assert sorted(later.missing_blobs(blobs)) == sorted([gone, short, longer])
    assert later.missing_blobs({whole: blobs[whole]}) == []


# Artifacts


def test_a_published_artifact_is_held(store: Store, reopen: Reopen, artifact: Artifact) -> None:
    assert store.holds(artifact)
    assert reopen().holds(artifact)
    assert list(reopen().artifact_ids()) == [artifact.id]


def test_a_manifest_of_a_blob_that_was_never_written_is_refused(store: Store) -> None:
    with pytest.raises(StoreError, match="1 blobs vanished"):
        store.put_manifest(Manifest(kind="checkpoint", files={"config.json": BLOB}, blobs={BLOB: len(CONTENT)}))
    assert list(store.artifact_ids()) == []


@pytest.mark.parametrize("how", ["flip", "cut", "remove"])
def test_a_damaged_manifest_is_found_and_healed_by_publishing_again(
    store: Store, reopen: Reopen, artifact: Artifact, how: str
) -> None:
    path = artifact_path(artifact.id)
    {"flip": flip, "cut": lambda *_: cut(store, path, -1), "remove": lambda *_: store.files.delete(path)}[how](
        store, path
    )
    later = reopen()
    with pytest.raises(DamagedBlob, match=artifact.id):
        later.manifest(artifact)
    assert not later.holds(artifact)
    assert publish(later) == artifact
    assert reopen().holds(artifact)


def test_a_file_of_an_artifact_is_read_by_name(store: Store, artifact: Artifact) -> None:
    assert store.read_file(artifact, "config") == CONFIG
    with pytest.raises(KeyError):
        store.read_file(artifact, "tokenizer.json")


# Actions


def test_a_recorded_action_is_found_with_all_that_was_recorded(reopen: Reopen, recorded: Action) -> None:
    found = lookup(reopen(), recorded)
    assert found == recorded
    assert found.provenance == {"seconds": 1.5}


@pytest.mark.usefixtures("recorded")
def test_an_action_of_another_key_or_stage_is_a_miss(store: Store, artifact: Artifact) -> None:
    other = action(artifact, seed=1)
    assert lookup(store, other) is None
    assert store.lookup("prune/magnitude", action(artifact).key) is None


def test_a_key_that_is_not_its_preimages_digest_is_refused(store: Store, artifact: Artifact) -> None:
    with pytest.raises(AssertionError):
        store.record(replace(action(artifact), key=BLOB))


def test_the_first_action_of_a_key_wins(store: Store, reopen: Reopen, recorded: Action) -> None:
    second = action(publish(store, block(0, seed=1)), seconds=9.0)
    assert second.key == recorded.key
    assert store.record(second) == recorded
    assert lookup(reopen(), recorded) == recorded


@pytest.mark.parametrize("lost", ["a blob", "part of a blob", "the manifest"])
def test_an_action_is_replaced_when_its_artifact_is_no_longer_whole(
    store: Store, reopen: Reopen, artifact: Artifact, recorded: Action, lost: str
) -> None:
    blob = blob_path(a_blob_of(store, artifact))
    match lost:
        case "a blob":
            store.files.delete(blob)
        case "part of a blob":
            cut(store, blob, -1)
        case "the manifest":
            store.files.delete(artifact_path(artifact.id))
    later = reopen()
    assert lookup(later, recorded) is None
    second = action(publish(later, {"other": large(1)}, other=b"{}"), seconds=9.0)
    assert later.record(second) == second
    assert lookup(reopen(), recorded) == second


def test_many_threads_that_record_one_key_agree_on_one_action(store: Store) -> None:
    artifacts = [publish(store, {}, number=str(number).encode()) for number in range(8)]
    barrier = threading.Barrier(8)
    results: list[Action] = []

    def record() -> None:
        mine = action(artifacts.pop())
        barrier.wait()
        results.append(store.record(mine))

    in_threads(8, record)
    assert results == [lookup(store, results[0])] * 8


@pytest.mark.parametrize("length", [None, 0, -1], ids=["missing", "emptied", "cut"])
def test_a_hit_needs_every_blob_in_full_length(
    store: Store, reopen: Reopen, artifact: Artifact, recorded: Action, length: int | None
) -> None:
    for blob in store.manifest(artifact).blobs:
        path = blob_path(blob)
        whole = bytes(store.files.read(path))
        if length is None:
            store.files.delete(path)
        else:
            cut(store, path, length)
        assert lookup(reopen(), recorded) is None
        store.files.replace(path, [whole])
    assert lookup(reopen(), recorded) == recorded


def test_a_hit_is_proven_anew_when_a_blob_went_since_the_last_one(
    store: Store, reopen: Reopen, artifact: Artifact, recorded: Action
) -> None:
    assert lookup(store, recorded) == recorded
    reopen().files.delete(blob_path(a_blob_of(store, artifact)))
    assert lookup(store, recorded) is None


def test_a_hit_turns_into_a_miss_when_a_read_finds_damage(
    store: Store, reopen: Reopen, artifact: Artifact, recorded: Action
) -> None:
    blob = a_blob_of(store, artifact)
    flip(store, blob_path(blob))
    later = reopen()
    assert lookup(later, recorded) == recorded  # all there in full length
    with pytest.raises(DamagedBlob):
        later.read_blob(blob)
    assert lookup(later, recorded) is None
    assert lookup(reopen(), recorded) is None


def test_a_damaged_artifact_is_whole_again_when_it_is_made_again(
    store: Store, reopen: Reopen, artifact: Artifact, recorded: Action
) -> None:
    for blob in store.manifest(artifact).blobs:
        flip(store, blob_path(blob))
    later = reopen()
    for blob in store.manifest(artifact).blobs:
        with pytest.raises(DamagedBlob):
            later.read_blob(blob)
    assert publish(later) == artifact
    assert lookup(reopen(), recorded) == recorded
    assert verify(reopen()) == []


@pytest.mark.parametrize("share", [0, 0.2, 0.4, 0.6, 0.8, 1])
def test_a_damaged_action_is_a_miss_and_is_replaced(
    store: Store, reopen: Reopen, recorded: Action, share: float
) -> None:
    path = action_path(recorded.stage, recorded.key)
    flip(store, path, int(share * (len(store.files.read(path)) - 1)))
    assert lookup(reopen(), recorded) is None
    with pytest.raises(DamagedBlob, match=recorded.key):
        store.action(recorded.stage, recorded.key)
    assert store.record(recorded) == recorded
    assert lookup(reopen(), recorded) == recorded


def test_an_action_under_the_key_of_another_is_a_miss(store: Store, recorded: Action) -> None:
    other = action(recorded.artifact, seed=1)
    store.files.create(
        action_path(other.stage, other.key), [store.files.read(action_path(recorded.stage, recorded.key))]
    )
    assert lookup(store, other) is None


def test_actions_are_listed_by_stage_and_damaged_ones_left_out(store: Store, artifact: Artifact) -> None:
    wanted = [store.record(action(artifact, seed=seed)) for seed in range(3)]
    damaged = store.record(action(artifact, seed=3))
    other = store.record(replace(action(artifact), stage="quantize/gptq"))
    flip(store, action_path(damaged.stage, damaged.key))
    by_key = {found.key: found for found in store.actions(STAGE)}
    assert by_key == {each.key: each for each in wanted}
    assert list(store.actions("quantize/gptq")) == [other]
    assert sum(1 for _ in store.actions()) == 4


# Refs and runs


def test_a_ref_points_at_what_it_was_last_set_to(store: Store, reopen: Reopen, artifact: Artifact) -> None:
    second = publish(store, block(0, seed=1))
    store.set_ref("demo/pruned", artifact)
    store.set_ref("demo/pruned", second)
    store.set_ref("demo/base", artifact)
    assert reopen().refs() == {"demo/pruned": second, "demo/base": artifact}


def test_a_ref_can_stand_beside_refs_below_its_name(store: Store, artifact: Artifact) -> None:
    store.set_ref("demo", artifact)
    store.set_ref("demo/pruned", artifact)
    assert store.refs() == {"demo": artifact, "demo/pruned": artifact}


@pytest.mark.parametrize("name", ["../outside", "demo/../../outside"])
def test_a_name_cannot_lead_out_of_its_folder(store: Store, artifact: Artifact, name: str) -> None:
    before = paths(store, "")
    with pytest.raises(StoreError):
        store.set_ref(name, artifact)
    with pytest.raises(StoreError):
        store.save_run(name, {})
    assert paths(store, "") == before


def test_a_damaged_ref_is_left_out_until_it_is_set_again(store: Store, artifact: Artifact) -> None:
    store.set_ref("demo/pruned", artifact)
    flip(store, ref_path("demo/pruned"), 20)
    assert store.refs() == {}
    store.set_ref("demo/pruned", artifact)
    assert store.refs() == {"demo/pruned": artifact}


def test_runs_are_read_back_in_order_and_damaged_ones_left_out(store: Store) -> None:
    for run in ("2026-03", "2026-01", "2026-02"):
        store.save_run(run, {"recipe": run})
    flip(store, "runs/2026-02", 20)
    assert list(store.runs().items()) == [("2026-01", {"recipe": "2026-01"}), ("2026-03", {"recipe": "2026-03"})]


def test_a_run_can_be_saved_again_as_it_goes_on(store: Store) -> None:
    store.save_run("1", {"state": "running"})
    store.save_run("1", {"state": "done"})
    assert store.runs() == {"1": {"state": "done"}}


@pytest.mark.parametrize("digits", [4, 12, 64])
def test_an_artifact_is_found_by_ref_by_id_and_by_the_beginning_of_its_id(
    store: Store, artifact: Artifact, digits: int
) -> None:
    publish(store, {}, other=b"{}")
    store.set_ref("demo/pruned", artifact)
    assert store.resolve("demo/pruned") == artifact
    assert store.resolve(artifact.id[:digits]) == artifact


def test_a_ref_that_looks_like_an_id_is_a_ref(store: Store, artifact: Artifact) -> None:
    other = publish(store, {}, other=b"{}")
    store.set_ref(artifact.id[:4], other)
    assert store.resolve(artifact.id[:4]) == other


def test_a_beginning_that_fits_several_artifacts_asks_for_more_digits(store: Store) -> None:
    ids = [publish(store, {}, number=str(number).encode()).id for number in range(17)]
    digit = max("0123456789abcdef", key=lambda digit: sum(each.startswith(digit) for each in ids))
    count = sum(each.startswith(digit) for each in ids)
    with pytest.raises(StoreError, match=f"'{digit}' fits {count} artifacts in .*; write more of its digits"):
        store.resolve(digit)


def test_a_misspelt_ref_gets_a_suggestion(store: Store, artifact: Artifact) -> None:
    store.set_ref("demo/pruned", artifact)
    with pytest.raises(StoreError, match=r"is called 'demo/prund'; did you mean 'demo/pruned'\?"):
        store.resolve("demo/prund")


@pytest.mark.usefixtures("artifact")
@pytest.mark.parametrize("name", ["", "zzz", "no such thing"])
def test_a_name_like_no_other_is_pointed_to_the_listing(store: Store, name: str) -> None:
    with pytest.raises(StoreError, match=f"is called '{name}'; `coldpress ls` shows what is there"):
        store.resolve(name)


# Where the store is


def test_the_default_store_is_in_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLDPRESS_STORE", raising=False)
    monkeypatch.chdir(tmp_path)
    Store.default().put_blob([CONTENT])
    assert (tmp_path / ".coldpress" / blob_path(BLOB)).read_bytes() == CONTENT


def test_the_environment_names_another_store(url: str, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLDPRESS_STORE", url)
    Store.default().put_blob([CONTENT])
    assert store.read_blob(BLOB) == CONTENT


def test_opening_a_store_writes_nothing(folder: str) -> None:
    store = Store(folder)
    assert store.refs() == {}
    assert list(store.artifact_ids()) == []
    assert not os.path.exists(folder)


# A full disk


def refusal(store: Store) -> str:
    """What the store says when it can't publish; nothing when it can."""
    try:
        store.record(action(publish(store)))
    except StoreError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("call", ["write", "fsync", "link", "mkdir"])
def test_a_disk_that_is_full_at_any_call_leaves_no_half(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    for at in range(1, 100):
        store = Store(str(tmp_path / f"{at}"))
        failing = FailingOs(call, at, errno.ENOSPC)
        with monkeypatch.context() as patch:
            patch.setattr("coldpress.storage.files.os", failing)
            said = refusal(store)
        if not failing.happened:
            break
        assert said.startswith("the disk is full: could not write ")
        assert paths(store, "tmp") == []
        assert verify(Store(store.url)) == []
        assert list(store.actions()) == []
        published = publish(store)
        assert store.record(action(published)) == lookup(Store(store.url), action(published))
    assert 1 < at < 99


# Kill -9


def test_a_killed_writer_leaves_a_whole_store_and_no_more_than_temporary_files(folder: str) -> None:
    script = str(Path(__file__).with_name("endless_writer.py"))
    dice = random.Random(0)
    for number in range(10):
        writer = subprocess.Popen([sys.executable, script, folder, str(number)], stdout=subprocess.PIPE, text=True)
        assert writer.stdout is not None
        said = [writer.stdout.readline()]
        time.sleep(dice.uniform(0, 0.1))
        writer.kill()
        said += writer.stdout.readlines()
        writer.wait()

        store = Store(folder)
        done = {line for line in said if line.endswith("\n")}
        recorded = [each for each in store.actions("write") if each.preimage["writer"] == str(number)]
        assert done
        assert done <= {f"{each.preimage['number']}\n" for each in recorded}
        assert all(lookup(store, each) for each in recorded)
        assert verify(store) == []
        assert {path.split("/")[0] for path in paths(store, "")} <= {"blobs", "artifacts", "actions", "refs", "tmp"}


# Power cuts


@pytest.fixture
def record_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., RecordingOs]:
    """Starts to record what happens to the disk, below the folder of this test, until the test ends."""

    def start(**options: Any) -> RecordingOs:
        recording = RecordingOs(tmp_path, **options)
        monkeypatch.setattr("coldpress.storage.files.os", recording)
        return recording

    return start


@pytest.fixture
def after_power_cut(folder: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[Tree], Store]:
    """Puts a tree that a power cut left on the disk and opens the store in it."""

    def restart(tree: Tree) -> Store:
        monkeypatch.setattr("coldpress.storage.files.os", os)
        monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # this disk won't be cut off again
        shutil.rmtree(folder, ignore_errors=True)
        write_tree(tree, tmp_path)
        return Store(folder)

    return restart


Record = Callable[..., RecordingOs]
Restart = Callable[[Tree], Store]


def state(store: Store, action: Action) -> str:
    """What a later process makes of an action: "miss", "hit", or "damage" when a hit is not what it promises."""
    found = lookup(store, action)
    if found is None:
        return "miss"
    try:
        for blob in store.manifest(found.artifact).blobs:
            store.read_blob(blob)
    except DamagedBlob:
        return "damage"
    return "hit"


def test_the_recorded_operations_are_all_that_happened_to_the_disk(
    folder: str, tmp_path: Path, record_disk: Record
) -> None:
    recording = record_disk()
    store = Store(folder)
    store.record(action(publish(store)))
    store.set_ref("demo", publish(store, block(0, seed=1)))
    assert undisturbed(recording) == read_tree(tmp_path)


def test_a_power_cut_while_publishing_leaves_no_action_or_a_whole_one(
    folder: str, record_disk: Record, after_power_cut: Restart
) -> None:
    recording = record_disk()
    store = Store(folder)
    recorded = store.record(action(publish(store)))
    seen = {state(after_power_cut(tree), recorded) for tree in power_cuts(recording)}
    assert seen == {"miss", "hit"}


def test_a_power_cut_while_publishing_leaves_nothing_that_points_at_what_is_lost(
    folder: str, record_disk: Record, after_power_cut: Restart
) -> None:
    recording = record_disk()
    store = Store(folder)
    artifact = publish(store)
    store.record(action(artifact))
    store.set_ref("demo", artifact)
    for tree in power_cuts(recording):
        assert verify(after_power_cut(tree)) == []


@pytest.mark.parametrize(("forget", "consequence"), [("files", "damage"), ("folders", "miss")])
def test_it_would_be_noticed_if_files_or_folders_were_not_synced(
    folder: str, record_disk: Record, after_power_cut: Restart, forget: str, consequence: str
) -> None:
    recording = record_disk(forget=forget)
    store = Store(folder)
    recorded = store.record(action(publish(store)))
    assert any(state(after_power_cut(tree), recorded) == consequence for tree in late_power_cuts(recording))


def test_an_action_that_was_recorded_survives_a_power_cut(
    folder: str, record_disk: Record, after_power_cut: Restart
) -> None:
    recording = record_disk()
    store = Store(folder)
    artifact = publish(store)
    recorded = store.record(action(artifact))
    for tree in late_power_cuts(recording):
        later = after_power_cut(tree)
        assert lookup(later, recorded) == recorded
        assert same(read(later, artifact), block(0))


def test_publishing_again_after_a_power_cut_makes_the_store_whole(
    folder: str, record_disk: Record, after_power_cut: Restart
) -> None:
    recording = record_disk()
    store = Store(folder)
    recorded = store.record(action(publish(store)))
    for tree in power_cuts(recording):
        later = after_power_cut(tree)
        assert later.record(action(publish(later))) == recorded
        assert state(Store(folder), recorded) == "hit"
        assert verify(Store(folder)) == []


def test_a_power_cut_while_an_action_is_replaced_leaves_no_action_or_a_whole_one(
    folder: str, record_disk: Record, after_power_cut: Restart
) -> None:
    store = Store(folder)
    broken = publish(store)
    store.record(action(broken))
    store.files.delete(blob_path(a_blob_of(store, broken)))
    store.files.sync()
    recording = record_disk()
    later = Store(folder)
    recorded = later.record(action(publish(later, {"other": large(1)}, other=b"{}")))
    seen = {state(after_power_cut(tree), recorded) for tree in power_cuts(recording)}
    assert seen == {"miss", "hit"}


def test_what_was_published_earlier_outlasts_a_power_cut_while_more_is_published(
    folder: str, record_disk: Record, after_power_cut: Restart
) -> None:
    store = Store(folder)
    earlier = store.record(action(publish(store)))
    recording = record_disk()
    later = Store(folder)
    later.record(action(publish(later, {**block(0), "other": large(1)}), seed=1))
    assert {state(after_power_cut(tree), earlier) for tree in power_cuts(recording)} == {"hit"}


def test_a_power_cut_while_a_ref_is_set_leaves_the_old_or_the_new(
    folder: str, record_disk: Record, after_power_cut: Restart
) -> None:
    store = Store(folder)
    old, new = publish(store), publish(store, block(0, seed=1))
    store.set_ref("demo", old)
    store.files.sync()
    recording = record_disk()
    Store(folder).set_ref("demo", new)
    seen = [after_power_cut(tree).refs() for tree in power_cuts(recording)]
    assert {"demo": old} in seen
    assert {"demo": new} in seen
    assert all(refs in ({"demo": old}, {"demo": new}) for refs in seen)


@pytest.mark.parametrize("what", ["blobs", "an artifact", "an action"])
def test_what_builds_on_the_unsynced_work_of_another_writer_survives_a_power_cut(
    folder: str, record_disk: Record, after_power_cut: Restart, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    recording = record_disk()
    other = Store(folder)
    with monkeypatch.context() as patch:
        patch.setattr(other.files, "sync", lambda: None)  # it was killed before it came to that
        with ArtifactWriter(other, "checkpoint") as writer:
            writer.add_tensors(block(0), "model.layers.0.")
            writer.add_file("config", CONFIG)
            if what != "blobs":
                published = writer.publish()
        if what == "an action":
            other.record(action(published))
    store = Store(folder)
    recorded = store.record(action(publish(store)))
    for tree in late_power_cuts(recording):
        assert state(after_power_cut(tree), recorded) == "hit"


def test_names_and_pins_are_taken_away_once(store: Store) -> None:
    artifact = publish(store)
    store.set_ref("demo/pruned", artifact)
    store.pin(artifact)
    assert store.pins() == {artifact.id}
    store.delete_ref("demo/pruned")
    store.unpin(artifact)
    assert (store.refs(), store.pins()) == ({}, set())
    with pytest.raises(StoreError, match=r"nothing in .* is called 'demo/pruned'"):
        store.delete_ref("demo/pruned")
    with pytest.raises(StoreError, match="is not pinned"):
        store.unpin(artifact)
    assert store.holds(artifact)
