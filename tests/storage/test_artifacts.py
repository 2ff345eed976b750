"""Artifacts: how tensors become blobs, what an id depends on, and reading back."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from coldpress.storage.artifacts import (
    LONE_NAME,
    OWN_BLOB_BYTES,
    ArtifactReader,
    ArtifactWriter,
    Manifest,
    TensorEntry,
    pack_mask,
    unpack_mask,
)
from coldpress.storage.digests import sha256
from coldpress.storage.errors import DamagedBlob, StoreError
from coldpress.storage.store import Store, blob_path
from hypothesis import given, settings
from hypothesis import strategies as st
from sabotage import flip, paths
from samples import CONFIG, block, large, publish, random_tensor, read, same

Reopen = Callable[[], Store]


def load_blob(store: Store, blob: str) -> dict[str, torch.Tensor]:
    """A stored blob as the safetensors library reads it."""
    return safetensors.torch.load(bytes(store.files.read(blob_path(blob))))


def written(store: Store, tensors: dict[str, torch.Tensor], prefix: str = "") -> Manifest:
    """The manifest of an artifact of these tensors."""
    with ArtifactWriter(store, "checkpoint") as writer:
        writer.add_tensors(tensors, prefix)
        return store.manifest(writer.publish())


def written_blocks(store: Store, *blocks: dict[str, torch.Tensor]) -> Manifest:
    """The manifest of an artifact of these blocks, added in turn."""
    with ArtifactWriter(store, "checkpoint") as writer:
        for index, tensors in enumerate(blocks):
            writer.add_tensors(tensors, f"model.layers.{index}.")
        return store.manifest(writer.publish())


# Tensors into blobs


def test_a_large_tensor_is_a_blob_of_its_own(store: Store) -> None:
    weight = large()
    entry = written(store, {"lm_head.weight": weight}).tensors["lm_head.weight"]
    assert entry == TensorEntry("F32", (128, 128), entry.blob, LONE_NAME)
    assert same(load_blob(store, entry.blob), {LONE_NAME: weight})


def test_equal_large_tensors_are_one_blob_under_any_name(store: Store) -> None:
    manifest = written(store, {"q_proj.weight": large(), "lm_head.weight": large().clone()})
    assert len(manifest.blobs) == 1
    assert len(paths(store, "blobs")) == 1


def test_equal_bytes_of_another_shape_or_dtype_are_another_blob(store: Store) -> None:
    bits = large().view(torch.int32)
    manifest = written(store, {"a": bits, "b": bits.reshape(64, 256), "c": bits.view(torch.float32)})
    assert len(manifest.blobs) == 3


def test_small_tensors_of_a_block_share_a_blob_under_names_relative_to_it(store: Store) -> None:
    tensors = block(3)
    manifest = written(store, tensors, "model.layers.3.")
    entry = manifest.tensors["model.layers.3.norm.weight"]
    assert entry.name == "norm.weight"
    assert same(
        load_blob(store, entry.blob),
        {"norm.weight": tensors["model.layers.3.norm.weight"], "norm.bias": tensors["model.layers.3.norm.bias"]},
    )


def test_a_tensor_one_byte_short_of_the_limit_shares_a_blob(store: Store) -> None:
    tensors = {
        "below": torch.zeros(OWN_BLOB_BYTES - 1, dtype=torch.uint8),
        "at": torch.zeros(OWN_BLOB_BYTES, dtype=torch.uint8),
    }
    manifest = written(store, tensors)
    assert {name: entry.name for name, entry in manifest.tensors.items()} == {"below": "below", "at": LONE_NAME}


def test_equal_blocks_share_all_blobs(store: Store) -> None:
    manifest = written_blocks(store, block(0), block(1), block(2))
    assert len(manifest.tensors) == 9
    assert len(manifest.blobs) == len(paths(store, "blobs")) == 2


def test_blocks_that_differ_in_one_tensor_share_the_others(store: Store) -> None:
    changed = block(1)
    changed["model.layers.1.mlp.weight"] = large(seed=7)
    assert len(written_blocks(store, block(0), changed).blobs) == 3


def test_a_manifest_gives_the_size_of_each_blob(store: Store) -> None:
    manifest = store.manifest(publish(store))
    assert manifest.blobs == {blob: store.files.size(blob_path(blob)) for blob in manifest.blobs}
    assert manifest.stored_bytes() == sum(manifest.blobs.values()) > large().nbytes


@pytest.mark.parametrize(
    "tensor",
    [
        random_tensor(3, 5).to(torch.bfloat16),
        random_tensor(3, 5).to(torch.float16),
        random_tensor(3, 5).to(torch.float8_e4m3fn),
        torch.tensor([[-(2**31), 2**31 - 1]], dtype=torch.int32),
        torch.tensor([2**62, -1]),
        torch.tensor([0, 255], dtype=torch.uint8),
        torch.tensor([True, False, True]),
        torch.tensor(2.5),
        torch.empty(0, 4),
        random_tensor(6, 4).T,
        random_tensor(200, 300).T.to(torch.bfloat16),
    ],
    ids=lambda tensor: f"{tensor.dtype} {list(tensor.shape)}",
)
def test_tensors_of_every_kind_are_read_back_as_they_were(store: Store, reopen: Reopen, tensor: torch.Tensor) -> None:
    with ArtifactWriter(store, "checkpoint") as writer:
        writer.add_tensors({"odd": torch.tensor([1, 2, 3], dtype=torch.uint8), "tensor": tensor})
        artifact = writer.publish()
    back = read(reopen(), artifact)["tensor"]
    assert (back.dtype, back.shape) == (tensor.dtype, tensor.shape)
    assert torch.equal(back.reshape(-1).view(torch.uint8), tensor.reshape(-1).contiguous().view(torch.uint8))


# Sharing


@pytest.fixture
def source(store: Store) -> Manifest:
    """An artifact with tensors, masks and a file."""
    with ArtifactWriter(store, "checkpoint") as writer:
        writer.add_tensors(block(0), "model.layers.0.")
        writer.add_masks({"model.layers.0.mlp.weight": large() > 0.5}, "model.layers.0.")
        writer.add_file("config.json", CONFIG)
        return store.manifest(writer.publish())


def test_shared_tensors_masks_and_files_move_no_bytes(
    store: Store, source: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    def moved(*_: Any) -> None:
        raise AssertionError("bytes were moved")

    monkeypatch.setattr(store, "put_blob", moved)
    monkeypatch.setattr(store, "read_blob", moved)
    with ArtifactWriter(store, "checkpoint") as writer:
        writer.share(source, source.tensors)
        writer.share_masks(source)
        writer.share_files(source)
        assert store.manifest(writer.publish()) == source


def test_an_artifact_that_shares_a_part_needs_only_the_blobs_of_that_part(store: Store, source: Manifest) -> None:
    with ArtifactWriter(store, "checkpoint") as writer:
        writer.share(source, ["model.layers.0.norm.weight"])
        manifest = store.manifest(writer.publish())
    entry = source.tensors["model.layers.0.norm.weight"]
    assert manifest.tensors == {"model.layers.0.norm.weight": entry}
    assert manifest.blobs == {entry.blob: source.blobs[entry.blob]}


def test_a_shared_tensor_that_the_source_lacks_is_an_error(store: Store, source: Manifest) -> None:
    with ArtifactWriter(store, "checkpoint") as writer, pytest.raises(KeyError, match="lm_head"):
        writer.share(source, ["lm_head.weight"])


def test_a_file_written_twice_is_there_once_with_its_later_content(store: Store) -> None:
    with ArtifactWriter(store, "metrics") as writer:
        writer.add_file("metrics.json", b"earlier")
        writer.add_file("metrics.json", b"later")
        artifact = writer.publish()
    assert store.read_file(artifact, "metrics.json") == b"later"
    assert list(store.manifest(artifact).blobs) == [sha256(b"later")]


# Ids


def test_an_id_does_not_depend_on_the_order_of_adding(store: Store) -> None:
    with ArtifactWriter(store, "checkpoint") as writer:
        writer.add_file("b.json", b"b")
        for index in (1, 0):
            writer.add_tensors(dict(reversed(block(index, seed=index).items())), f"model.layers.{index}.")
        writer.add_file("a.json", b"a")
        one = writer.publish()
    with ArtifactWriter(store, "checkpoint") as writer:
        for index in (0, 1):
            writer.add_tensors(block(index, seed=index), f"model.layers.{index}.")
        for name in ("a", "b"):
            writer.add_file(f"{name}.json", name.encode())
        assert writer.publish() == one


def test_an_id_is_the_same_in_another_store(store: Store, tmp_path: Any) -> None:
    assert publish(Store(str(tmp_path / "another"))) == publish(store)


@pytest.mark.parametrize("seed", ["0", "1", "4711"])
def test_an_id_is_the_same_in_a_process_with_other_hashes(folder: str, seed: str) -> None:
    script = """
import sys
from coldpress.storage.artifacts import ArtifactWriter, TensorEntry
from coldpress.storage.store import Store

with ArtifactWriter(Store(sys.argv[1]), "checkpoint") as writer:
    for name in {"one", "two", "three", "four", "five"}:
        writer.add_file(name, name.encode())
    print(writer.publish(quantization={key: 1 for key in {"bits", "sym", "group_size"}}).id)
"""
    process = subprocess.run(
        [sys.executable, "-c", script, folder],
        env={**os.environ, "PYTHONHASHSEED": seed},
        capture_output=True,
        text=True,
        check=True,
    )
    with ArtifactWriter(Store(folder), "checkpoint") as writer:
        for name in ("one", "two", "three", "four", "five"):
            writer.add_file(name, name.encode())
        artifact = writer.publish(quantization={"group_size": 1, "sym": 1, "bits": 1})
    assert process.stdout.strip() == artifact.id


def test_an_id_is_pinned() -> None:
    entry = TensorEntry("BF16", (2, 3), "ab" * 32, "tensor")
    manifest = Manifest(kind="checkpoint", tensors={"lm_head.weight": entry}, blobs={"ab" * 32: 84})
    blob = '"' + "ab" * 32 + '"'
    expected = (
        f'{{"base":null,"blobs":{{{blob}:84}},"files":{{}},"format":"dense","kind":"checkpoint","masks":{{}},'
        f'"quantization":null,"tensors":{{"lm_head.weight":["BF16",[2,3],{blob},"tensor"]}}}}'
    )
    assert manifest.to_json() == expected.encode()


def test_everything_that_a_manifest_says_counts_for_its_id() -> None:
    blob, other = "ab" * 32, "cd" * 32
    entry = TensorEntry("BF16", (2, 3), blob, "tensor")
    manifest = Manifest(kind="checkpoint", tensors={"w": entry}, blobs={blob: 84})
    changed = [
        replace(manifest, kind="adapter"),
        replace(manifest, tensors={"v": entry}),
        replace(manifest, tensors={"w": entry._replace(dtype="F16")}),
        replace(manifest, tensors={"w": entry._replace(shape=(3, 2))}),
        replace(manifest, tensors={"w": entry._replace(blob=other)}),
        replace(manifest, tensors={"w": entry._replace(name="w")}),
        replace(manifest, masks={"w": entry}),
        replace(manifest, files={"w": blob}),
        replace(manifest, format="gptq"),
        replace(manifest, quantization={"bits": 4}),
        replace(manifest, base=other),
    ]
    assert len({each.to_json() for each in (manifest, *changed)}) == 12


def test_a_manifest_is_read_back_as_it_was_written(store: Store) -> None:
    with ArtifactWriter(store, "adapter") as writer:
        writer.add_tensors(block(0), "model.layers.0.")
        writer.add_masks({"model.layers.0.mlp.weight": large() > 0.5})
        writer.add_file("adapter_config.json", CONFIG)
        artifact = writer.publish(format="gptq", quantization={"bits": 4, "sym": True}, base="ab" * 32)
    manifest = store.manifest(artifact)
    assert (manifest.kind, manifest.format, manifest.base) == ("adapter", "gptq", "ab" * 32)
    assert manifest.quantization == {"bits": 4, "sym": True}
    assert sha256(manifest.to_json()) == artifact.id


# Masks


@settings(deadline=None)
@given(st.integers(1, 6), st.integers(1, 41), st.integers(0, 2**32 - 1))
def test_masks_of_any_width_are_packed_highest_bit_first_and_unpacked_again(rows: int, columns: int, seed: int) -> None:
    mask = torch.from_numpy(np.random.default_rng(seed).random((rows, columns)) < 0.5)
    packed = pack_mask(mask)
    assert np.array_equal(packed.numpy(), np.packbits(mask.numpy(), axis=1))
    assert torch.equal(unpack_mask(packed, (rows, columns)), mask)


@pytest.mark.parametrize("columns", [1, 7, 8, 13, 576])
def test_masks_are_read_back_under_the_names_of_their_weights(store: Store, reopen: Reopen, columns: int) -> None:
    mask = random_tensor(5, columns) < 0.5
    with ArtifactWriter(store, "checkpoint") as writer:
        writer.add_tensors({"mlp.weight": random_tensor(5, columns), "other.weight": torch.zeros(5, columns)})
        writer.add_masks({"mlp.weight": mask})
        artifact = writer.publish()
    shapes = {"mlp.weight": (5, columns), "other.weight": (5, columns)}
    with ArtifactReader(reopen(), artifact) as reader:
        assert same(reader.masks(shapes), {"mlp.weight": mask})


def test_zeros_in_a_weight_are_no_mask(store: Store) -> None:
    assert written(store, {"mlp.weight": torch.zeros(128, 128)}).masks == {}


def test_equal_masks_of_equal_blocks_share_a_blob(store: Store) -> None:
    with ArtifactWriter(store, "checkpoint") as writer:
        for index in range(3):
            writer.add_masks({f"model.layers.{index}.mlp.weight": large() > 0.5}, f"model.layers.{index}.")
        assert len(store.manifest(writer.publish()).blobs) == 1


# Publishing


def test_nothing_is_visible_before_it_is_published(store: Store, reopen: Reopen) -> None:
    with ArtifactWriter(store, "checkpoint") as writer:
        writer.add_tensors(block(0), "model.layers.0.")
        writer.add_tensors(block(1), "model.layers.1.")
        writer.add_file("config.json", CONFIG)
        assert list(reopen().artifact_ids()) == []
        artifact = writer.publish()
        assert list(reopen().artifact_ids()) == [artifact.id]


def test_a_writer_that_is_left_by_an_error_publishes_nothing(store: Store) -> None:
    def give_up() -> None:
        with ArtifactWriter(store, "checkpoint") as writer:
            writer.add_tensors(block(0), "model.layers.0.")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        give_up()
    assert list(store.artifact_ids()) == []


@pytest.mark.parametrize("later", ["publish", "add_tensors"])
def test_a_blob_that_could_not_be_written_stops_the_writer(
    store: Store, monkeypatch: pytest.MonkeyPatch, later: str
) -> None:
    def refuse(*_: Any) -> None:
        raise StoreError("the disk is full")

    monkeypatch.setattr(store.files, "create", refuse)
    with ArtifactWriter(store, "checkpoint") as writer:
        writer.add_tensors(block(0), "model.layers.0.")
        with pytest.raises(StoreError, match="the disk is full"):
            writer.publish() if later == "publish" else writer.add_tensors(block(1), "model.layers.1.")
        monkeypatch.undo()
        with pytest.raises(StoreError, match="the disk is full"):
            writer.publish()
    assert list(store.artifact_ids()) == []


def test_a_tensor_that_is_changed_while_it_is_written_is_never_read_as_something_else(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed, go_on = threading.Event(), threading.Event()
    create = store.files.create

    def create_later(path: str, buffers: Any) -> bool:
        hashed.set()
        go_on.wait(30)
        return create(path, buffers)

    monkeypatch.setattr(store.files, "create", create_later)
    weight = large()
    with ArtifactWriter(store, "checkpoint") as writer:
        writer.add_tensors({"w": weight})
        assert hashed.wait(30)
        weight.zero_()
        go_on.set()
        artifact = writer.publish()
    with ArtifactReader(store, artifact) as reader, pytest.raises(DamagedBlob):
        reader.tensors(["w"])


def test_an_artifact_is_not_published_when_one_of_its_blobs_has_gone_meanwhile(store: Store, reopen: Reopen) -> None:
    with ArtifactWriter(store, "checkpoint") as writer:
        writer.add_file("config.json", CONFIG)
        reopen().files.delete(blob_path(sha256(CONFIG)))
        with pytest.raises(StoreError, match="vanished"):
            writer.publish()
    assert list(store.artifact_ids()) == []


# Reading


def test_prefetched_tensors_are_the_same_tensors(store: Store, reopen: Reopen) -> None:
    artifact = publish(store)
    with ArtifactReader(reopen(), artifact) as reader:
        reader.prefetch(reader.manifest.tensors)
        assert same(reader.tensors(reader.manifest.tensors), block(0))


def test_tensors_of_one_blob_can_be_read_in_several_calls(store: Store) -> None:
    tensors = block(0)
    with ArtifactReader(store, publish(store)) as reader:
        reader.prefetch(["model.layers.0.norm.bias"])
        for name in ("model.layers.0.norm.weight", "model.layers.0.norm.bias", "model.layers.0.norm.weight"):
            assert same(reader.tensors([name]), {name: tensors[name]})


def test_a_tensor_that_was_read_can_be_changed_without_changing_the_store(store: Store) -> None:
    artifact = publish(store)
    for tensor in read(store, artifact).values():
        tensor.zero_()
    assert same(read(store, artifact), block(0))


def test_equal_tensors_read_in_one_call_can_be_changed_one_by_one(store: Store) -> None:
    zeros = {"q.lora_B": torch.zeros(128, 128), "k.lora_B": torch.zeros(128, 128)}
    both = read(store, publish(store, zeros))
    both["q.lora_B"].fill_(1)
    assert both["k.lora_B"].count_nonzero() == 0


def test_small_tensors_of_equal_blocks_read_in_one_call_can_be_changed_one_by_one(store: Store) -> None:
    with ArtifactWriter(store, "checkpoint") as writer:
        for index in range(2):
            writer.add_tensors(block(index), f"model.layers.{index}.")
        artifact = writer.publish()
    both = read(store, artifact)
    both["model.layers.0.norm.weight"].zero_()
    assert same({"": both["model.layers.1.norm.weight"]}, {"": block(1)["model.layers.1.norm.weight"]})


@pytest.mark.parametrize("ahead", [False, True], ids=["read", "prefetched"])
def test_a_damaged_tensor_is_never_handed_out(store: Store, reopen: Reopen, ahead: bool) -> None:
    artifact = publish(store)
    name = "model.layers.0.mlp.weight"
    flip(store, blob_path(store.manifest(artifact).tensors[name].blob))
    with ArtifactReader(reopen(), artifact) as reader:
        reader.prefetch([name] if ahead else [])
        with pytest.raises(DamagedBlob, match="damaged"):
            reader.tensors([name])


@pytest.mark.parametrize("promise", [{"dtype": "I32"}, {"shape": (256, 64)}, {"name": "another"}], ids=str)
def test_a_manifest_that_promises_what_its_blob_does_not_hold_is_damage(store: Store, promise: Any) -> None:
    manifest = written(store, {"w": large()})
    artifact = store.put_manifest(replace(manifest, tensors={"w": manifest.tensors["w"]._replace(**promise)}))
    with ArtifactReader(store, artifact) as reader, pytest.raises(DamagedBlob, match="promises for w"):
        reader.tensors(["w"])


def test_an_artifact_that_is_not_there_cannot_be_read(store: Store, tmp_path: Any) -> None:
    elsewhere = publish(Store(str(tmp_path / "elsewhere")))
    with pytest.raises(DamagedBlob, match=f"artifact {elsewhere.id} is not in"):
        ArtifactReader(store, elsewhere)


def test_files_are_read_back_by_name(store: Store) -> None:
    with ArtifactReader(store, publish(store, {}, config=CONFIG)) as reader:
        assert reader.file("config") == CONFIG
        with pytest.raises(KeyError):
            reader.file("tokenizer.json")
