"""Fixtures for the tests of stages: whole `transformers` models, and the block loop's logits."""

from __future__ import annotations

import json
import subprocess
import sys
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from coldpress.storage.artifacts import Artifact
from coldpress.storage.journal import Journal
from coldpress.storage.store import Store
from coldpress.tasks.blocks import StoredModel, stream_hidden
from coldpress.tasks.skeleton import Skeleton
from coldpress.tasks.stage import Run
from elsewhere import Loaded
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.utils import logging

logging.disable_progress_bar()

BLOCKS = {"opt": "model.decoder.layers", "gpt_neox": "gpt_neox.layers"}


@pytest.fixture
def blocks_of() -> Callable[[str], str]:
    """Name of the module list that holds a family's blocks."""
    return lambda family: BLOCKS.get(family, "model.layers")


@pytest.fixture
def whole_model(tiny_model_folder: Callable[..., str]) -> Callable[..., Any]:
    """`whole_model("llama", **changes)`: the tiny model as `transformers` loads it, in float32 unless told."""

    def load(family: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
        folder = tiny_model_folder(family, **changes)
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval().requires_grad_(False)

    return load


@pytest.fixture
def windows(read_tensors: Callable[..., dict[str, Tensor]]) -> Callable[[Artifact], Tensor]:
    """The token ids [windows, length] of a tokens artifact."""
    return lambda tokens: read_tensors(tokens)["input_ids"].long()


@pytest.fixture
def block_loop_logits(store: Store) -> Callable[..., Tensor]:
    """`block_loop_logits(model, windows)`: logits [windows, length, vocabulary], a block at a time."""

    @torch.no_grad()
    def logits(model: Artifact, windows: Tensor, on: Store | None = None, dtype: torch.dtype | None = None) -> Tensor:
        target = on or store
        run = Run(target, journal=Journal(target, {"stage": "testing", "of": uuid.uuid4().hex}, {}))
        with StoredModel(run, model) as stored:
            skeleton = Skeleton(stored.config, dtype or stored.dtype, run.device)
            hidden, outer, _ = stream_hidden(run, stored, skeleton, windows, "testing")
            return torch.cat([skeleton.logits(outer, skeleton.finish(outer, inputs[None])) for inputs in hidden])

    return logits


@pytest.fixture
def torchs_own_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """The block loop multiplies in half precision as models that others load do, on every CPU."""
    monkeypatch.setattr("coldpress.tasks.half_precision.lacks_instructions", lambda dtype: False)


@pytest.fixture
def fresh_process() -> Callable[..., None]:
    """`fresh_process(script, *arguments)`: runs Python code in a process of its own, which must succeed."""

    def run(script: str, *arguments: str) -> None:
        done = subprocess.run(
            [sys.executable, "-c", script, *arguments], capture_output=True, text=True, timeout=900, check=False
        )
        assert done.returncode == 0, done.stderr[-3000:]

    return run


@pytest.fixture
def load_elsewhere(
    tmp_path: Path, fresh_process: Callable[..., None], export_folder: Callable[..., str]
) -> Callable[..., dict[str, Loaded]]:
    """`load_elsewhere(script, windows, {name: model})`: what a fresh process finds in the models' exports."""

    def load(
        script: str, windows: Tensor, models: dict[str, Artifact], on: Store | None = None, format: str | None = None
    ) -> dict[str, Loaded]:
        save_file({"windows": windows.contiguous()}, tmp_path / "windows.safetensors")
        fresh_process(script, str(tmp_path), *(export_folder(model, on, format) for model in models.values()))
        errors = json.loads((tmp_path / "errors.json").read_text())
        assert {name: errors[str(number)] for number, name in enumerate(models) if str(number) in errors} == {}
        found = {}
        for number, name in enumerate(models):
            tensors = load_file(tmp_path / f"{number}.safetensors")
            found[name] = Loaded(tensors.pop("logits"), tensors)
        return found

    return load


@pytest.fixture
def dense_weights(store: Store) -> Callable[..., dict[str, Tensor]]:
    """Weights of the block linears as the block loop sees them, by layer name."""

    def read(model: Artifact, on: Store | None = None) -> dict[str, Tensor]:
        with StoredModel(Run(on or store), model) as stored:
            return {
                name.removesuffix(".weight"): weight
                for index in range(stored.blocks)
                for name, weight in stored.unpack(stored.stored(index), torch.float32).items()
                if name in stored.linears(index)
            }

    return read
