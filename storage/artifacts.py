"""Artifacts: what a manifest says, and how one is written and read block by block.

An artifact is its manifest: the list of its tensors, masks and files, each pointing at blobs. The artifact's id is
the SHA-256 of that manifest, so it depends on content alone. Nothing about how, when or where it was made is in it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from .digests import Buffer, canonical_json
from .errors import DamagedBlob
from .tensors import TensorBytes, decode, encode_header, from_torch, to_torch

if TYPE_CHECKING:
    import torch

    from .store import Store

Kind = Literal["checkpoint", "adapter", "tokens", "statistics", "metrics"]

# A tensor of this many bytes or more is a blob of its own; smaller ones of a block share one.
OWN_BLOB_BYTES = 64 * 1024
# The name that every tensor with a blob of its own has inside that blob.
LONE_NAME = "tensor"

# More than processors: threads wait for the disk to confirm more than they compute.
_THREADS = min(8, (os.cpu_count() or 1) + 4)


class Artifact(NamedTuple):
    """A reference to an artifact: all that stages pass to each other."""

    kind: Kind
    id: str

    @property
    def short(self) -> str:
        return self.id[:12]


class TensorEntry(NamedTuple):
    """Where a tensor is: its dtype code and shape, its blob, and its name inside that blob."""

    dtype: str
    shape: tuple[int, ...]
    blob: str
    name: str


class Written(NamedTuple):
    """What `ArtifactWriter` has put into the store: entries and the sizes of their blobs."""

    tensors: dict[str, TensorEntry]
    blobs: dict[str, int]


@dataclass(frozen=True)
class Manifest:
    """The content of an artifact.

    tensors: by the name that Hugging Face gives them. masks: bit-packed uint8 along the input dimension, a one for
    each weight kept, under the name of the weight they belong to; never exported. files: config.json, tokenizer.json ….
    blobs: every blob used, with its size in bytes. format: "dense", or the packed format of the tensors
    ("gptq", "bitsandbytes"). quantization: that format's settings. base: the artifact that an adapter belongs to.
    """

    kind: Kind
    tensors: Mapping[str, TensorEntry] = field(default_factory=dict)
    masks: Mapping[str, TensorEntry] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
    blobs: Mapping[str, int] = field(default_factory=dict)
    format: str = "dense"
    quantization: Mapping[str, Any] | None = None
    base: str | None = None

    def to_json(self) -> bytes:
        """The bytes whose SHA-256 is the artifact's id."""
        return canonical_json(
            {
                "kind": self.kind,
                "tensors": {name: _entry_to_json(entry) for name, entry in self.tensors.items()},
                "masks": {name: _entry_to_json(entry) for name, entry in self.masks.items()},
                "files": dict(self.files),
                "blobs": dict(self.blobs),
                "format": self.format,
                "quantization": None if self.quantization is None else dict(self.quantization),
                "base": self.base,
            }
        )

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Manifest:
        return cls(
            kind=value["kind"],
            tensors={name: _entry_from_json(entry) for name, entry in value["tensors"].items()},
            masks={name: _entry_from_json(entry) for name, entry in value["masks"].items()},
            files=value["files"],
            blobs=value["blobs"],
            format=value["format"],
            quantization=value["quantization"],
            base=value["base"],
        )

    @classmethod
    def of_part(cls, kind: Kind, part: Mapping[str, Any]) -> Manifest:
        """The manifest of a part (`ArtifactWriter.part`) of an artifact that is not published yet."""
        tensors = {name: _entry_from_json(entry) for name, entry in part["tensors"].items()}
        return cls(kind, tensors=tensors, blobs=part["blobs"])

    def stored_bytes(self) -> int:
        """Bytes of all its blobs, masks included."""
        return sum(self.blobs.values())


def _entry_to_json(entry: TensorEntry) -> list[Any]:
    return [entry.dtype, list(entry.shape), entry.blob, entry.name]


def _entry_from_json(value: list[Any]) -> TensorEntry:
    return TensorEntry(value[0], tuple(value[1]), value[2], value[3])


class ArtifactWriter:
    """Writes an artifact piece by piece; nothing of it is visible before `publish`.

    Blobs are hashed and written by a few threads while the caller computes on. At most one block's tensors
    wait in memory: `add_tensors` first waits for what the call before it has left to write.
    """

    def __init__(self, store: Store, kind: Kind) -> None:
        self._store = store
        self._kind: Kind = kind
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="blob-writer")
        self._pending: list[tuple[Future[Written], dict[str, TensorEntry]]] = []
        self._tensors: dict[str, TensorEntry] = {}
        self._masks: dict[str, TensorEntry] = {}
        self._files: dict[str, str] = {}
        self._blobs: dict[str, int] = {}

    def __enter__(self) -> ArtifactWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def add_tensors(self, tensors: Mapping[str, torch.Tensor], prefix: str = "") -> None:
        """Store tensors, which nobody may change before `publish`.

        prefix: their block's ("model.layers.3."); small ones share a blob, named without it.
        """
        self.settle()
        self._submit({name: from_torch(tensor) for name, tensor in tensors.items()}, prefix, self._tensors)

    def add_masks(self, masks: Mapping[str, torch.Tensor], prefix: str = "") -> None:
        """Store boolean masks, [out_features, in_features], under the names of the weights they belong to."""
        self._submit({name: from_torch(pack_mask(mask)) for name, mask in masks.items()}, prefix, self._masks)

    def share(self, source: Manifest, names: Iterable[str]) -> None:
        """Take over tensors of another artifact as they are: no bytes are read or written."""
        for name in names:
            self._tensors[name] = entry = source.tensors[name]
            self._blobs[entry.blob] = source.blobs[entry.blob]

    def share_as(self, source: Manifest, names: Mapping[str, str]) -> None:
        """Take over tensors and masks of another artifact under other names, {new: old}; one may be taken repeatedly.

        No bytes are read or written: all names of a tensor point at the same blob.
        """
        for new, old in names.items():
            for entries, taken in ((source.tensors, self._tensors), (source.masks, self._masks)):
                if old in entries:
                    taken[new] = entry = entries[old]
                    self._blobs[entry.blob] = source.blobs[entry.blob]

    def part(self, tensors: Iterable[str], masks: Iterable[str]) -> dict[str, Any]:
        """Where the named tensors and masks are, as JSON; all of them settled. `take_over` is its inverse."""
        parts = {name: self._tensors[name] for name in tensors}, {name: self._masks[name] for name in masks}
        blobs = {entry.blob for entries in parts for entry in entries.values()}
        kinds = [{name: _entry_to_json(entry) for name, entry in entries.items()} for entries in parts]
        return {"tensors": kinds[0], "masks": kinds[1], "blobs": {blob: self._blobs[blob] for blob in sorted(blobs)}}

    def take_over(self, part: Mapping[str, Any]) -> None:
        """Take over what another writer's `part` said: no bytes are read or written."""
        self._tensors.update({name: _entry_from_json(entry) for name, entry in part["tensors"].items()})
        self._masks.update({name: _entry_from_json(entry) for name, entry in part["masks"].items()})
        self._blobs.update(part["blobs"])

    def share_masks(self, source: Manifest) -> None:
        """Take over another artifact's masks."""
        for name, entry in source.masks.items():
            self._masks[name] = entry
            self._blobs[entry.blob] = source.blobs[entry.blob]

    def share_files(self, source: Manifest) -> None:
        """Take over another artifact's files."""
        for name, blob in source.files.items():
            self._files[name] = blob
            self._blobs[blob] = source.blobs[blob]

    def add_file(self, name: str, data: Buffer) -> None:
        """Store a small file; one of the same name is replaced."""
        blob, size = self._store.put_blob([data])
        self._files[name] = blob
        self._blobs[blob] = size

    def publish(
        self, *, format: str = "dense", quantization: Mapping[str, Any] | None = None, base: str | None = None
    ) -> Artifact:
        """Make the artifact visible, when all its blobs are safely written. Returns its reference."""
        self.settle()
        used = {entry.blob for entry in (*self._tensors.values(), *self._masks.values())} | set(self._files.values())
        manifest = Manifest(
            kind=self._kind,
            tensors=self._tensors,
            masks=self._masks,
            files=self._files,
            blobs={blob: size for blob, size in self._blobs.items() if blob in used},
            format=format,
            quantization=quantization,
            base=base,
        )
        return self._store.put_manifest(manifest)

    def settle(self) -> None:
        """Wait until all that was added is written."""
        for future, entries in self._pending:
            written = future.result()
            entries.update(written.tensors)
            self._blobs.update(written.blobs)
        self._pending = []

    def _submit(self, tensors: Mapping[str, TensorBytes], prefix: str, entries: dict[str, TensorEntry]) -> None:
        """Begin to write tensors; `settle` puts what became of them into `entries`."""
        small: dict[str, TensorBytes] = {}
        for name, tensor in tensors.items():
            if len(tensor.data) >= OWN_BLOB_BYTES:
                self._pending.append((self._pool.submit(self._put, {LONE_NAME: tensor}, [name]), entries))
            else:
                small[name] = tensor
        if small:
            names = sorted(small)
            relative = {name.removeprefix(prefix): small[name] for name in names}
            self._pending.append((self._pool.submit(self._put, relative, names), entries))

    def _put(self, tensors: Mapping[str, TensorBytes], names: Sequence[str]) -> Written:
        header = encode_header({name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()})
        blob, size = self._store.put_blob([header, *(tensor.data for tensor in tensors.values())])
        entries = {
            full_name: TensorEntry(tensor.dtype, tensor.shape, blob, name)
            for full_name, (name, tensor) in zip(names, tensors.items(), strict=True)
        }
        return Written(entries, {blob: size})


class ArtifactReader:
    """Reads an artifact's tensors and files, each blob verified at its first read.

    `prefetch` starts reading and hashing in the background, ahead of the block that needs it.
    """

    def __init__(self, store: Store, artifact: Artifact | Manifest) -> None:
        self.manifest = artifact if isinstance(artifact, Manifest) else store.manifest(artifact)
        self._store = store
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="blob-reader")
        self._coming: dict[str, Future[memoryview]] = {}

    def __enter__(self) -> ArtifactReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def prefetch(self, names: Iterable[str]) -> None:
        """Begin to read the named tensors; a later `tensors` call takes them from here."""
        for name in names:
            self._begin(self.manifest.tensors[name].blob)

    def tensors(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """The named tensors, on the CPU, in memory of their own. Raises DamagedBlob."""
        return self._read(self.manifest.tensors, names)

    def masks(self, shapes: Mapping[str, tuple[int, int]]) -> dict[str, torch.Tensor]:
        """Boolean masks (True: kept) for those weights {name: [out_features, in_features]} that have one."""
        wanted = [name for name in shapes if name in self.manifest.masks]
        packed = self._read(self.manifest.masks, wanted)
        return {name: unpack_mask(mask, shapes[name]) for name, mask in packed.items()}

    def file(self, name: str) -> bytes:
        """The content of a file. Raises KeyError when the artifact has none of that name."""
        return bytes(self._store.read_blob(self.manifest.files[name]))

    def _begin(self, blob: str) -> Future[memoryview]:
        if blob not in self._coming:
            self._coming[blob] = self._pool.submit(self._store.read_blob, blob)
        return self._coming[blob]

    def _read(self, entries: Mapping[str, TensorEntry], names: Iterable[str]) -> dict[str, torch.Tensor]:
        wanted = [(name, entries[name]) for name in names]
        for _, entry in wanted:
            self._begin(entry.blob)
        decoded: dict[str, dict[str, TensorBytes]] = {}
        result = {}
        handed = set()
        for name, entry in wanted:
            if entry.blob not in decoded:
                decoded[entry.blob] = decode(self._coming.pop(entry.blob).result(), f"blob {entry.blob}")
            tensor = decoded[entry.blob].get(entry.name)
            if tensor is None or (tensor.dtype, tensor.shape) != (entry.dtype, entry.shape):
                raise DamagedBlob(f"blob {entry.blob} does not hold the tensor that the manifest promises for {name}")
            made = to_torch(tensor)
            result[name] = made.clone() if (entry.blob, entry.name) in handed else made
            handed.add((entry.blob, entry.name))
        return result


def pack_mask(mask: torch.Tensor) -> torch.Tensor:
    """A boolean mask [rows, columns] as uint8 [rows, ceil(columns / 8)], the first column in the highest bit."""
    import numpy
    import torch

    return torch.from_numpy(numpy.packbits(mask.cpu().numpy(), axis=1))


def unpack_mask(packed: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """The inverse of `pack_mask` for a mask of `shape`."""
    import numpy
    import torch

    return torch.from_numpy(numpy.unpackbits(packed.numpy(), axis=1, count=shape[1])).view(torch.bool)
