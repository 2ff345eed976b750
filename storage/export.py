"""Export: a checkpoint as a plain Hugging Face folder, an adapter as PEFT's, streamed blob by blob.

The folder holds what `transformers`, `vllm`, `GPTQModel` or `peft` read with their own calls. Masks stay behind.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterator

from .artifacts import LONE_NAME, Artifact, Manifest
from .errors import StoreError, write_error
from .store import Store
from .tensors import TensorBytes, decode, encode_header, tensor_nbytes

SHARD_BYTES = 5 * 10**9


def shards(manifest: Manifest, limit: int = SHARD_BYTES) -> dict[str, list[str]]:
    """File name -> names of the tensors in it, in the order written; one file while they fit into `limit` bytes.

    An adapter is one file always: PEFT reads no other.
    """
    if manifest.kind == "adapter":
        return {"adapter_model.safetensors": sorted(manifest.tensors)}
    groups: list[list[str]] = [[]]
    filled = 0
    for name in sorted(manifest.tensors):
        entry = manifest.tensors[name]
        size = tensor_nbytes(entry.dtype, entry.shape)
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
    total = sum(manifest.blobs[blob] for blob in manifest.files.values())
    layout = shards(manifest) if manifest.tensors else {}
    for names in layout.values():
        total += len(_header(manifest, names))
        total += sum(tensor_nbytes(manifest.tensors[name].dtype, manifest.tensors[name].shape) for name in names)
    if len(layout) > 1:
        total += len(_index(manifest, layout))
    return total


def export(store: Store, artifact: Artifact, folder: str) -> Iterator[str]:
    """Write the artifact into `folder`, which must not exist or be empty; yields each file's name when it is done.

    The folder appears under its name only when it is whole.
    """
    if os.path.isdir(folder) and os.listdir(folder):
        raise StoreError(f"{folder} is not empty; name a folder that doesn't exist yet")
    manifest = store.manifest(artifact)
    parent = os.path.dirname(os.path.abspath(folder))
    temporary = os.path.join(parent, f".{os.path.basename(os.path.abspath(folder))}-{uuid.uuid4().hex[:8]}")
    try:
        os.makedirs(temporary)
        if manifest.tensors:
            layout = shards(manifest)
            for file_name, names in layout.items():
                _write_shard(store, manifest, names, os.path.join(temporary, file_name))
                yield file_name
            if len(layout) > 1:
                with open(os.path.join(temporary, "model.safetensors.index.json"), "wb") as file:
                    file.write(_index(manifest, layout))
                yield "model.safetensors.index.json"
        for name, blob in sorted(manifest.files.items()):
            with open(os.path.join(temporary, name), "wb") as file:
                file.write(store.read_blob(blob))
            yield name
        if os.path.isdir(folder):
            os.rmdir(folder)
        os.rename(temporary, folder)
    except OSError as error:
        raise write_error(folder, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _header(manifest: Manifest, names: list[str]) -> bytes:
    entries = {name: (manifest.tensors[name].dtype, manifest.tensors[name].shape) for name in names}
    return encode_header(entries, metadata={"format": "pt"})


def _index(manifest: Manifest, layout: dict[str, list[str]]) -> bytes:
    sizes = [tensor_nbytes(entry.dtype, entry.shape) for entry in manifest.tensors.values()]
    weight_map = {name: file_name for file_name, names in layout.items() for name in names}
    return json.dumps({"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map}, indent=1).encode()


def _write_shard(store: Store, manifest: Manifest, names: list[str], path: str) -> None:
    shared: dict[str, dict[str, TensorBytes]] = {}  # blobs of small tensors, read once for all of them
    with open(path, "wb") as file:
        file.write(_header(manifest, names))
        for name in names:
            entry = manifest.tensors[name]
            tensors = shared.get(entry.blob) or decode(store.read_blob(entry.blob), f"blob {entry.blob}")
            if entry.name != LONE_NAME:
                shared[entry.blob] = tensors
            file.write(tensors[entry.name].data)
