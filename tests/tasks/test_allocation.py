"""Layer-wise allocation: shares whose mean is the asked one, from figures that agree with plain computations."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from typing import Any

import plain_methods
import pytest
import torch
from coldpress.storage.artifacts import Artifact
from coldpress.storage.store import Store
from coldpress.tasks.catalogue import stage_named
from coldpress.tasks.pruning.allocation import mixed_patterns, owl_shares, rmi_shares, rmi_shares_slsqp, rmi_spread
from coldpress.tasks.pruning.selection import parse_pattern
from coldpress.tasks.pruning.statistics import centred_kernel, read_blocks, redundancies
from coldpress.tasks.stage import ModelFacts, StageError
from pydantic import ValidationError
from torch import Tensor

OUTLIERS = [0.031, 0.004, 0.009, 0.022, 0.001]


@pytest.mark.parametrize("sparsity", [0.05, 0.5, 0.7, 0.97])
def test_owl_shares_have_the_asked_mean_and_spare_blocks_with_outliers(sparsity: float) -> None:
    shares = owl_shares(OUTLIERS, sparsity)
    assert math.fsum(shares) / len(shares) == pytest.approx(sparsity, abs=1e-12)
    assert sorted(range(5), key=lambda block: shares[block]) == sorted(range(5), key=lambda block: -OUTLIERS[block])
    assert min(shares) >= 0.01 - 1e-12
    assert max(shares) < 1
    if sparsity in (0.5, 0.7):  # there is room for the whole spread
        assert max(shares) - min(shares) == pytest.approx(0.16)


def test_owl_by_hand() -> None:
    assert owl_shares([0.0, 1.0, 0.5], 0.7, 0.1) == pytest.approx([0.8, 0.6, 0.7])
    assert owl_shares([0.2, 0.2], 0.7) == [0.7, 0.7]


@pytest.mark.parametrize("blocks", [4, 5])
def test_rmi_shares_are_the_optimum_of_the_linear_program(blocks: int) -> None:
    redundancy = torch.rand(blocks, generator=torch.Generator().manual_seed(blocks)).mul(3).tolist()
    shares = rmi_shares(redundancy, 0.6, 0.02)
    assert math.fsum(shares) / blocks == pytest.approx(0.6, abs=1e-12)
    importance = [math.exp(-value) for value in redundancy]
    # Vertices of the feasible set: all but one share at a bound, that one makes the mean right.
    best = math.inf
    for free in range(blocks):
        for signs in itertools.product((-1, 1), repeat=blocks - 1):
            others = [0.6 + 0.02 * sign for sign in signs]
            rest = 0.6 * blocks - sum(others)
            if abs(rest - 0.6) <= 0.02 + 1e-12:
                vertex = [*others[:free], rest, *others[free:]]
                best = min(best, sum(p * s for p, s in zip(importance, vertex, strict=True)))
    assert sum(p * s for p, s in zip(importance, shares, strict=True)) == pytest.approx(best, abs=1e-9)


def test_the_spread_of_rmi_grows_with_sparsity_and_never_leaves_the_possible() -> None:
    assert [rmi_spread(s) for s in (0.3, 0.5, 0.55, 0.7, 0.9)] == [0.01, 0.01, 0.02, 0.03, 0.03]
    assert all(0 < share < 1 for share in rmi_shares([1.0, 2.0, 3.0, 4.0], 0.02, 0.4))


def test_similarity_is_one_for_equal_inputs_and_does_not_see_shifts_and_scales() -> None:
    torch.manual_seed(0)
    inputs = torch.randn(6, 5, 8)
    kernels = [centred_kernel(part).tolist() for part in (inputs, 3 * inputs + 2, torch.randn(6, 5, 8))]
    first, second, third = redundancies(kernels)
    assert first == pytest.approx(second, abs=1e-5)
    assert 1 < first < 2
    assert third < first
    flat = inputs.flatten(1).double()
    centred = flat - flat.mean(0)
    assert torch.allclose(centred_kernel(inputs), centred @ centred.T, atol=1e-4)


@pytest.fixture
def measure(
    import_model: Callable[..., Artifact], make_tokens: Callable[..., Artifact], run_stage: Callable[..., Artifact]
) -> Callable[..., Artifact]:
    """`measure("owl", threshold=3)`: the statistics artifact of a tiny Llama."""

    def run(method: str, **parameters: Any) -> Artifact:
        model = import_model("llama")
        return run_stage(f"statistics/{method}", {"model": model, "calibration": make_tokens(model)}, **parameters)

    return run


def test_outliers_are_those_of_the_whole_dense_model(
    measure: Callable[..., Artifact], store: Store, whole_model: Callable[..., Any],
    import_model: Callable[..., Artifact], make_tokens: Callable[..., Artifact], windows: Callable[[Artifact], Tensor],
) -> None:  # fmt: skip
    model = whole_model("llama")
    expected = []
    for inputs in plain_methods.progressively(model, "model.layers", windows(make_tokens(import_model("llama")))):
        scores = [
            (model.get_parameter(name).abs() * torch.cat(parts).double().square().sum(0).sqrt()).flatten()
            for name, parts in inputs.items()
        ]
        pooled = torch.cat(scores)
        expected.append(float((pooled > 2 * pooled.mean()).double().mean()))
    assert min(expected) > 0.01
    assert read_blocks(store, measure("owl", threshold=2)) == pytest.approx(expected, abs=1e-4)


def test_redundancy_is_that_of_the_blocks_inputs(
    measure: Callable[..., Artifact], store: Store, whole_model: Callable[..., Any],
    import_model: Callable[..., Artifact], make_tokens: Callable[..., Artifact], windows: Callable[[Artifact], Tensor],
) -> None:  # fmt: skip
    tokens = windows(make_tokens(import_model("llama")))
    with torch.no_grad():
        states = whole_model("llama")(tokens, output_hidden_states=True, use_cache=False).hidden_states[:3]
    centred = [state.flatten(1).double() - state.flatten(1).double().mean(0) for state in states]
    kernels = [features @ features.T for features in centred]
    expected = [
        sum(float((k * other).sum() / (k.norm() * other.norm())) for other in kernels if other is not k)
        for k in kernels
    ]
    assert read_blocks(store, measure("rmi")) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_each_block_loses_its_share(
    method: str, store: Store, measure: Callable[..., Artifact], import_model: Callable[..., Artifact],
    make_tokens: Callable[..., Artifact], run_stage: Callable[..., Artifact],
) -> None:  # fmt: skip
    model = import_model("llama")
    inputs = {"model": model, "calibration": make_tokens(model), "measured": measure("owl", threshold=2.0)}
    settings = {"sparsity": 0.6, "allocation": "owl", "outlier_threshold": 2.0}
    run_stage(f"prune/{method}", inputs, **settings)
    (action,) = store.actions(f"prune/{method}")
    shares = owl_shares(read_blocks(store, inputs["measured"]), 0.6)
    for name, realized in action.provenance["sparsity"].items():
        assert realized == pytest.approx(shares[int(name.split(".")[2])], abs=1 / 64)
    explicit = run_stage(
        f"prune/{method}", {role: inputs[role] for role in ("model", "calibration")}, sparsity=0.6, allocation=shares
    )
    assert explicit == action.artifact


@pytest.mark.parametrize(("text", "shares", "kept"), [
    ("4:8", [0.53, 0.47, 0.53, 0.47, 0.53, 0.47, 0.5, 0.5], [4, 5, 4, 4, 3, 4, 4, 4]),
    ("4:8", [0.5] * 4, [4] * 4),
    ("2:4", [0.4, 0.6, 0.5, 0.5], [2, 2, 2, 2]),
    ("2:4", [0.3, 0.7, 0.5, 0.5], [3, 1, 2, 2]),
    ("8:16", [0.1, 0.9, 0.2, 0.8, 0.5], [9, 7, 9, 7, 8]),
])  # fmt: skip
def test_mixed_patterns_keep_the_mean_exactly(text: str, shares: list[float], kept: list[int]) -> None:
    pattern = parse_pattern(text)
    mixed = mixed_patterns(shares, pattern)
    assert sum(one.kept for one in mixed) == pattern.kept * len(shares)
    assert {one.group for one in mixed} == {pattern.group}
    assert [one.kept for one in mixed] == kept
    spared = [share for share, one in zip(shares, mixed, strict=True) if one.kept > pattern.kept]
    pruned = [share for share, one in zip(shares, mixed, strict=True) if one.kept < pattern.kept]
    assert not spared or max(spared) <= min(pruned)


def test_the_reference_solver_stops_between_the_mean_and_the_optimum() -> None:
    redundancy = [1 + torch.rand(1, generator=torch.Generator().manual_seed(seed)).item() for seed in range(30)]
    weights = torch.tensor([math.exp(-100 * value / sum(redundancy)) for value in redundancy], dtype=torch.float64)
    exact = torch.tensor(rmi_shares(redundancy, 0.7), dtype=torch.float64)
    found = torch.tensor(rmi_shares_slsqp(redundancy, 0.7, beta=100.0), dtype=torch.float64)
    assert float(found.mean()) == pytest.approx(0.7, abs=1e-12)
    assert float((found - 0.7).abs().max()) <= 0.03 + 1e-6
    assert float(weights @ exact) <= float(weights @ found) + 1e-9 < float(weights.sum()) * 0.7
    assert 0.5 < float(torch.corrcoef(torch.stack([exact, found]))[0, 1]) <= 1


def test_too_few_windows_say_nothing_of_redundancy(
    import_model: Callable[..., Artifact], make_tokens: Callable[..., Artifact], run_stage: Callable[..., Artifact]
) -> None:
    model = import_model("llama")
    with pytest.raises(StageError, match="take at least 3 samples"):
        run_stage("statistics/rmi", {"model": model, "calibration": make_tokens(model, samples=2)})
    assert rmi_shares([1.0, 1.0, 1.0], 0.5) == [0.5] * 3


@pytest.mark.parametrize("allocation", ["owl", "rmi"])
def test_magnitude_takes_calibration_data_for_its_allocation_alone(
    allocation: str, store: Store, import_model: Callable[..., Artifact], make_tokens: Callable[..., Artifact],
    run_stage: Callable[..., Artifact],
) -> None:  # fmt: skip
    model = import_model("llama", num_hidden_layers=4)
    inputs = {"model": model, "calibration": make_tokens(model)}
    run_stage("prune/magnitude", inputs, sparsity=0.6, allocation=allocation, spread=0.1)
    (action,) = store.actions("prune/magnitude")
    assert action.preimage["inputs"].keys() == {"model", "measured"}
    realized = list(action.provenance["sparsity"].values())
    assert sum(realized) / len(realized) == pytest.approx(0.6, abs=1e-3)
    assert max(realized) - min(realized) > 0.05


def test_patterns_are_mixed_by_blocks_and_by_a_list(
    store: Store, import_model: Callable[..., Artifact], make_tokens: Callable[..., Artifact],
    run_stage: Callable[..., Artifact],
) -> None:  # fmt: skip
    model = import_model("llama", num_hidden_layers=4)
    inputs = {"model": model, "calibration": make_tokens(model)}
    mixed = run_stage("prune/wanda", inputs, pattern="4:8", allocation="rmi", spread=0.2)
    (action,) = store.actions("prune/wanda")
    shares = [action.provenance["sparsity"][f"model.layers.{index}.mlp.up_proj.weight"] for index in range(4)]
    assert sorted(shares) == [0.375, 0.375, 0.625, 0.625]
    assert run_stage("prune/wanda", inputs, pattern="4:8", allocation=shares) == mixed


def test_allocations_that_cannot_be_are_refused() -> None:
    parameters = stage_named("prune/wanda").parameters
    for wrong, said in (
        ({"sparsity": 0.5, "allocation": [0.4, 0.5]}, "mean of allocation is 0.4500"),
        ({"sparsity": 0.5, "allocation": [1.0, 0.0]}, "at least 0 and below 1"),
        ({"pattern": "1:4", "allocation": "owl"}, "'1:4' has no room for blocks"),
        ({"pattern": "2:4", "allocation": [0.5, 0.25]}, "mean of allocation is 0.3750, but '2:4' is 0.5"),
        ({"pattern": "2:4", "allocation": [0.4, 0.6]}, "multiples of 1/4"),
        ({"sparsity": 0.5, "rmi_solver": "slsqp"}, "for 'allocation: rmi'"),
        ({"sparsity": 0.5, "allocation": "rmi", "rmi_beta": 100}, "for 'rmi_solver: slsqp'"),
        ({"sparsity": 0.5, "spread": 0.1}, "spread is for the allocations owl and rmi"),
    ):
        with pytest.raises(ValidationError, match=said):
            parameters(**wrong)
    config = {"model_type": "llama", "num_hidden_layers": 3, "hidden_size": 64, "intermediate_size": 128,
              "num_attention_heads": 4}  # fmt: skip
    (said,) = stage_named("prune/wanda").check(parameters(sparsity=0.5, allocation=[0.4, 0.6]), ModelFacts(config))
    assert said == "allocation has 2 shares, but the model has 3 blocks"


def test_what_is_measured_is_asked_for_by_the_recipe_and_shared(
    tiny_model_folder: Callable[..., str], text_file: str, tmp_path: Any
) -> None:
    from coldpress.flows.recipe import load_recipe

    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps({
        "name": "allocated", "model": {"source": tiny_model_folder("llama")},
        "data": {"calibration": {"source": text_file, "samples": 3, "length": 32}},
        "stages": {"pruned": {
            "use": "prune", "method": "wanda", "model": "base", "calibration": "calibration", "allocation": "owl",
            "matrix": {"sparsity": [0.5, 0.6]},
        }},
    }))  # fmt: skip
    recipe = load_recipe(str(path))
    assert [node.stage.name for node in recipe.nodes].count("statistics/owl") == 1
    assert {node.inputs["measured"] for node in recipe.nodes if node.stage.use == "prune"} == {"base/owl"}
