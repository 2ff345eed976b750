"""Journals: what an unfinished stage has done, so that the next attempt goes on from there.

    journals/<key>/preimage             the key's pre-image, and whose attempt it is (recipe and node)
    journals/<key>/steps/00017          one finished step (a block, a training step): a JSON record
    journals/<key>/state                after how many steps to go on, and the name of the file beside it
    journals/<key>/tensors-<digest>     the tensors to go on with: activations; adapter, optimizer …

A step counts only with all steps before it, and a state only if the steps that it presumes are there. Each file has
a checksum or is named by its digest; a damaged one counts as not written. So whatever moment a process dies at, what
is left is a beginning of the stage's work. Every attempt at a key does the same work: two at once do no harm.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from .digests import digest_of, seal, sha256, unseal
from .errors import DamagedBlob
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
    """The journal of one key, read from the store at construction."""

    def __init__(self, store: Store, preimage: Mapping[str, Any], context: Mapping[str, Any]) -> None:
        self._files = store.files
        self._store = store
        self._folder = f"journals/{digest_of(preimage)}"
        self._head = {"preimage": dict(preimage), "context": dict(context)}
        self.steps: list[dict[str, Any]] = list(self._read_steps())

    def commit(self, record: Mapping[str, Any]) -> None:
        """Add a finished step. Blobs that the record names must have been written before."""
        self._files.sync()  # what the record names survives a power cut before the record does
        if not self.steps:
            self._files.replace(f"{self._folder}/preimage", [seal(self._head)])
        self._files.replace(self._step_path(len(self.steps)), [seal(dict(record))])
        self._files.sync()
        self.steps.append(dict(record))

    def save_state(self, step: int, tensors: Mapping[str, torch.Tensor], record: Mapping[str, Any]) -> None:
        """Keep what is needed to go on after `step` finished steps; the state before this one is deleted."""
        data = {name: from_torch(tensor) for name, tensor in tensors.items()}
        header = encode_header({name: (tensor.dtype, tensor.shape) for name, tensor in data.items()})
        buffers = [header, *(tensor.data for tensor in data.values())]
        name = f"tensors-{sha256(*buffers)}"
        self._files.replace(f"{self._folder}/{name}", buffers)
        self._files.sync()
        self._files.replace(f"{self._folder}/state", [seal({"step": step, "tensors": name, "record": dict(record)})])
        self._files.sync()
        for path, _ in list(self._files.list(self._folder)):
            if path.startswith(f"{self._folder}/tensors-") and not path.endswith(name):
                self._delete(path)

    def state(self) -> State | None:
        """The saved state, or None if there is none that fits the steps."""
        try:
            saved = unseal(self._files.read(f"{self._folder}/state"), "")
            data = self._files.read(f"{self._folder}/{saved['tensors']}")
            if saved["step"] > len(self.steps) or saved["tensors"] != f"tensors-{sha256(data)}":
                return None
            tensors = {name: to_torch(tensor) for name, tensor in decode(data, "").items()}
        except (FileNotFoundError, DamagedBlob):
            return None
        return State(saved["step"], tensors, saved["record"])

    def discard(self) -> None:
        """Delete the journal: its stage is done."""
        for path, _ in list(self._files.list(self._folder)):
            self._delete(path)

    def _read_steps(self) -> Iterator[dict[str, Any]]:
        try:
            unseal(self._files.read(f"{self._folder}/preimage"), "")
            for number in range(10**5):
                step = unseal(self._files.read(self._step_path(number)), "")
                if self._store.missing_blobs(step.get("blobs", {})):
                    return
                yield step
        except (FileNotFoundError, DamagedBlob):
            return

    def _step_path(self, number: int) -> str:
        return f"{self._folder}/steps/{number:05}"

    def _delete(self, path: str) -> None:
        try:
            self._files.delete(path)
        except FileNotFoundError:  # another attempt at the key has finished meanwhile
            return


def unfinished(store: Store) -> Iterator[dict[str, Any]]:
    """{"preimage": …, "context": …} of each journal."""
    for path, _ in store.files.list("journals"):
        if path.endswith("/preimage"):
            try:
                yield unseal(store.files.read(path), path)
            except (FileNotFoundError, DamagedBlob):
                continue
