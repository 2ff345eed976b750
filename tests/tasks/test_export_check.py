"""`export --check`: what a fresh process computes from the folder is what the checkpoint computes here."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from coldpress.storage.artifacts import Artifact
from coldpress.storage.store import Store
from coldpress.tasks.evaluation import exported
from coldpress.tasks.evaluation.exported import LENGTH, check_export
from coldpress.tasks.stage import StageError
from safetensors.torch import load_file, save_file


def test_a_dense_export_agrees_exactly_and_a_changed_one_does_not(
    import_model: Callable[..., Artifact], export_folder: Callable[..., str], store: Store
) -> None:
    model = import_model("llama")
    folder = export_folder(model)
    found = check_export(store, model, folder)
    assert found.agrees
    assert (found.difference, found.same, found.tokens) == (pytest.approx(0, abs=1e-6), LENGTH, LENGTH)
    weights = Path(folder) / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.layers.1.mlp.down_proj.weight"] *= 1.5
    save_file(tensors, weights, metadata={"format": "pt"})
    changed = check_export(store, model, folder)
    assert not changed.agrees
    assert changed.difference > 0.01 * changed.deviation


def test_in_half_precision_it_computes_as_the_other_process_does_whatever_the_processor(
    run_stage: Callable[..., Artifact], tiny_model_folder: Callable[..., str], whole_model: Callable[..., Any],
    store: Store, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("coldpress.tasks.half_precision.lacks_instructions", lambda dtype: True)
    monkeypatch.setattr("coldpress.tasks.half_precision._InFloat32", None)  # which nothing can be computed by
    model = run_stage("source/model", {}, source=tiny_model_folder("llama"), dtype="bfloat16")
    found = exported._logits(store, model, "cpu")
    window = exported._window(found.shape[1])[None]
    with torch.no_grad():
        theirs = whole_model("llama", torch.bfloat16)(window, use_cache=False).logits
    assert torch.equal(found, theirs[0].float())


@pytest.mark.parametrize("method", ["nf4", "int8"])
def test_packed_exports_agree_as_far_as_their_kernels_do(
    method: str, import_model: Callable[..., Artifact], run_stage: Callable[..., Artifact],
    export_folder: Callable[..., str], store: Store,
) -> None:  # fmt: skip
    packed = run_stage(f"quantize/{method}", {"model": import_model("llama")})
    assert check_export(store, packed, export_folder(packed)).agrees


def test_a_gptq_export_agrees(
    import_model: Callable[..., Artifact], run_stage: Callable[..., Artifact], export_folder: Callable[..., str],
    store: Store,
) -> None:  # fmt: skip
    pytest.importorskip("gptqmodel")
    packed = run_stage("quantize/rtn", {"model": import_model("llama")}, group_size=32)
    assert check_export(store, packed, export_folder(packed)).agrees


def test_what_does_not_load_says_why(
    import_model: Callable[..., Artifact], export_folder: Callable[..., str], store: Store
) -> None:
    model = import_model("llama")
    folder = Path(export_folder(model))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "nonesuch"}))
    with pytest.raises(StageError, match=r"does not load: ValueError: .*nonesuch"):
        check_export(store, model, str(folder))
