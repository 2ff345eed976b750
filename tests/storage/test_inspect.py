"""Verify and usage: what is damaged, what takes how much room."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from coldpress.storage.artifacts import Artifact
from coldpress.storage.errors import StoreError
from coldpress.storage.inspect import Finding, Usage, usage, verify
from coldpress.storage.store import Store, action_path, artifact_path, blob_path
from sabotage import cut, flip, paths
from samples import CONFIG, action, block, large, publish, ref_path

Reopen = Callable[[], Store]
SAMPLES = 8


@pytest.fixture
def artifact(store: Store) -> Artifact:
    """A published block with its action, two refs and a run."""
    published = publish(store)
    store.record(action(published, seconds=1.5))
    store.set_ref("demo/pruned", published)
    store.set_ref("demo/final", published)
    store.save_run("0001", {"recipe": "demo"})
    return published


def findings_for(store: Store, path: str) -> list[Finding]:
    return [finding for finding in verify(store) if finding.path == path]


def blob_of(store: Store, artifact: Artifact, name: str) -> str:
    return blob_path(store.manifest(artifact).tensors[f"model.layers.0.{name}"].blob)


def test_an_empty_store_is_whole(store: Store) -> None:
    assert verify(store) == []


@pytest.mark.usefixtures("artifact")
def test_a_store_that_nobody_touched_is_whole(store: Store, reopen: Reopen) -> None:
    assert verify(store) == []
    assert verify(reopen()) == []


@pytest.mark.usefixtures("artifact")
@pytest.mark.parametrize("kind", ["blobs", "artifacts", "actions", "refs", "runs"])
def test_a_flipped_byte_is_found_in_every_kind_of_file(store: Store, kind: str) -> None:
    for path in paths(store, kind):
        whole = bytes(store.files.read(path))
        for sample in range(SAMPLES):
            flip(store, path, sample * (len(whole) - 1) // (SAMPLES - 1))
            assert findings_for(store, path), f"{path}, sample {sample}"
            store.files.replace(path, [whole])
    assert verify(store) == []


@pytest.mark.usefixtures("artifact")
@pytest.mark.parametrize("kind", ["blobs", "artifacts", "actions", "refs", "runs"])
@pytest.mark.parametrize("length", [0, 1, -1])
def test_a_file_cut_short_is_found_in_every_kind_of_file(store: Store, kind: str, length: int) -> None:
    for path in paths(store, kind):
        cut(store, path, length)
        assert findings_for(store, path)


def test_a_damaged_blob_names_the_refs_that_need_it(store: Store, artifact: Artifact) -> None:
    path = blob_of(store, artifact, "mlp.weight")
    flip(store, path)
    (finding,) = verify(store)
    assert finding.path == path
    assert sorted(finding.needed_by) == ["demo/final", "demo/pruned"]


def test_a_damaged_blob_names_all_artifacts_that_share_it(store: Store, artifact: Artifact) -> None:
    unnamed = publish(store, {"lm_head.weight": large()})
    flip(store, blob_of(store, artifact, "mlp.weight"))
    (finding,) = verify(store)
    assert sorted(finding.needed_by) == [f"artifact {unnamed.short}", "demo/final", "demo/pruned"]


def test_a_missing_blob_is_found_with_the_refs_that_need_it(store: Store, artifact: Artifact) -> None:
    path = blob_of(store, artifact, "norm.weight")
    store.files.delete(path)
    (finding,) = verify(store)
    assert (finding.path, finding.problem) == (path, "missing")
    assert sorted(finding.needed_by) == ["demo/final", "demo/pruned"]


def test_a_damaged_manifest_names_the_refs_and_shows_what_points_at_it(store: Store, artifact: Artifact) -> None:
    flip(store, artifact_path(artifact.id))
    found = {finding.path: finding for finding in verify(store)}
    assert sorted(found[artifact_path(artifact.id)].needed_by) == ["demo/final", "demo/pruned"]
    assert set(found) == {
        artifact_path(artifact.id),
        ref_path("demo/pruned"),
        ref_path("demo/final"),
        *paths(store, "actions"),
    }


def test_refs_and_actions_of_an_artifact_that_is_gone_are_found(store: Store, artifact: Artifact) -> None:
    store.files.delete(artifact_path(artifact.id))
    expected = action(artifact)
    assert {finding.path for finding in verify(store)} == {
        ref_path("demo/pruned"),
        ref_path("demo/final"),
        action_path(expected.stage, expected.key),
    }


@pytest.mark.usefixtures("artifact")
def test_a_blob_under_the_name_of_another_is_found(store: Store) -> None:
    one, another, *_ = paths(store, "blobs")
    store.files.replace(one, [store.files.read(another)])
    assert [finding.path for finding in verify(store)] == [one]


def test_every_damage_is_found_at_once(store: Store, artifact: Artifact) -> None:
    damaged = [*paths(store, "blobs"), ref_path("demo/final"), "runs/0001"]
    for path in damaged:
        flip(store, path)
    assert {finding.path for finding in verify(store)} == set(damaged)


def test_a_blob_is_hashed_again_although_it_was_already_read(store: Store, artifact: Artifact) -> None:
    for blob in store.manifest(artifact).blobs:
        store.read_blob(blob)
    flip(store, blob_of(store, artifact, "mlp.weight"))
    assert len(verify(store)) == 1


def test_verifying_sets_damaged_blobs_aside_and_changes_nothing_else(store: Store, artifact: Artifact) -> None:
    path = blob_of(store, artifact, "mlp.weight")
    flip(store, path)
    flip(store, ref_path("demo/final"))
    before = {path: bytes(store.files.read(path)) for path in paths(store, "")}
    verify(store)
    after = {path: bytes(store.files.read(path)) for path in paths(store, "")}
    (aside,) = after.keys() - before.keys()
    assert aside.startswith("damaged/")
    assert after.pop(aside) == before.pop(path)
    assert after == before


def test_a_blob_that_is_damaged_after_it_was_read_is_found(store: Store, artifact: Artifact) -> None:
    path = blob_of(store, artifact, "mlp.weight")
    assert verify(store) == []
    flip(store, path)
    assert [finding.path for finding in verify(store)] == [path]


def test_a_damaged_blob_names_the_stage_when_its_result_has_no_name(store: Store) -> None:
    published = publish(store)
    store.record(action(published, recipe="demo", node="pruned"))
    flip(store, blob_of(store, published, "mlp.weight"))
    (finding,) = verify(store)
    assert finding.needed_by == ("prune/wanda of demo/pruned",)


@pytest.mark.usefixtures("artifact")
def test_unpublished_and_set_aside_files_are_no_findings(store: Store) -> None:
    store.files.create("tmp/half", [b"half"])
    store.files.create("damaged/blob", [b"half"])
    store.put_blob([b"of an artifact that was never published"])
    assert verify(store) == []


@pytest.mark.usefixtures("artifact")
def test_progress_counts_every_blob(store: Store) -> None:
    steps: list[tuple[int, int]] = []
    verify(store, lambda done, total: steps.append((done, total)))
    assert steps == [(1, 3), (2, 3), (3, 3)]


def test_an_empty_store_takes_no_room(store: Store) -> None:
    assert usage(store) == Usage(artifacts=0, blobs=0, logical=0, stored=0, unreferenced=0)


def test_shared_blobs_are_stored_once_and_counted_for_each_artifact(store: Store) -> None:
    one = store.manifest(publish(store, block(0), config=CONFIG))
    two = store.manifest(publish(store, block(0), config=CONFIG, tokenizer=b"{}"))
    found = usage(store)
    assert (found.artifacts, found.blobs, found.unreferenced) == (2, 4, 0)
    assert found.logical == one.stored_bytes() + two.stored_bytes()
    assert found.stored == two.stored_bytes() == sum(size for _, size in store.files.list("blobs"))


def test_equal_tensors_of_one_artifact_are_counted_once(store: Store) -> None:
    manifest = store.manifest(publish(store, {"a": large(), "b": large()}))
    found = usage(store)
    assert len(manifest.blobs) == 2  # the tensors' and the config's
    assert found.logical == found.stored == manifest.stored_bytes() < 2 * large().nbytes


@pytest.mark.usefixtures("artifact")
def test_blobs_that_no_artifact_needs_are_counted_as_unreferenced(store: Store) -> None:
    before = usage(store)
    store.put_blob([bytes(1000)])
    after = usage(store)
    assert (after.unreferenced, after.stored, after.logical) == (1000, before.stored + 1000, before.logical)


def test_a_damaged_manifest_sends_the_user_to_verify(store: Store, artifact: Artifact) -> None:
    flip(store, artifact_path(artifact.id))
    with pytest.raises(StoreError, match="`coldpress verify` lists all damage"):
        usage(store)
