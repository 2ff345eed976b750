"""SparseGPT and GPTQ in one pass: on matrices, and as a stage."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import plain_methods
import pytest
import torch
from coldpress.storage.artifacts import Artifact, ArtifactReader
from coldpress.storage.store import Store
from coldpress.tasks.catalogue import stage_named
from coldpress.tasks.pruning import sparsegpt
from coldpress.tasks.pruning.selection import Pattern, keep_by_row
from coldpress.tasks.quantization import gptq
from coldpress.tasks.stage import ModelFacts
from torch import Tensor

ROWS, COLUMNS = 48, 320  # two blocks of 128 columns and a half
GPTQ: dict[str, Any] = {"symmetric": True, "act_order": False, "static_groups": False, "damping": 0.01}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def some_gram(seed: int = 0, columns: int = COLUMNS) -> Tensor:
    mixing = normal(columns, columns, seed=seed + 2) / math.sqrt(columns) + torch.eye(columns)
    inputs = normal(3 * columns, columns, seed=seed + 1) @ mixing * normal(columns, seed=seed + 3).mul(0.5).exp()
    return inputs.T @ inputs


def loss(weight: Tensor, dense: Tensor, gram: Tensor) -> float:
    """||(W - W') X||^2 / ||W X||^2."""
    change = (weight - dense).double()
    return float(((change @ gram.double()) * change).sum() / ((dense.double() @ gram.double()) * dense).sum())


def dequantized(solution: gptq.Solution) -> Tensor:
    group = solution.group_index.long()
    return (solution.codes.float() - solution.zeros.float()[group].T) * solution.scales[group].T


def joint(
    weight: Tensor,
    gram: Tensor,
    *,
    sparsity: float = 0.5,
    pattern: Pattern | None = None,
    before: Tensor | None = None,
    **changes: Any,
) -> tuple[Tensor, Tensor]:
    """The weights that the one pass ends with, and its mask, True where kept."""
    selection = sparsegpt.Selection([weight], sparsity=sparsity, pattern=pattern, masks=[before])
    settings = {**GPTQ, "bits": 4, "group_size": 64, **changes}
    solution = gptq.solve(weight, gram, selection=selection, **settings)
    return dequantized(solution), selection.masks()[0]


def one_after_the_other(
    weight: Tensor, gram: Tensor, bits: int, group_size: int, pattern: Pattern | None
) -> tuple[Tensor, Tensor]:
    """SparseGPT's weights, and those after GPTQ."""
    ((pruned, keep),) = sparsegpt.solve([weight], gram, sparsity=0.5, pattern=pattern)
    return pruned, dequantized(gptq.solve(pruned, gram, bits=bits, group_size=group_size, keep=keep, **GPTQ))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("columns", "group_size", "kept_of"), [(192, 32, None), (192, -1, None), (192, 48, (2, 4))])
def test_the_pass_is_that_of_the_plain_algorithm(
    columns: int, group_size: int, kept_of: tuple[int, int] | None, symmetric: bool
) -> None:
    weight, gram = normal(16, columns), some_gram(columns=columns)
    pattern = None if kept_of is None else Pattern(*kept_of)
    ours, keep = joint(weight, gram, pattern=pattern, group_size=group_size, symmetric=symmetric)
    block = {32: 128, -1: 96, 48: 96}[group_size]
    plain, mask = plain_methods.sparsegpt(weight, gram, 0.5, kept_of, block, (4, group_size, symmetric))
    assert (keep == mask).float().mean() > 0.99  # in float32 a code on the border of two may fall either way
    assert loss(ours, weight, gram) == pytest.approx(loss(plain.float(), weight, gram), rel=0.02)
    assert torch.isclose(ours, plain.float(), rtol=2e-3, atol=1e-6).float().mean() > 0.95


@pytest.mark.parametrize("pattern", [None, Pattern(2, 4), Pattern(3, 5)])
def test_with_eight_bits_it_loses_as_little_as_sparsegpt_alone(pattern: Pattern | None) -> None:
    weight, gram = normal(ROWS, COLUMNS), some_gram()
    ours, keep = joint(weight, gram, pattern=pattern, bits=8)
    ((pruned, mask),) = sparsegpt.solve([weight], gram, sparsity=0.5, pattern=pattern)
    assert loss(ours, weight, gram) == pytest.approx(loss(pruned, weight, gram), rel=0.02)
    assert (keep == mask).float().mean() > 0.95


@pytest.mark.parametrize("pattern", [None, Pattern(2, 4)])
@pytest.mark.parametrize("group_size", [64, -1])
@pytest.mark.parametrize("bits", [2, 4])
def test_one_pass_loses_less_than_one_after_the_other_on_most_layers(
    bits: int, group_size: int, pattern: Pattern | None
) -> None:
    ratios = []
    for seed in range(0, 60, 10):
        weight, gram = normal(ROWS, COLUMNS, seed=seed + 100), some_gram(seed)
        ours, _ = joint(weight, gram, bits=bits, group_size=group_size, pattern=pattern)
        pruned, both = one_after_the_other(weight, gram, bits, group_size, pattern)
        assert loss(ours, weight, gram) > loss(pruned, weight, gram)
        ratios.append(loss(ours, weight, gram) / loss(both, weight, gram))
    assert sum(ratio < 1 for ratio in ratios) >= 5
    assert max(ratios) < 1.05


@pytest.mark.parametrize("sparsity", [0.01, 0.37, 0.5, 0.99])
@pytest.mark.parametrize("group_size", [32, 160, -1])
def test_exactly_the_asked_number_of_weights_goes_to_exact_zero(sparsity: float, group_size: int) -> None:
    ours, keep = joint(normal(ROWS, COLUMNS), some_gram(), sparsity=sparsity, group_size=group_size, symmetric=False)
    assert int((~keep).sum()) == int(sparsity * ROWS * COLUMNS)
    assert not bool(ours[~keep].any())


@pytest.mark.parametrize("group_size", [32, 64, -1])
@pytest.mark.parametrize("pattern", [Pattern(2, 4), Pattern(3, 5), Pattern(32, 64)])
def test_every_group_of_a_pattern_keeps_what_it_says_however_it_lies_to_the_scales(
    pattern: Pattern, group_size: int
) -> None:
    weight, gram = normal(16, COLUMNS), some_gram()
    ours, keep = joint(weight, gram, pattern=pattern, group_size=group_size)
    assert bool((keep.reshape(-1, pattern.group).sum(1) == pattern.kept).all())
    assert not bool(ours[~keep].any())
    _, both = one_after_the_other(weight, gram, 4, group_size, pattern)
    assert loss(ours, weight, gram) < 1.02 * loss(both, weight, gram)


def test_what_was_pruned_before_stays_pruned_and_counts() -> None:
    weight, gram = normal(ROWS, COLUMNS), some_gram()
    before = keep_by_row(weight.abs(), 0.3)
    ours, keep = joint(weight * before, gram, before=before)
    assert not bool((keep & ~before).any())
    assert not bool(ours[~keep].any())
    assert int((~keep).sum()) == int(0.5 * weight.numel())


# The stage


@pytest.fixture
def run_joint(run_stage: Callable[..., Artifact], make_tokens: Callable[..., Artifact]) -> Callable[..., Artifact]:
    """`run_joint(model, **parameters)`: in groups of 32 unless told."""

    def run(model: Artifact, **parameters: Any) -> Artifact:
        inputs = {"model": model, "calibration": make_tokens(model)}
        return run_stage("quantize/sparsegpt-gptq", inputs, **{"group_size": 32, **parameters})

    return run


@pytest.mark.parametrize(
    "parameters",
    [
        {"sparsity": 0.5}, {"pattern": "2:4", "symmetric": False}, {"sparsity": 0.4, "bits": 8, "group_size": -1},
        {"sparsity": 0.5, "allocation": [0.3, 0.5, 0.7]}, {"sparsity": 0.6, "allocation": "owl"},
    ],
    ids=str,
)  # fmt: skip
def test_masks_are_of_the_asked_share_and_the_stored_weights_are_zero_there(
    parameters: dict[str, Any],
    store: Store,
    import_model: Callable[..., Artifact],
    run_joint: Callable[..., Artifact],
    dense_weights: Callable[..., dict[str, Tensor]],
) -> None:
    model = run_joint(import_model("llama"), **parameters)
    weights = {f"{layer}.weight": weight for layer, weight in dense_weights(model).items()}
    shapes = {name: (weight.shape[0], weight.shape[1]) for name, weight in weights.items()}
    with ArtifactReader(store, model) as reader:
        masks = reader.masks(shapes)
        assert reader.manifest.format == "gptq"
    assert masks.keys() == weights.keys()
    assert not any(bool(weights[name][~mask].any()) for name, mask in masks.items())
    share = sum(int((~mask).sum()) for mask in masks.values()) / sum(mask.numel() for mask in masks.values())
    assert share == pytest.approx(parameters.get("sparsity", 0.5), abs=2e-4)
    if isinstance(parameters.get("allocation"), list):
        last = masks["model.layers.2.mlp.up_proj.weight"]
        assert int((~last).sum()) == int(0.7 * last.numel())


def test_each_block_sees_what_the_blocks_before_it_were_stored_as(
    import_model: Callable[..., Artifact],
    whole_model: Callable[..., Any],
    make_tokens: Callable[..., Artifact],
    windows: Callable[[Artifact], Tensor],
    run_joint: Callable[..., Artifact],
    dense_weights: Callable[..., dict[str, Tensor]],
) -> None:
    base = import_model("llama")
    stored = dense_weights(run_joint(base, sparsity=0.5))
    model = whole_model("llama")
    for inputs in plain_methods.progressively(model, "model.layers", windows(make_tokens(base))):
        for name, windows_of_inputs in inputs.items():
            tokens = torch.cat(windows_of_inputs)
            weight = model.get_parameter(name)
            expected, _ = joint(weight, tokens.T @ tokens, group_size=32)
            found = stored[name.removesuffix(".weight")]
            assert torch.isclose(found, expected, atol=1e-6).float().mean() > 0.97, name
            weight.copy_(found)


@pytest.mark.parametrize(
    ("parameters", "sentence"),
    [
        ({"pattern": "3:5", "group_size": 32}, "needs rows that 5 divides"),
        ({"sparsity": 0.5, "group_size": 48}, "group_size 48 does not divide the 64 inputs"),
        ({"sparsity": 0.5, "group_size": 32, "allocation": [0.5, 0.5]}, "2 shares, but the model has 3 blocks"),
    ],
)
def test_what_neither_can_do_is_known_before_anything_runs(
    parameters: dict[str, Any], sentence: str, whole_model: Callable[..., Any]
) -> None:
    entry = stage_named("quantize/sparsegpt-gptq")
    facts = ModelFacts(whole_model("llama").config.to_dict())
    assert any(sentence in error for error in entry.check(entry.parameters(**parameters), facts))
    after = entry.after(entry.parameters(sparsity=0.5), facts)
    assert (after.format, after.masked) == ("gptq", True)
