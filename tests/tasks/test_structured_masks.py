"""Heads and channels under masks: what Wanda-sp masks is what it would remove, and slicing changes nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from coldpress.storage.artifacts import Artifact, ArtifactReader
from coldpress.storage.export import export_bytes
from coldpress.storage.store import Store
from coldpress.tasks.adaptation.losa_stage import LosaParameters
from coldpress.tasks.stage import StageError
from pydantic import ValidationError
from torch import Tensor

LOSA: dict[str, Any] = {
    "criterion": "wanda-sp", "sparsity": 0.4, "rounds": 3, "steps": 12, "batch_size": 4, "micro_batch_size": 4,
    "learning_rate": 1e-2, "rank": 4, "max_rank": 8, "dtype": "float32",
}  # fmt: skip


def removed(store: Store, model: Artifact) -> dict[str, Tensor]:
    """{weight: True where masked away}."""
    with ArtifactReader(store, model) as reader:
        shapes = {name: reader.manifest.tensors[name].shape for name in reader.manifest.masks}
        return {name: ~mask for name, mask in reader.masks(shapes).items()}  # type: ignore[arg-type]


@pytest.mark.parametrize("family", ["llama", "opt"])
@pytest.mark.parametrize("allocation", ["uniform", "rmi"])
def test_masking_then_slicing_is_removing(
    family: str,
    allocation: str,
    store: Store,
    import_model: Callable[..., Artifact],
    make_tokens: Callable[..., Artifact],
    run_stage: Callable[..., Artifact],
    windows: Callable[[Artifact], Tensor],
    block_loop_logits: Callable[..., Tensor],
) -> None:
    base = import_model(family, num_hidden_layers=4)
    tokens = make_tokens(base)
    settings = {"sparsity": 0.5, "allocation": allocation, "parts": "ffn" if family == "opt" else "all"}
    inputs = {"model": base, "calibration": tokens}
    masked = run_stage("prune/wanda-sp", inputs, **settings, masked=True)
    sliced = run_stage("prune/slice", {"model": masked})
    narrow = run_stage("prune/wanda-sp", inputs, **settings)
    ids = windows(make_tokens(base, seed=1))
    expected = block_loop_logits(narrow, ids)
    for other in (masked, sliced):
        torch.testing.assert_close(block_loop_logits(other, ids), expected, atol=1e-4, rtol=1e-4)
    size = {model: export_bytes(store.manifest(model)) for model in (masked, sliced, narrow)}
    assert size[sliced] < size[masked]
    if allocation == "uniform":
        assert sliced == narrow  # the very same model: no masks are left over


def test_what_was_masked_stays_masked_whatever_later_scores_say(
    store: Store,
    import_model: Callable[..., Artifact],
    make_tokens: Callable[..., Artifact],
    run_stage: Callable[..., Artifact],
) -> None:
    base = import_model("llama")
    tokens = make_tokens(base)
    first = run_stage("prune/wanda-sp", {"model": base, "calibration": tokens}, sparsity=0.5, masked=True)
    other = make_tokens(base, seed=7)
    for sparsity in (0.3, 0.7):
        again = run_stage("prune/wanda-sp", {"model": first, "calibration": other}, sparsity=sparsity, masked=True)
        before, after = removed(store, first), removed(store, again)
        assert all(bool((after[name] | ~before[name]).all()) for name in before)
        gone = sum(int(mask.sum()) for mask in after.values()) / sum(mask.numel() for mask in after.values())
        assert gone == pytest.approx(max(0.5, sparsity), abs=0.02)


@pytest.mark.parametrize("rates", [True, False])
def test_structured_losa_ends_in_a_narrower_model_that_is_better_than_pruning_alone(
    rates: bool,
    store: Store,
    import_model: Callable[..., Artifact],
    make_tokens: Callable[..., Artifact],
    run_stage: Callable[..., Artifact],
    read_metrics: Callable[[Artifact], dict[str, Any]],
) -> None:
    model = import_model("llama", num_hidden_layers=4)
    data = make_tokens(model, samples=8)
    adapted = run_stage("adapt/losa", {"model": model, "calibration": data, "data": data}, **LOSA, layer_rates=rates)
    pruned = run_stage("prune/wanda-sp", {"model": model, "calibration": data}, sparsity=0.4, dtype="float32")
    before, after = (
        read_metrics(run_stage("evaluate/perplexity", {"model": one, "data": data}))["perplexity"]
        for one in (pruned, adapted)
    )
    assert after < before
    dense, mine = (export_bytes(store.manifest(one)) for one in (model, adapted))
    assert mine < dense
    note = next(iter(store.actions("adapt/losa"))).provenance
    shares = list(note["share_of_block"].values())
    assert sum(shares) / len(shares) == pytest.approx(0.4, abs=0.02)
    if not rates:
        assert not store.manifest(adapted).masks
        assert mine == export_bytes(store.manifest(pruned))


def test_slicing_needs_masks(import_model: Callable[..., Artifact], run_stage: Callable[..., Artifact]) -> None:
    with pytest.raises(StageError, match="no masks, so there is nothing to slice"):
        run_stage("prune/slice", {"model": import_model("llama")})


def test_structured_losa_refuses_what_is_for_weights() -> None:
    with pytest.raises(ValidationError, match="pattern is for weights"):
        LosaParameters(criterion="wanda-sp", pattern="2:4")
    with pytest.raises(ValidationError, match="say how much of the blocks' weights"):
        LosaParameters(criterion="wanda-sp")
    with pytest.raises(ValidationError, match="slsqp is for weights"):
        LosaParameters(criterion="wanda-sp", sparsity=0.5, rmi_solver="slsqp")
