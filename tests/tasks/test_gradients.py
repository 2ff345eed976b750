"""Gradient statistics block by block are those of whole-model backpropagation, and the criteria that take them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from coldpress.storage.artifacts import Artifact, ArtifactReader
from coldpress.storage.store import Store
from coldpress.tasks.catalogue import stage_named
from coldpress.tasks.pruning.criteria import gblm_score, pruner_zero_score
from coldpress.tasks.pruning.selection import keep_by_row
from coldpress.tasks.resuming import SavingPace
from coldpress.tasks.stage import Preempted, Run, compute
from torch import Tensor

Tensors = dict[str, Tensor]


def whole_model_gradients(model: Any, windows: Tensor, norm: str) -> Tensors:
    """100 times the norm over windows of the gradients of each window's mean loss, by one backward pass a window."""
    model = model.float().requires_grad_(True)
    sums: Tensors = {}
    for window in windows:
        model.zero_grad()
        model(window[None], labels=window[None], use_cache=False).loss.backward()
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and parameter.grad is not None and ".layers." in name:
                scaled = 100 * parameter.grad.double()
                sums[name] = sums.get(name, 0) + (scaled.abs() if norm == "l1" else scaled**2)
    return sums if norm == "l1" else {name: total.sqrt() for name, total in sums.items()}


@pytest.mark.parametrize("norm", ["l1", "l2"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "opt", "gemma2"])
def test_gradients_are_those_of_the_whole_model(
    family: str, norm: str, import_model: Callable[..., Artifact], make_tokens: Callable[..., Artifact],
    run_stage: Callable[..., Artifact], read_tensors: Callable[..., Tensors], whole_model: Callable[..., Any],
    windows: Callable[[Artifact], Tensor],
) -> None:  # fmt: skip
    model = import_model(family)
    tokens = make_tokens(model)
    ours = read_tensors(run_stage("statistics/gradients", {"model": model, "calibration": tokens}, norm=norm))
    expected = whole_model_gradients(whole_model(family), windows(tokens), norm)
    assert ours.keys() == {name for name in expected if "embed" not in name}
    for name, gradient in ours.items():
        assert torch.allclose(gradient.double(), expected[name], rtol=1e-3, atol=1e-5 * float(expected[name].max())), (
            name
        )


def test_a_gradient_agrees_with_a_finite_difference(
    import_model: Callable[..., Artifact], make_tokens: Callable[..., Artifact], run_stage: Callable[..., Artifact],
    read_tensors: Callable[..., Tensors], whole_model: Callable[..., Any], windows: Callable[[Artifact], Tensor],
) -> None:  # fmt: skip
    model = import_model("llama")
    tokens = make_tokens(model, samples=1)
    ours = read_tensors(run_stage("statistics/gradients", {"model": model, "calibration": tokens}, norm="l1"))
    window, dense = windows(tokens), whole_model("llama")
    name = "model.layers.1.mlp.down_proj.weight"
    weight, step = dense.get_parameter(name).data, 1e-2
    largest = ours[name].flatten().argsort(descending=True)[:3]
    for place in (divmod(int(index), weight.shape[1]) for index in largest):
        losses = []
        for side in (1, -2, 1):  # the last puts it back
            weight[place] += side * step
            logits = dense(window, use_cache=False).logits[0, :-1].double()
            losses.append(float(torch.nn.functional.cross_entropy(logits, window[0, 1:])))
        slope = abs(losses[0] - losses[1]) / (2 * step)
        assert float(ours[name][place]) == pytest.approx(100 * slope, rel=2e-2)


@pytest.mark.parametrize("saved", [True, False])
@pytest.mark.parametrize("dies_after", [1, 2])
def test_a_killed_stage_goes_on_and_ends_in_the_same_artifact(
    saved: bool, dies_after: int, store: Store, new_store: Callable[[], Store],
    import_model: Callable[..., Artifact], make_tokens: Callable[..., Artifact], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(SavingPace, "due", lambda self: saved)
    entry = stage_named("statistics/gradients")

    def attempt(on: Store, stop: Callable[[], bool] = lambda: False, said: list[str] | None = None) -> Any:
        model = import_model("llama", on=on)
        inputs = {"model": model, "calibration": make_tokens(model, on=on)}
        run = Run(on, progress=lambda what, done, total: (said or []).append(what), stop_asked=stop)
        return compute(run, entry, entry.parameters(), inputs)

    heard: list[str] = ["begun"]
    with pytest.raises(Preempted):
        attempt(store, lambda: heard.count("gradients") >= dies_after, heard)
    resumed = attempt(store)
    note = resumed.provenance["resumed"]
    assert (note["from_block"], note["recomputed_blocks"]) == (dies_after, 0)
    assert resumed.artifact == attempt(new_store()).artifact


def test_scores_by_hand() -> None:
    weight = torch.tensor([[1.0, -2.0], [3.0, 0.5]])
    gradient = torch.tensor([[0.0, 1.0], [4.0, 2.0]])
    assert gblm_score(weight, torch.tensor([1.0, 10.0]), gradient).tolist() == [[1.0, 22.0], [15.0, 6.0]]
    assert pruner_zero_score(weight, gradient).tolist() == [[0.0, 1.0], [9.0, 0.125]]
    assert pruner_zero_score(weight, torch.ones(2, 2)).tolist() == [[0.0, 0.0], [0.0, 0.0]]


def test_gblm_is_wanda_with_the_gradient_added(
    store: Store, import_model: Callable[..., Artifact], make_tokens: Callable[..., Artifact],
    run_stage: Callable[..., Artifact], read_tensors: Callable[..., Tensors], whole_model: Callable[..., Any],
    windows: Callable[[Artifact], Tensor],
) -> None:  # fmt: skip
    import plain_methods

    model = import_model("llama")
    tokens = make_tokens(model)
    gradients = run_stage("statistics/gradients", {"model": model, "calibration": tokens})
    inputs = {"model": model, "calibration": tokens, "gradients": gradients}
    pruned = run_stage("prune/gblm", inputs, sparsity=0.5)
    grown, seen = read_tensors(gradients), windows(tokens)
    with ArtifactReader(store, pruned) as reader:
        shapes = {name: (entry.shape[0], entry.shape[1] * 8) for name, entry in reader.manifest.masks.items()}
        masks = reader.masks(shapes)
    dense = whole_model("llama")
    first = next(plain_methods.progressively(dense, "model.layers", seen))
    for name, parts in first.items():
        norm = (sum(part.double().square().sum(0) for part in parts) / len(seen)).sqrt().float()
        score = dense.get_parameter(name).abs() * (norm + grown[name])
        assert torch.equal(masks[name], keep_by_row(score, 0.5)), name


def test_pruner_zero_runs_on_gradients_alone(
    import_model: Callable[..., Artifact], make_tokens: Callable[..., Artifact], run_stage: Callable[..., Artifact],
    read_tensors: Callable[..., Tensors],
) -> None:  # fmt: skip
    model = import_model("llama")
    tokens = make_tokens(model)
    gradients = run_stage("statistics/gradients", {"model": model, "calibration": tokens})
    inputs = {"model": model, "calibration": tokens, "gradients": gradients}
    pruned, dense = read_tensors(run_stage("prune/pruner-zero", inputs, sparsity=0.5)), read_tensors(model)
    for name, gradient in read_tensors(gradients).items():
        expected = dense[name] * keep_by_row(pruner_zero_score(dense[name], gradient), 0.5)
        assert torch.equal(pruned[name], expected), name


def test_a_recipe_asks_for_one_gradient_artifact(
    tiny_model_folder: Callable[..., str], text_file: str, tmp_path: Path
) -> None:
    from coldpress.flows.recipe import load_recipe

    path = tmp_path / "recipe.yaml"
    path.write_text(f"""\
name: gradients
model: {{source: "{tiny_model_folder("llama")}"}}
data: {{calibration: {{source: "{text_file}", samples: 3, length: 32}}}}
stages:
  gblm: {{use: prune, method: gblm, model: base, calibration: calibration, sparsity: 0.5}}
  zero: {{use: prune, method: pruner-zero, model: base, calibration: calibration, pattern: "2:4"}}
  l1: {{use: prune, method: gblm, model: base, calibration: calibration, sparsity: 0.5, norm: l1}}
""")
    nodes = {node.name: node for node in load_recipe(str(path)).nodes}
    asked = {name: nodes[name].inputs["gradients"] for name in ("gblm", "zero", "l1")}
    assert asked["gblm"] == asked["zero"] == "base/gradients"
    assert asked["l1"] == "base/gradients[norm=l1]"
