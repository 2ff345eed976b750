"""Export: a checkpoint as a plain Hugging Face folder, an adapter as PEFT's, streamed tensor by tensor.

The folder holds what `transformers`, `vllm`, `GPTQModel` or `peft` read with their own calls. Masks stay behind.
Tensors are written as they are stored, or as whoever gives other `Contents` makes them of stored ones.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from .artifacts import LONE_NAME, Artifact, Kind, Manifest
from .digests import Buffer
from .errors import StoreError, write_error
from .store import Store
from .tensors import TensorBytes, decode, encode_header, tensor_nbytes

SHARD_BYTES = 5 * 10**9


Read = Callable[[str], TensorBytes]


class Part(NamedTuple):
    """A tensor of the folder: dtype code, shape, and its bytes, made of the stored tensors that it reads by name."""

    dtype: str
    shape: tuple[int, ...]
    data: Callable[[Read], Buffer]


@dataclass(frozen=True)
class Contents:
    """What goes into the folder of an artifact of some kind. files: the blob that holds each, or its bytes."""

    kind: Kind
    tensors: Mapping[str, Part]
    files: Mapping[str, str | bytes]


def as_stored(manifest: Manifest) -> Contents:
    """All tensors and files of an artifact, unchanged."""
    parts = {name: stored_part(manifest, name) for name in manifest.tensors}
    return Contents(manifest.kind, parts, manifest.files)


def stored_part(manifest: Manifest, name: str) -> Part:
    """A tensor unchanged, under its own name or another."""
    entry = manifest.tensors[name]
    return Part(entry.dtype, entry.shape, partial(_stored_data, name))


def _stored_data(name: str, read: Read) -> Buffer:
    return read(name).data


def shards(contents: Contents, limit: int = SHARD_BYTES) -> dict[str, list[str]]:
    """File name -> names of the tensors in it, in the order written; one file while they fit into `limit` bytes.

    An adapter is one file always: PEFT reads no other.
    """
    if contents.kind == "adapter":
        return {"adapter_model.safetensors": sorted(contents.tensors)}
    groups: list[list[str]] = [[]]
    filled = 0
    for name in sorted(contents.tensors):
        part = contents.tensors[name]
        size = tensor_nbytes(part.dtype, part.shape)
        if groups[-1] and filled + size > limit:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {f"model-{number:05}-of-{len(groups):05}.safetensors": names for number, names in enumerate(groups, start=1)}


def export_bytes(manifest: Manifest) -> int:
    """Bytes of the folder that `export` writes for this manifest."""
    contents = as_stored(manifest)
    total = sum(manifest.blobs[blob] for blob in manifest.files.values())
    layout = shards(contents) if contents.tensors else {}
    for names in layout.values():
        total += len(_header(contents, names)) + _tensor_bytes(contents, names)
    if len(layout) > 1:
        total += len(_index(contents, layout))
    return total


def export(store: Store, artifact: Artifact, folder: str, contents: Contents | None = None) -> Iterator[str]:
    """Write the artifact into `folder`, which must not exist or be empty; yields each file's name when it is done.

    contents: what is written, where it is not the artifact as it is stored. The folder appears under its name only
    when it is whole.
    """
    if os.path.isdir(folder) and os.listdir(folder):
        raise StoreError(f"{folder} is not empty; name a folder that doesn't exist yet")
    manifest = store.manifest(artifact)
    contents = contents or as_stored(manifest)
    parent = os.path.dirname(os.path.abspath(folder))
    temporary = os.path.join(parent, f".{os.path.basename(os.path.abspath(folder))}-{uuid.uuid4().hex[:8]}")
    try:
        os.makedirs(temporary)
        if contents.tensors:
            layout = shards(contents)
            for file_name, names in layout.items():
                _write_shard(store, manifest, contents, names, os.path.join(temporary, file_name))
                yield file_name
            if len(layout) > 1:
                with open(os.path.join(temporary, "model.safetensors.index.json"), "wb") as file:
                    file.write(_index(contents, layout))
                yield "model.safetensors.index.json"
        for name, data in sorted(contents.files.items()):
            with open(os.path.join(temporary, name), "wb") as file:
                file.write(store.read_blob(data) if isinstance(data, str) else data)
            yield name
        if os.path.isdir(folder):
            os.rmdir(folder)
        os.rename(temporary, folder)
    except OSError as error:
        raise write_error(folder, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _header(contents: Contents, names: list[str]) -> bytes:
    entries = {name: (contents.tensors[name].dtype, contents.tensors[name].shape) for name in names}
    return encode_header(entries, metadata={"format": "pt"})


def _tensor_bytes(contents: Contents, names: list[str]) -> int:
    return sum(tensor_nbytes(contents.tensors[name].dtype, contents.tensors[name].shape) for name in names)


def _index(contents: Contents, layout: dict[str, list[str]]) -> bytes:
    total = sum(_tensor_bytes(contents, names) for names in layout.values())
    weight_map = {name: file_name for file_name, names in layout.items() for name in names}
    return json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=1).encode()


def _write_shard(store: Store, manifest: Manifest, contents: Contents, names: list[str], path: str) -> None:
    shared: dict[str, dict[str, TensorBytes]] = {}  # blobs of small tensors, read once for all of them

    def read(name: str) -> TensorBytes:
        entry = manifest.tensors[name]
        tensors = shared.get(entry.blob) or decode(store.read_blob(entry.blob), f"blob {entry.blob}")
        if entry.name != LONE_NAME:
            shared[entry.blob] = tensors
        return tensors[entry.name]

    with open(path, "wb") as file:
        file.write(_header(contents, names))
        for name in names:
            file.write(contents.tensors[name].data(read))
