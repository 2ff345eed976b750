"""`Store`: the one way to what coldpress keeps.

    blobs/sha256/ab/cdef…       immutable content
    artifacts/sha256/ab/cdef…   manifests
    actions/<stage>/<key>       key -> artifact, with the key's whole pre-image and provenance
    journals/<key>/<attempt>/…  what an unfinished stage has done (journal.py)
    leases/<key>/<epoch>        who computes a key (leases.py)
    refs/<name>.json            names for people: "recipe/stage"
    pins/<artifact id>          what gc keeps although no name leads to it
    runs/<id>                   a recipe as it was run
    damaged/                    what failed verification, moved aside
    tmp/                        files not yet published

Publishing goes in an order that never shows a half: blobs, then the manifest, then the action. A hit is believed
only when the manifest and every blob are there in full length; content is hashed at its first read.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from .artifacts import Artifact, Manifest
from .cache import BlobCache
from .digests import Buffer, digest_of, seal, sha256, total_bytes, unseal
from .errors import DamagedBlob, StoreError
from .files import Files, open_files


@dataclass(frozen=True)
class Action:
    """The record that a key gave an artifact.

    stage: "quantize/gptq". key: SHA-256 of the pre-image. preimage: everything the result depends on.
    provenance: how it came about (seconds, peak memory, versions …), which never influences a key or an id.
    """

    stage: str
    key: str
    artifact: Artifact
    preimage: dict[str, Any]
    provenance: dict[str, Any]


class Store:
    """A content-addressed store at a folder or any fsspec URL."""

    def __init__(self, url: str) -> None:
        self.files: Files = open_files(url)
        self.url = self.files.url
        self.cache = BlobCache.from_environment() if self.files.remote else None
        # Threads that ask for blobs, and how many blobs make one more worth its start.
        self._askers, self._asked_by_one = (32, 1) if self.files.remote else (8, 64)
        self._verified: set[str] = set()
        self._lock = threading.Lock()

    @classmethod
    def default(cls) -> Store:
        """The store of `$COLDPRESS_STORE`, or `.coldpress/` in the working directory."""
        return cls(os.environ.get("COLDPRESS_STORE") or ".coldpress")

    # Blobs

    def put_blob(self, buffers: Sequence[Buffer]) -> tuple[str, int]:
        """Store content; returns its SHA-256 and its size in bytes. What is there already is not written again."""
        blob, size = sha256(*buffers), total_bytes(buffers)
        path = blob_path(blob)
        if self.files.size(path) == size:
            self.files.keep(path)
        elif not self.files.create(path, buffers) and self.files.size(path) != size:
            self._set_aside(blob)  # cut short by a power failure
            self.files.create(path, buffers)
        if self.cache:
            self.cache.put(blob, buffers)
        return blob, size

    def read_blob(self, blob: str, *, again: bool = False) -> memoryview:
        """A blob's content, hashed at its first read by this `Store`; from the local cache when the store is remote.

        With `again` it is read from the store itself and hashed, whatever was read before.

        Raises DamagedBlob when it is missing or does not hash to its name; a damaged one is moved aside, so that
        the stage that made it counts as not cached and is computed again.
        """
        cached = self.cache.get(blob) if self.cache and not again else None
        if cached is not None:
            return cached
        data = self._read_stored(blob, again)
        if self.cache and not again:
            self.cache.put(blob, [data])
        return data

    def _read_stored(self, blob: str, again: bool) -> memoryview:
        try:
            data = self.files.read(blob_path(blob))
        except FileNotFoundError as error:
            self._forget(blob)
            raise DamagedBlob(
                f"blob {blob} is missing from {self.url}; running the recipe again recomputes what is gone"
            ) from error
        if again or blob not in self._verified:
            if sha256(data) != blob:
                self._set_aside(blob)
                raise DamagedBlob(
                    f"blob {blob} in {self.url} was damaged (its bytes don't hash to its name) and has been moved to "
                    "damaged/; running the recipe again recomputes what is gone"
                )
            with self._lock:
                self._verified.add(blob)
        return data

    def missing_blobs(self, blobs: Mapping[str, int]) -> list[str]:
        """Those of the blobs {digest: bytes} that aren't there in full length, asked anew each time, side by side."""
        wanted = list(blobs.items())
        askers = min(self._askers, math.ceil(len(wanted) / self._asked_by_one))
        if askers <= 1:
            return self._missing(wanted)
        with ThreadPoolExecutor(askers) as pool:
            shares = pool.map(self._missing, [wanted[start::askers] for start in range(askers)])
            return [blob for missing in shares for blob in missing]

    def _missing(self, blobs: list[tuple[str, int]]) -> list[str]:
        return [blob for blob, size in blobs if self.files.size(blob_path(blob)) != size]

    def _forget(self, blob: str) -> None:
        with self._lock:
            self._verified.discard(blob)

    def _set_aside(self, blob: str) -> None:
        self._forget(blob)
        with contextlib.suppress(FileNotFoundError):  # another thread or process was faster
            self.files.move(blob_path(blob), f"damaged/{blob}-{time.time_ns():x}")

    # Artifacts

    def put_manifest(self, manifest: Manifest) -> Artifact:
        """Publish an artifact whose blobs are all written. Raises StoreError if one of them has gone."""
        missing = self.missing_blobs(manifest.blobs)
        if missing:
            raise StoreError(f"{len(missing)} blobs vanished from {self.url} while they were written ({missing[0]} …)")
        self.files.sync()
        data = manifest.to_json()
        artifact = Artifact(manifest.kind, sha256(data))
        path = artifact_path(artifact.id)
        if not self.files.create(path, [data]):
            self.files.keep(path)
            try:
                there = bytes(self.files.read(path))
            except FileNotFoundError:  # gc was faster
                there = b""
            if there != data:
                self.files.replace(path, [data])
        self.files.sync()
        if vanished := self.missing_blobs(manifest.blobs):  # gc had come between
            raise StoreError(f"{len(vanished)} blobs vanished from {self.url} before they were used ({vanished[0]} …)")
        return artifact

    def manifest(self, artifact: Artifact | str) -> Manifest:
        """The manifest of an artifact. Raises DamagedBlob when it is missing or damaged."""
        artifact_id = artifact if isinstance(artifact, str) else artifact.id
        try:
            data = self.files.read(artifact_path(artifact_id))
        except FileNotFoundError as error:
            raise DamagedBlob(f"artifact {artifact_id} is not in {self.url}") from error
        if sha256(data) != artifact_id:
            raise DamagedBlob(f"the manifest of artifact {artifact_id} in {self.url} is damaged")
        return Manifest.from_json(json.loads(bytes(data)))

    def holds(self, artifact: Artifact | str) -> bool:
        """Whether the artifact's manifest is whole and all its blobs are there in full length."""
        try:
            manifest = self.manifest(artifact)
        except DamagedBlob:
            return False
        return not self.missing_blobs(manifest.blobs)

    def read_file(self, artifact: Artifact, name: str) -> bytes:
        """One of the artifact's files. Raises KeyError when it has none of that name."""
        return bytes(self.read_blob(self.manifest(artifact).files[name]))

    def artifact_ids(self) -> Iterator[str]:
        """The ids of all artifacts."""
        for path, _ in self.files.list("artifacts/sha256"):
            yield "".join(path.split("/")[-2:])

    # Actions

    def lookup(self, stage: str, key: str) -> Action | None:
        """The action of a key if its artifact is proven to be there, else None."""
        try:
            action = self.action(stage, key)
        except (FileNotFoundError, DamagedBlob):
            return None
        return action if self.holds(action.artifact) else None

    def action(self, stage: str, key: str) -> Action:
        """The recorded action, whether or not its artifact is still whole. Raises FileNotFoundError, DamagedBlob."""
        path = action_path(stage, key)
        record = unseal(self.files.read(path), f"{self.url}/{path}")
        kind, artifact_id = record["artifact"]
        if digest_of(record["preimage"]) != key:
            raise DamagedBlob(f"{self.url}/{path} is damaged: it belongs to another key")
        return Action(stage, key, Artifact(kind, artifact_id), record["preimage"], record["provenance"])

    def record(self, action: Action) -> Action:
        """Publish an action; returns the one that counts. The first for a key wins while its artifact is whole."""
        assert digest_of(action.preimage) == action.key
        data = [seal({"artifact": list(action.artifact), "preimage": action.preimage, "provenance": action.provenance})]
        path = action_path(action.stage, action.key)
        if not self.files.create(path, data):
            standing = self.lookup(action.stage, action.key)
            if standing is not None:
                self.files.sync()
                return standing
            self.files.replace(path, data)
        self.files.sync()
        return action

    def actions(self, stage: str = "") -> Iterator[Action]:
        """All actions that can be read, of one stage ("prune/wanda") or of all."""
        for path, _ in self.files.list(f"actions/{stage}".rstrip("/")):
            _, *names, key = path.split("/")
            try:
                yield self.action("/".join(names), key)
            except (FileNotFoundError, DamagedBlob):
                continue  # `verify` reports these

    # Refs and runs

    def set_ref(self, name: str, artifact: Artifact) -> None:
        """Point a name for people at an artifact."""
        path = f"refs/{_inside(name)}.json"
        record = {"artifact": list(artifact)}
        try:
            if unseal(self.files.read(path), path) == record:
                return
        except (FileNotFoundError, DamagedBlob):
            pass
        self.files.replace(path, [seal(record)])
        self.files.sync()

    def refs(self) -> dict[str, Artifact]:
        """All names that can be read, with what they point at."""
        found = {}
        for path, _ in self.files.list("refs"):
            try:
                kind, artifact_id = unseal(self.files.read(path), path)["artifact"]
            except (FileNotFoundError, DamagedBlob):
                continue
            found[path.removeprefix("refs/").removesuffix(".json")] = Artifact(kind, artifact_id)
        return found

    def resolve(self, name: str) -> Artifact:
        """The artifact of a ref, an id, or the unique beginning of an id. Raises StoreError."""
        refs = self.refs()
        if name in refs:
            return refs[name]
        ids = [artifact_id for artifact_id in self.artifact_ids() if artifact_id.startswith(name)] if name else []
        if len(ids) == 1:
            return Artifact(self.manifest(ids[0]).kind, ids[0])
        if ids:
            raise StoreError(f"'{name}' fits {len(ids)} artifacts in {self.url}; write more of its digits")
        import difflib

        close = difflib.get_close_matches(name, refs, 1)
        hint = f"did you mean '{close[0]}'?" if close else "`coldpress ls` shows what is there"
        raise StoreError(f"nothing in {self.url} is called '{name}'; {hint}")

    def delete_ref(self, name: str) -> None:
        """Forget a name; what it points at stays until gc. Raises StoreError if there is none."""
        if not self._delete(f"refs/{_inside(name)}.json"):
            raise StoreError(f"nothing in {self.url} is called '{name}'; `coldpress ls` shows what is there")

    def pin(self, artifact: Artifact) -> None:
        """Have gc keep an artifact whatever its names point at later."""
        self.files.replace(f"pins/{artifact.id}", [seal({"artifact": list(artifact)})])
        self.files.sync()

    def unpin(self, artifact: Artifact) -> None:
        """The inverse of `pin`. Raises StoreError if it isn't pinned."""
        if not self._delete(f"pins/{artifact.id}"):
            raise StoreError(f"artifact {artifact.short} is not pinned")

    def _delete(self, path: str) -> bool:
        """False if the file isn't there, which not every kind of store says by itself."""
        if self.files.size(path) is None:
            return False
        with contextlib.suppress(FileNotFoundError):  # another process was faster
            self.files.delete(path)
        self.files.sync()
        return True

    def pins(self) -> set[str]:
        """The ids of pinned artifacts."""
        return {path.removeprefix("pins/") for path, _ in self.files.list("pins")}

    def save_run(self, run_id: str, record: dict[str, Any]) -> None:
        """Keep what a run did."""
        self.files.replace(f"runs/{_inside(run_id)}", [seal(record)])
        self.files.sync()

    def has_run(self, run_id: str) -> bool:
        """Whether there is a record of a run."""
        return self.files.size(f"runs/{_inside(run_id)}") is not None

    def runs(self) -> dict[str, dict[str, Any]]:
        """All runs that can be read, oldest first."""
        found = {}
        for path in sorted(path for path, _ in self.files.list("runs")):
            try:
                found[path.removeprefix("runs/")] = unseal(self.files.read(path), path)
            except (FileNotFoundError, DamagedBlob):
                continue
        return found


def _inside(name: str) -> str:
    """The name, if it can't lead out of its folder. Raises StoreError."""
    if any(part in ("", ".", "..") for part in name.split("/")):
        raise StoreError(f"'{name}' can't be a name in the store; leave out '.', '..' and empty parts")
    return name


def blob_path(blob: str) -> str:
    """Where a blob is, relative to the store."""
    return f"blobs/sha256/{blob[:2]}/{blob[2:]}"


def artifact_path(artifact_id: str) -> str:
    """Where a manifest is, relative to the store."""
    return f"artifacts/sha256/{artifact_id[:2]}/{artifact_id[2:]}"


def action_path(stage: str, key: str) -> str:
    """Where an action is, relative to the store."""
    return f"actions/{stage}/{key}"
