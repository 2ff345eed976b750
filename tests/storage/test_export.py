"""Export: an artifact as a plain Hugging Face folder."""

from __future__ import annotations

import errno
import functools
import json
import os
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from coldpress.storage.artifacts import Artifact, ArtifactWriter
from coldpress.storage.errors import DamagedBlob, StoreError
from coldpress.storage.export import as_stored, export, export_bytes, shards
from coldpress.storage.store import Store, blob_path
from sabotage import flip
from samples import CONFIG, Tensors, block, large, publish, random_tensor, same

KINDS: Tensors = {
    "odd": torch.tensor([1, 2, 3], dtype=torch.uint8),
    "bf16": random_tensor(3, 5).to(torch.bfloat16),
    "fp16": random_tensor(3, 5).to(torch.float16),
    "fp32": random_tensor(3, 5),
    "int32": torch.tensor([[-(2**31), 2**31 - 1]], dtype=torch.int32),
    "uint8": torch.tensor([0, 255], dtype=torch.uint8),
    "bool": torch.tensor([True, False, True]),
    "scalar": torch.tensor(2.5),
    "empty": torch.empty(0, 4),
    "large": random_tensor(300, 200).to(torch.bfloat16),
}


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """The folder to export to; its parent is there and holds nothing else."""
    (tmp_path / "exports").mkdir()
    return tmp_path / "exports" / "model"


@pytest.fixture
def artifact(store: Store) -> Artifact:
    with ArtifactWriter(store, "checkpoint") as writer:
        for index in range(3):
            writer.add_tensors(block(index, seed=index), f"model.layers.{index}.")
        writer.add_tensors(KINDS)
        writer.add_masks({"fp32": KINDS["fp32"] > 0.5})
        writer.add_file("config.json", CONFIG)
        writer.add_file("tokenizer.json", b"{}")
        return writer.publish()


@pytest.fixture
def tensors() -> Tensors:
    """What `artifact` holds."""
    return {**block(0, seed=0), **block(1, seed=1), **block(2, seed=2), **KINDS}


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coldpress.storage.export.shards", functools.partial(shards, limit=100_000))


def size_on_disk(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def test_the_folder_holds_the_tensors_as_safetensors_and_the_files(
    store: Store, artifact: Artifact, target: Path, tensors: Tensors
) -> None:
    said = list(export(store, artifact, str(target)))
    assert said == ["model.safetensors", "config.json", "tokenizer.json"]
    assert sorted(os.listdir(target)) == sorted(said)
    assert same(safetensors.torch.load_file(target / "model.safetensors"), tensors)
    assert (target / "config.json").read_bytes() == CONFIG


def test_the_metadata_that_transformers_asks_for_is_there(store: Store, artifact: Artifact, target: Path) -> None:
    list(export(store, artifact, str(target)))
    with safetensors.safe_open(target / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize("name", KINDS)
def test_a_tensor_of_any_kind_alone_is_exported_as_it_was(store: Store, target: Path, name: str) -> None:
    list(export(store, publish(store, {name: KINDS[name]}), str(target)))
    assert same(safetensors.torch.load_file(target / "model.safetensors"), {name: KINDS[name]})


def test_tensors_that_share_a_blob_are_each_written_out(store: Store, target: Path) -> None:
    twice = {"a": large(), "b": large()}
    list(export(store, publish(store, twice), str(target)))
    assert same(safetensors.torch.load_file(target / "model.safetensors"), twice)


@pytest.mark.usefixtures("small_shards")
def test_a_large_model_is_exported_in_shards_with_an_index(
    store: Store, artifact: Artifact, target: Path, tensors: Tensors
) -> None:
    list(export(store, artifact, str(target)))
    index = json.loads((target / "model.safetensors.index.json").read_bytes())
    files = sorted(path.name for path in target.glob("*.safetensors"))
    assert files == [f"model-{number:05}-of-00005.safetensors" for number in range(1, 6)]
    loaded = {file: safetensors.torch.load_file(target / file) for file in files}
    assert same({name: tensor for part in loaded.values() for name, tensor in part.items()}, tensors)
    assert index["weight_map"] == {name: file for file, part in loaded.items() for name in part}
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())


@pytest.mark.parametrize("limit", [1, 1000, 70_000, 140_000, 10**6])
def test_shards_stay_within_the_limit_unless_one_tensor_is_larger(
    store: Store, artifact: Artifact, tensors: Tensors, limit: int
) -> None:
    layout = shards(as_stored(store.manifest(artifact)), limit)
    assert sorted(name for names in layout.values() for name in names) == sorted(tensors)
    assert all(len(names) == 1 or sum(tensors[name].nbytes for name in names) <= limit for names in layout.values())


def test_export_bytes_are_the_bytes_on_disk(store: Store, artifact: Artifact, target: Path) -> None:
    list(export(store, artifact, str(target)))
    assert export_bytes(store.manifest(artifact)) == size_on_disk(target)


@pytest.mark.usefixtures("small_shards")
def test_export_bytes_are_the_bytes_on_disk_with_shards_too(store: Store, artifact: Artifact, target: Path) -> None:
    list(export(store, artifact, str(target)))
    assert export_bytes(store.manifest(artifact)) == size_on_disk(target)


def test_export_bytes_are_the_bytes_on_disk_of_an_artifact_of_files_alone(store: Store, target: Path) -> None:
    metrics = publish(store, {}, metrics=b'{"perplexity":7.5}')
    list(export(store, metrics, str(target)))
    assert os.listdir(target) == ["metrics"]
    assert export_bytes(store.manifest(metrics)) == size_on_disk(target)


def test_two_exports_of_one_artifact_are_equal_to_the_byte(store: Store, artifact: Artifact, target: Path) -> None:
    second = target.with_name("second")
    for folder in (target, second):
        list(export(store, artifact, str(folder)))
    assert {path.name: path.read_bytes() for path in target.iterdir()} == {
        path.name: path.read_bytes() for path in second.iterdir()
    }


def test_a_folder_with_something_in_it_is_refused_and_left_alone(
    store: Store, artifact: Artifact, target: Path
) -> None:
    target.mkdir()
    (target / "notes.txt").write_text("mine")
    with pytest.raises(StoreError, match="is not empty; name a folder that doesn't exist yet"):
        list(export(store, artifact, str(target)))
    assert os.listdir(target) == ["notes.txt"]
    assert os.listdir(target.parent) == ["model"]


def test_a_file_in_the_place_of_the_folder_is_left_alone(store: Store, artifact: Artifact, target: Path) -> None:
    target.write_text("mine")
    with pytest.raises(StoreError):
        list(export(store, artifact, str(target)))
    assert target.read_text() == "mine"
    assert os.listdir(target.parent) == ["model"]


def test_an_empty_folder_is_filled(store: Store, artifact: Artifact, target: Path) -> None:
    target.mkdir()
    list(export(store, artifact, str(target)))
    assert (target / "model.safetensors").exists()


def test_folders_above_are_made(store: Store, artifact: Artifact, target: Path) -> None:
    list(export(store, artifact, f"{target}/deeper/still/"))
    assert (target / "deeper" / "still" / "model.safetensors").exists()


def test_a_relative_folder_is_in_the_working_directory(
    store: Store, artifact: Artifact, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(target.parent)
    list(export(store, artifact, "model"))
    assert (target / "model.safetensors").exists()


@pytest.mark.usefixtures("small_shards")
def test_the_folder_appears_only_when_it_is_whole(store: Store, artifact: Artifact, target: Path) -> None:
    for _ in export(store, artifact, str(target)):
        assert not target.exists()
    assert target.exists()
    assert os.listdir(target.parent) == ["model"]


def test_an_export_that_is_given_up_leaves_nothing(store: Store, artifact: Artifact, target: Path) -> None:
    files = export(store, artifact, str(target))
    next(files)
    assert isinstance(files, Generator)
    files.close()
    assert os.listdir(target.parent) == []


def test_an_export_of_a_damaged_artifact_leaves_nothing(store: Store, target: Path, url: str) -> None:
    artifact = publish(store, block(0), config=CONFIG)
    flip(store, blob_path(store.manifest(artifact).tensors["model.layers.0.norm.weight"].blob))
    with pytest.raises(DamagedBlob, match="running the recipe again"):
        list(export(Store(url), artifact, str(target)))
    assert os.listdir(target.parent) == []


@pytest.mark.parametrize("good", [0, 1, 2])
def test_a_full_disk_is_a_sentence_and_leaves_nothing(
    store: Store, artifact: Artifact, target: Path, monkeypatch: pytest.MonkeyPatch, good: int
) -> None:
    opened: list[str] = []

    def open_or_fail(path: str, mode: str) -> Any:
        opened.append(path)
        if len(opened) > good:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return open(path, mode)

    monkeypatch.setattr("coldpress.storage.export.open", open_or_fail, raising=False)
    with pytest.raises(StoreError, match="the disk is full: could not write"):
        list(export(store, artifact, str(target)))
    assert os.listdir(target.parent) == []
