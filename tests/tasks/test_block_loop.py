"""The block loop: how much it holds in memory, what it reports, what it refuses."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import bitsandbytes  # noqa: F401 (what it logs when first imported would keep the importing frames, and a block, alive)
import pytest
import torch
from coldpress.storage.artifacts import Artifact
from coldpress.storage.store import Store, blob_path
from coldpress.tasks.architectures import family_of
from coldpress.tasks.blocks import StoredModel
from coldpress.tasks.catalogue import stage_named
from coldpress.tasks.stage import Run, StageError, compute

BLOCKS = 7


class Watch:
    """Notes which blocks' weights, as read from a store, are alive at the same time."""

    def __init__(self, store: Store, model: Artifact) -> None:
        manifest = store.manifest(model)
        family = family_of({"model_type": "llama"})
        self._block = {blob_path(entry.blob): family.block_of(name) for name, entry in manifest.tensors.items()}
        self._alive: list[tuple[int, weakref.ref[Any]]] = []
        self._lock = threading.Lock()
        self._read = store.files.read
        self.most: set[int] = set()
        self.seen: set[int] = set()

    def read(self, path: str) -> memoryview:
        """In place of the store's own `read`."""
        data = self._read(path)
        block = self._block.get(path)
        if block is not None:
            with self._lock:
                self._alive.append((block, weakref.ref(data.obj)))
                alive = {number for number, buffer in self._alive if buffer() is not None}
                self.seen.add(block)
                self.most = max(self.most, alive, key=len)
        return data


@pytest.fixture
def deep_model(import_model: Callable[..., Artifact]) -> Artifact:
    return import_model("llama", num_hidden_layers=BLOCKS)


@pytest.mark.parametrize(
    ("stage", "role", "parameters"),
    [
        ("prune/wanda", "calibration", {"sparsity": 0.5}),
        ("prune/magnitude", None, {"sparsity": 0.5}),
        ("quantize/gptq", "calibration", {"group_size": 32}),
        ("quantize/nf4", None, {}),
        ("evaluate/perplexity", "data", {}),
        ("compensate/eora", "calibration", {"rank": 4}),
        ("evaluate/size", None, {}),
    ],
)
def test_at_most_the_block_at_work_and_the_one_being_read_are_in_memory(
    stage: str,
    role: str | None,
    parameters: dict[str, Any],
    store: Store,
    deep_model: Artifact,
    make_tokens: Callable[..., Artifact],
    run_stage: Callable[..., Artifact],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    inputs = {"model": deep_model} | ({role: make_tokens(deep_model, samples=2)} if role else {})
    if "original" in stage_named(stage).inputs:
        inputs["original"] = deep_model
    watch = Watch(store, deep_model)
    monkeypatch.setattr(store.files, "read", watch.read)
    run_stage(stage, inputs, **parameters)
    assert watch.seen == set(range(BLOCKS))
    assert len(watch.most) <= 2, watch.most


@pytest.mark.parametrize("stage", ["prune/wanda", "prune/magnitude"])
def test_progress_is_reported_once_a_block(
    stage: str, store: Store, deep_model: Artifact, make_tokens: Callable[..., Artifact]
) -> None:
    said: list[tuple[str, int, int]] = []
    entry = stage_named(stage)
    inputs = {"model": deep_model, "calibration": make_tokens(deep_model)}
    run = Run(store, progress=lambda what, done, total: said.append((what, done, total)))
    compute(run, entry, entry.parameters(sparsity=0.5), {role: inputs[role] for role in entry.inputs})
    assert said == [("pruning", done, BLOCKS) for done in range(1, BLOCKS + 1)]


def test_a_checkpoint_without_one_of_its_blocks_is_refused(store: Store, deep_model: Artifact) -> None:
    manifest = store.manifest(deep_model)
    tensors = {name: entry for name, entry in manifest.tensors.items() if ".layers.4." not in name}
    cut = store.put_manifest(replace(manifest, tensors=tensors))
    with pytest.raises(StageError, match="no tensors for block 4 of 7"):
        StoredModel(Run(store), cut)


def test_stages_leave_no_gradients_to_be_tracked(
    deep_model: Artifact, make_tokens: Callable[..., Artifact], run_stage: Callable[..., Artifact]
) -> None:
    assert torch.is_grad_enabled()
    run_stage("prune/wanda", {"model": deep_model, "calibration": make_tokens(deep_model)}, sparsity=0.5)
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_calibration_pass_runs_in_the_dtype_asked_for_and_stores_in_the_models_own(
    dtype: str,
    store: Store,
    import_model: Callable[..., Artifact],
    make_tokens: Callable[..., Artifact],
    run_stage: Callable[..., Artifact],
) -> None:
    base = import_model("llama")
    inputs = {"model": base, "calibration": make_tokens(base)}
    own, other = (run_stage("prune/wanda", inputs, sparsity=0.5, dtype=name) for name in ("float32", dtype))
    assert own != other  # some near ties fall the other way
    assert {entry.dtype for entry in store.manifest(other).tensors.values()} == {"F32"}
    assert run_stage("prune/wanda", inputs, sparsity=0.5) == own
