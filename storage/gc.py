"""Garbage collection: what nobody needs any more, why, and deleting it safely while jobs run.

Kept is what these lead to: names (refs), pins, runs of the last days, the inputs of leases, and journals of unfinished
stages; what unfinished runs used of their budgets is kept as long as runs are. Whatever was written or relied upon
within the grace period is kept too, since a running job may be about to point at it; ages are by the clock of the place
where the store is. Deleting goes from the roots down (actions, then manifests, then blobs), and each file's age is
looked at again just before.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from .artifacts import Manifest
from .digests import unseal
from .errors import DamagedBlob, StoreError
from .store import Store, artifact_path, blob_path

DAY = 86400.0
HOUR = 3600.0

ACTION = "records of results that are gone or go now"
RESULT = "results without a name, a pin or a recent run"
BLOB = "content of no kept result"
JOURNAL = "journals of stages that are done or were given up"
LEASE = "leases of jobs that ended"
SPENT = "budgets of runs that were given up"
LEFTOVER = "files that killed processes left half-written"
DAMAGED = "damaged files that were set aside"
REASONS = (ACTION, RESULT, BLOB, JOURNAL, LEASE, SPENT, LEFTOVER, DAMAGED)  # the order of deletion


@dataclass(frozen=True)
class Garbage:
    """A file that can go: its path in the store, its bytes, and why (one of REASONS)."""

    path: str
    size: int
    reason: str


def find_garbage(store: Store, *, keep_runs: float = 30 * DAY, grace: float = DAY) -> list[Garbage]:
    """What can go, in order of deletion; deletes nothing.

    keep_runs, grace: seconds. Raises StoreError when a record that may lead to something is damaged.
    """
    return sorted(_Search(store, keep_runs, grace).garbage(), key=lambda one: REASONS.index(one.reason))


def delete_garbage(store: Store, garbage: list[Garbage], *, grace: float = DAY) -> list[Garbage]:
    """Delete what `find_garbage` found, unless it was used meanwhile; returns what was deleted."""
    gone = []
    for reason in REASONS:
        chosen = sorted((one for one in garbage if one.reason == reason), key=lambda one: one.path)
        # A folder of a few files at a time, so that little time passes between a look at their ages and the deletion.
        for folder, files in groupby(chosen, key=lambda one: os.path.dirname(one.path)):
            ages = store.files.ages(folder)
            for one in files:
                if ages.get(one.path, -1.0) >= _least_age(reason, grace):
                    with contextlib.suppress(FileNotFoundError):  # another gc was faster
                        store.files.delete(one.path)
                        gone.append(one)
    store.files.sync()
    return gone


def _least_age(reason: str, grace: float) -> float:
    """Files that live jobs rewrite all the time get an hour at least, whatever the grace period."""
    return max(grace, HOUR) if reason in (JOURNAL, LEASE, LEFTOVER) else grace


class _Search:
    """One look at a whole store."""

    def __init__(self, store: Store, keep_runs: float, grace: float) -> None:
        self._store = store
        self._keep_runs = keep_runs
        self._grace = grace
        self._sizes: dict[str, int] = {}
        self._artifacts: set[str] = set()
        self._blobs: set[str] = set()

    def garbage(self) -> Iterator[Garbage]:
        # Blobs are listed first: one written after its list was made is not in it, whatever manifest comes to need it.
        blobs = self._old("blobs", BLOB)
        artifacts = self._old("artifacts", RESULT)
        journals = self._journals()
        self._mark(journals)
        for path in self._old("artifacts", RESULT, young=True):
            self._mark_artifact("".join(path.split("/")[-2:]))
        yield from self._of(RESULT, artifacts, {artifact_path(one) for one in self._artifacts})
        yield from self._of(BLOB, blobs, {blob_path(one) for one in self._blobs})
        yield from self._of(JOURNAL, self._old("journals", JOURNAL), {p for paths in journals.values() for p in paths})
        yield from self._of(LEASE, self._old("leases", LEASE), set())
        spent = self._store.files.ages("spent")
        long_ago = [path for path in self._old("spent", SPENT) if spent.get(path, 0.0) >= self._keep_runs]
        yield from self._of(SPENT, long_ago, set())
        yield from self._of(LEFTOVER, self._old("tmp", LEFTOVER), set())
        yield from self._of(DAMAGED, self._old("damaged", DAMAGED), set())
        going = set(artifacts)
        for path in self._old("actions", ACTION):
            kept = self._record(path)["artifact"][1]
            where = artifact_path(kept)
            if kept not in self._artifacts and (where in going or self._store.files.size(where) is None):
                yield Garbage(path, self._sizes[path], ACTION)

    def _of(self, reason: str, paths: list[str], kept: set[str]) -> Iterator[Garbage]:
        return (Garbage(path, self._sizes[path], reason) for path in paths if path not in kept)

    def _old(self, folder: str, reason: str, *, young: bool = False) -> list[str]:
        """The files older than the grace period, or those younger."""
        self._sizes.update(self._store.files.list(folder))
        ages = self._store.files.ages(folder)
        least = _least_age(reason, self._grace)
        return [path for path, age in ages.items() if path in self._sizes and (age >= least) != young]

    def _journals(self) -> dict[str, list[str]]:
        """{key: its journal's files} of stages that may still go on."""
        ages = self._store.files.ages("journals")
        newest: dict[str, float] = {}
        for path, age in ages.items():
            key = path.split("/")[1]
            newest[key] = min(age, newest.get(key, age))
        kept: dict[str, list[str]] = {}
        for path in ages:
            key = path.split("/")[1]
            if newest[key] < max(self._keep_runs, HOUR) and not self._is_done(key, ages):
                kept.setdefault(key, []).append(path)
        return kept

    def _is_done(self, key: str, journals: dict[str, float]) -> bool:
        """Whether the key's result is there, so that its journal was left by a job that was killed at the very end."""
        heads = [path for path in journals if path.startswith(f"journals/{key}/") and path.endswith("/head")]
        stages = {self._record(path)["preimage"]["stage"] for path in heads}
        return any(self._store.lookup(stage, key) for stage in stages)

    def _mark(self, journals: dict[str, list[str]]) -> None:
        for artifact in self._store.pins():
            self._mark_artifact(artifact)
        for path in self._store.files.ages("refs"):
            self._mark_artifact(self._record(path)["artifact"][1])
        for path, age in self._store.files.ages("runs").items():
            if age < max(self._keep_runs, self._grace):
                for stage in self._record(path).get("stages", []):
                    if stage["artifact"]:
                        self._mark_artifact(stage["artifact"])
        for path, age in self._store.files.ages("leases").items():
            if age < max(self._grace, HOUR):
                self._mark_inputs(self._record(path)["inputs"])
        for path in (path for paths in journals.values() for path in paths):
            if path.endswith("/head"):
                head = self._record(path)
                self._mark_inputs(head["preimage"]["inputs"])
                for step in head["steps"]:
                    self._mark_step(step)
            elif "/steps/" in path:
                self._mark_step(self._record(path))

    def _mark_step(self, step: dict[str, Any]) -> None:
        self._blobs.update(step.get("blobs", {}))
        for artifact in step.get("artifacts", []):
            self._mark_artifact(artifact)

    def _mark_inputs(self, inputs: dict[str, str]) -> None:
        for artifact in inputs.values():
            self._mark_artifact(artifact)

    def _mark_artifact(self, artifact_id: str) -> None:
        if artifact_id in self._artifacts:
            return
        if self._store.files.size(artifact_path(artifact_id)) is None:
            return  # gone, as `verify` says; nothing to keep
        try:
            manifest: Manifest = self._store.manifest(artifact_id)
        except DamagedBlob as error:
            raise _unreadable(error) from error
        self._artifacts.add(artifact_id)
        self._blobs.update(manifest.blobs)
        if manifest.base is not None:
            self._mark_artifact(manifest.base)

    def _record(self, path: str) -> dict[str, Any]:
        try:
            return unseal(self._store.files.read(path), f"{self._store.url}/{path}")
        except FileNotFoundError:  # finished or given back since it was listed
            return {"artifact": [None, ""], "inputs": {}, "preimage": {"stage": "", "inputs": {}}, "steps": []}
        except DamagedBlob as error:
            raise _unreadable(error) from error


def _unreadable(error: DamagedBlob) -> StoreError:
    return StoreError(
        f"{error}; nothing was deleted, since it can't be known what it needs. Run the recipes again, or delete the "
        "file if `coldpress verify` shows that nothing of value depends on it"
    )
