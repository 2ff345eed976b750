"""KL divergence and changed predictions against the first model of a branch, against ten lines on whole models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from coldpress.storage.artifacts import Artifact
from coldpress.storage.store import Store
from coldpress.tasks.evaluation.divergence import compare
from torch import Tensor


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_divergence_is_that_of_the_whole_models(
    family: str,
    store: Store,
    import_model: Callable[..., Artifact],
    whole_model: Callable[..., Any],
    make_tokens: Callable[..., Artifact],
    windows: Callable[[Artifact], Tensor],
    run_stage: Callable[..., Artifact],
    read_metrics: Callable[[Artifact], dict[str, Any]],
    block_loop_logits: Callable[..., Tensor],
) -> None:
    base = import_model(family)
    data = make_tokens(base, split="test", samples=3, length=40)
    pruned = run_stage("prune/magnitude", {"model": base}, sparsity=0.5)
    expected = run_stage("statistics/outputs", {"model": base, "data": data})

    def measure(model: Artifact) -> dict[str, Any]:
        inputs = {"model": model, "data": data, "reference": base, "expected": expected}
        return read_metrics(run_stage("evaluate/divergence", inputs))

    with torch.no_grad():
        before = whole_model(family)(windows(data), use_cache=False).logits.double()
    after = block_loop_logits(pruned, windows(data)).double()
    ratio = (before.log_softmax(-1) - after.log_softmax(-1)) * before.softmax(-1)
    found = measure(pruned)
    assert found["kl_nats"] == pytest.approx(float(ratio.sum(-1).mean()), rel=1e-4)
    assert found["top1_changed"] == pytest.approx(float((before.argmax(-1) != after.argmax(-1)).double().mean()))
    assert 0 < found["top1_changed"] < 1
    same = measure(base)
    assert same["kl_nats"] == pytest.approx(0, abs=1e-6)
    assert same["top1_changed"] == 0


def test_kl_by_hand() -> None:
    reference = torch.tensor([[0.5, 0.5], [0.25, 0.75]]).log()
    found = torch.tensor([[0.25, 0.75], [0.75, 0.25]]).log()
    kl, changed = compare(reference, found)
    by_hand = 0.5 * (torch.tensor(2.0).log() + torch.tensor(2 / 3).log()) + 0.5 * torch.tensor(3.0).log()
    assert kl == pytest.approx(float(by_hand), rel=1e-6)
    assert changed == 2  # of two equals the first counts
