"""Journals: what an unfinished stage has done, so that the next attempt goes on from there.

    journals/<key>/<attempt>/head             the key's pre-image, whose attempt it is, what it took over from another
    journals/<key>/<attempt>/steps/00017      one finished step (a block, a training step): a JSON record
    journals/<key>/<attempt>/state            after how many steps to go on, and where the tensors for that are
    journals/<key>/<attempt>/tensors-<digest> the tensors to go on with: activations; adapter, optimizer …

An attempt is named by its lease (leases.py) and writes into a folder of its own, so that one which lost its lease,
and doesn't know yet, spoils nothing: the next attempt has copied the finished steps and goes on from these. A step
counts only with all steps before it, and a state only if the steps that it presumes are there. Each file has a
checksum or is named by its digest; a damaged one counts as not written. So whatever moment a process dies at, what is
left is a beginning of the stage's work.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from .digests import digest_of, seal, sha256, unseal
from .errors import DamagedBlob
from .leases import Lease, LeaseLost, is_held
from .tensors import decode, encode_header, from_torch, to_torch

if TYPE_CHECKING:
    import torch

    from .store import Store


class State(NamedTuple):
    """Where to go on: after `step` finished steps, with these tensors (on the CPU) and this JSON record."""

    step: int
    tensors: dict[str, torch.Tensor]
    record: dict[str, Any]


class Journal:
    """The journal of one key, with what earlier attempts left of it, read from the store at construction.

    steps: the finished ones. attempts: the contexts of all attempts whose work is in them, this one last.
    Without a lease nothing keeps another job from doing the same work.
    """

    def __init__(
        self, store: Store, preimage: Mapping[str, Any], context: Mapping[str, Any], lease: Lease | None = None
    ) -> None:
        self._files = store.files
        self._store = store
        self._lease = lease
        self._all = f"journals/{digest_of(preimage)}"
        self._folder = f"{self._all}/{lease.name if lease else '000000-' + secrets.token_hex(8)}"
        self._begun = False
        self._before = self._folders()
        earlier = max((self._read(folder) for folder in self._before), key=_how_much, default=_NOTHING)
        self.steps: list[dict[str, Any]] = list(earlier.steps)
        self.attempts = [*earlier.attempts, {**context, "from_step": len(self.steps)}]
        self._state = earlier.state
        self._head = {
            "preimage": dict(preimage),
            "context": dict(context),
            "attempts": self.attempts,
            "steps": earlier.steps,
            "state": earlier.state,
        }

    def commit(self, record: Mapping[str, Any]) -> None:
        """Add a finished step. What the record names under "blobs" (with sizes) and "artifacts" (ids) must have been
        written before, and is kept as long as the journal. Raises LeaseLost.
        """
        self._begin()  # also syncs: what the record names survives a power cut before the record does
        self._files.replace(f"{self._folder}/steps/{len(self.steps):05}", [seal(dict(record))])
        self._files.sync()
        self.steps.append(dict(record))

    def save_state(self, step: int, tensors: Mapping[str, torch.Tensor], record: Mapping[str, Any]) -> None:
        """Keep what is needed to go on after `step` finished steps; states before this one are deleted."""
        self._begin()
        data = {name: from_torch(tensor) for name, tensor in tensors.items()}
        header = encode_header({name: (tensor.dtype, tensor.shape) for name, tensor in data.items()})
        buffers = [header, *(tensor.data for tensor in data.values())]
        path = f"{self._folder}/tensors-{sha256(*buffers)}"
        self._files.replace(path, buffers)
        self._files.sync()
        self._state = {"step": step, "tensors": path, "record": dict(record)}
        self._files.replace(f"{self._folder}/state", [seal(self._state)])
        self._files.sync()
        self._begin()  # writing took its time, in which another attempt may have built on those before
        for other, _ in list(self._files.list(self._all)):
            folder = _folder_of(other)
            if folder in self._before or (folder == self._folder and "/tensors-" in other and other != path):
                self._delete(other)

    def state(self) -> State | None:
        """The saved state, or None if there is none that fits the steps."""
        saved = self._state
        if saved is None or saved["step"] > len(self.steps):
            return None
        try:
            data = self._files.read(saved["tensors"])
            if not saved["tensors"].endswith(f"/tensors-{sha256(data)}"):
                return None
            tensors = {name: to_torch(tensor) for name, tensor in decode(data, "").items()}
        except (FileNotFoundError, DamagedBlob):
            return None
        return State(saved["step"], tensors, saved["record"])

    def discard(self) -> None:
        """Delete the journal: its stage is done."""
        for path, _ in list(self._files.list(self._all)):
            self._delete(path)

    def _begin(self) -> None:
        """Before anything is written: make sure of the lease, and once write what was taken over."""
        if self._lease is not None and not is_held(self._store, self._lease):
            raise LeaseLost("another job has taken this stage over, since this one gave no sign of life for too long")
        self._files.sync()
        if not self._begun:
            self._files.replace(f"{self._folder}/head", [seal(self._head)])
            self._begun = True

    def _folders(self) -> set[str]:
        return {_folder_of(path) for path, _ in self._files.list(self._all)}

    def _read(self, folder: str) -> _Earlier:
        """What an attempt left, as far as it is whole."""
        try:
            head = unseal(self._files.read(f"{folder}/head"), "")
        except (FileNotFoundError, DamagedBlob):
            return _NOTHING
        steps: list[dict[str, Any]] = []
        for step in (*head["steps"], *self._own_steps(folder, len(head["steps"]))):
            if self._store.missing_blobs(step.get("blobs", {})) or not self._holds_all(step):
                break
            steps.append(step)
        try:
            state = unseal(self._files.read(f"{folder}/state"), "")
        except (FileNotFoundError, DamagedBlob):
            state = head["state"]
        return _Earlier(folder, steps, state, head["attempts"])

    def _holds_all(self, step: Mapping[str, Any]) -> bool:
        return all(self._store.holds(artifact) for artifact in step.get("artifacts", []))

    def _own_steps(self, folder: str, first: int) -> Iterator[dict[str, Any]]:
        try:
            for number in range(first, 10**5):
                yield unseal(self._files.read(f"{folder}/steps/{number:05}"), "")
        except (FileNotFoundError, DamagedBlob):
            return

    def _delete(self, path: str) -> None:
        try:
            self._files.delete(path)
        except FileNotFoundError:  # another attempt at the key has finished meanwhile
            return


class _Earlier(NamedTuple):
    folder: str
    steps: list[dict[str, Any]]
    state: dict[str, Any] | None
    attempts: list[dict[str, Any]]


_NOTHING = _Earlier("", [], None, [])


def _folder_of(path: str) -> str:
    """The attempt that a file belongs to."""
    return "/".join(path.split("/")[:3])


def _how_much(earlier: _Earlier) -> tuple[int, str]:
    """The attempt to go on from has most steps; among equals it is the newest."""
    return len(earlier.steps), earlier.folder


def unfinished(store: Store) -> list[dict[str, Any]]:
    """{"preimage": …, "context": …} of each key that has a journal: those of its newest attempt."""
    newest: dict[str, dict[str, Any]] = {}
    for path in sorted(path for path, _ in store.files.list("journals")):
        if path.endswith("/head"):
            try:
                newest[path.split("/")[1]] = unseal(store.files.read(path), path)
            except (FileNotFoundError, DamagedBlob):
                continue
    return list(newest.values())
