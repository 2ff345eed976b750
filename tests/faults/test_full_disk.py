"""The disk is full from any moment of a stage on: a clear error, a sound store, and it goes on when there is room."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from typing import Any

import pytest
from coldpress.storage.artifacts import Artifact
from coldpress.storage.errors import StoreError
from coldpress.storage.inspect import verify
from coldpress.storage.store import Action, Store
from coldpress.tasks.catalogue import stage_named
from coldpress.tasks.resuming import SavingPace
from coldpress.tasks.stage import Run, compute

BLOCKS = 4


class FullDisk:
    """Stands in for the `os` module; from the `at`-th call of `write` on there is no room."""

    def __init__(self, at: int) -> None:
        self.writes = 0
        self._at = at
        self._lock = threading.Lock()

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def write(self, descriptor: int, data: memoryview) -> int:
        with self._lock:
            self.writes += 1
            if self.writes >= self._at:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return os.write(descriptor, data)


@pytest.fixture
def quantize(
    store: Store, import_model: Callable[..., Artifact], make_tokens: Callable[..., Artifact],
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[[Store], Action]:  # fmt: skip
    """Quantizes a model of a few blocks in the given store, saving activations after each."""
    monkeypatch.setattr(SavingPace, "due", lambda self: True)

    def run(on: Store) -> Action:
        model = import_model("llama", on=on, num_hidden_layers=BLOCKS)
        inputs = {"model": model, "calibration": make_tokens(model, on=on)}
        entry = stage_named("quantize/gptq")
        return compute(Run(on), entry, entry.parameters(group_size=32), inputs)

    return run


def test_a_stage_that_finds_no_room_says_so_and_goes_on_when_there_is_some(
    quantize: Callable[[Store], Action], new_store: Callable[[], Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = quantize(new_store())
    disk = FullDisk(at=10**9)
    with monkeypatch.context() as patch:
        patch.setattr("coldpress.storage.files.os", disk)
        assert quantize(new_store()).artifact == undisturbed.artifact
    resumed = 0
    for at in range(1, disk.writes + 1, max(1, disk.writes // 40)):
        store = new_store()
        with monkeypatch.context() as patch:
            patch.setattr("coldpress.storage.files.os", FullDisk(at))
            with pytest.raises(StoreError, match=r"the disk is full: could not write .*; free some space"):
                quantize(store)
        assert verify(Store(store.url)) == []
        again = quantize(Store(store.url))
        assert again.artifact == undisturbed.artifact
        assert verify(Store(store.url)) == []
        resumed += "resumed" in again.provenance
    assert resumed > 10
