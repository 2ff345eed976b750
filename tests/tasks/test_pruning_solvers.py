"""SparseGPT and ALPS on matrices: the plain algorithm's results, exact counts, lower errors, what must not change."""

from __future__ import annotations

import math

import plain_methods
import pytest
import torch
from coldpress.tasks.pruning import alps, sparsegpt
from coldpress.tasks.pruning.criteria import magnitude_score, wanda_score
from coldpress.tasks.pruning.selection import Pattern, keep_by_matrix, keep_by_pattern, keep_by_row
from torch import Tensor

ROWS, COLUMNS = 48, 320  # two blocks of 128 columns and a half
PATTERNS = [Pattern(2, 4), Pattern(1, 4), Pattern(4, 8), Pattern(2, 8), Pattern(3, 5)]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def correlated_gram(columns: int = COLUMNS, tokens: int = 900) -> Tensor:
    mixing = normal(columns, columns, seed=2) / math.sqrt(columns) + torch.eye(columns)
    inputs = normal(tokens, columns, seed=1) @ mixing * normal(columns, seed=3).mul(0.5).exp()
    return inputs.T @ inputs


def loss(weight: Tensor, dense: Tensor, gram: Tensor) -> float:
    """||(W - W') X||^2 / ||W X||^2."""
    change = (weight - dense).double()
    return float(((change @ gram.double()) * change).sum() / ((dense.double() @ gram.double()) * dense).sum())


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.77])
def test_sparsegpt_is_the_plain_algorithm(sparsity: float) -> None:
    weight, gram = normal(ROWS, COLUMNS), correlated_gram()
    ((ours, keep),) = sparsegpt.solve([weight], gram, sparsity=sparsity)
    plain, mask = plain_methods.sparsegpt(weight, gram, sparsity)
    assert (keep == mask).float().mean() > 0.999  # float32 and float64 may order near-ties differently
    assert torch.equal(ours != 0, keep)
    assert loss(ours, weight, gram) == pytest.approx(loss(plain, weight, gram), rel=1e-3)
    same = (keep == mask).all(1)
    assert same.float().mean() > 0.8
    assert torch.allclose(ours[same], plain[same].float(), atol=1e-4)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_sparsegpt_with_a_pattern_is_the_plain_algorithm(pattern: Pattern) -> None:
    weight, gram = normal(ROWS, COLUMNS), correlated_gram()
    ((ours, keep),) = sparsegpt.solve([weight], gram, sparsity=0.0, pattern=pattern)
    plain, mask = plain_methods.sparsegpt(weight, gram, 0.0, (pattern.kept, pattern.group))
    assert bool((keep.reshape(-1, pattern.group).sum(1) == pattern.kept).all())
    assert (keep == mask).float().mean() > 0.999
    assert loss(ours, weight, gram) == pytest.approx(loss(plain, weight, gram), rel=1e-3)


@pytest.mark.parametrize("sparsity", [0.01, 0.37, 0.5, 0.99])
def test_exactly_the_asked_number_of_weights_goes(sparsity: float) -> None:
    weight, gram = normal(ROWS, COLUMNS), correlated_gram()
    for _, keep in (
        *sparsegpt.solve([weight], gram, sparsity=sparsity),
        *alps.solve([weight], gram, sparsity=sparsity),
    ):
        assert int((~keep).sum()) == int(sparsity * weight.numel())


def test_layers_solved_together_are_as_solved_alone() -> None:
    gram = correlated_gram()
    weights = [normal(rows, COLUMNS, seed=rows) for rows in (16, 40, 8)]
    together = sparsegpt.solve(weights, gram, sparsity=0.5)
    for weight, (ours, keep) in zip(weights, together, strict=True):
        ((alone, keep_alone),) = sparsegpt.solve([weight], gram, sparsity=0.5)
        assert torch.equal(keep, keep_alone)
        assert torch.allclose(ours, alone, atol=1e-5)


@pytest.mark.parametrize("pattern", [None, Pattern(2, 4)])
def test_each_method_loses_less_than_the_simpler_one(pattern: Pattern | None) -> None:
    weight, gram = normal(ROWS, COLUMNS), correlated_gram()
    norm = gram.diagonal().sqrt()
    ((spared, _),) = sparsegpt.solve([weight], gram, sparsity=0.5, pattern=pattern)
    ((repaired, _),) = alps.solve([weight], gram, sparsity=0.5, pattern=pattern)
    if pattern is None:
        wanda = weight * keep_by_row(wanda_score(weight, norm), 0.5)
        magnitude = weight * keep_by_matrix(magnitude_score(weight), 0.5)
    else:
        wanda = weight * keep_by_pattern(wanda_score(weight, norm), pattern)
        magnitude = weight * keep_by_pattern(magnitude_score(weight), pattern)
    losses = [loss(result, weight, gram) for result in (repaired, spared, wanda, magnitude)]
    assert losses == sorted(losses)
    assert losses[0] < 0.95 * losses[1] < 0.95 * losses[2]


def test_uncorrelated_inputs_of_one_size_make_it_magnitude_without_repair() -> None:
    weight = normal(ROWS, 128)
    ((ours, keep),) = sparsegpt.solve([weight], torch.eye(128) * 7, sparsity=0.5)
    assert torch.equal(keep, keep_by_matrix(weight.abs(), 0.5))
    assert torch.allclose(ours, weight * keep, atol=1e-6)
    ((repaired, _),) = alps.solve([weight], torch.eye(128) * 7, sparsity=0.5)
    best = loss(weight * keep, weight, torch.eye(128))
    assert best <= loss(repaired, weight, torch.eye(128)) < 1.05 * best  # ADMM moves among near-ties


@pytest.mark.parametrize("pattern", [None, Pattern(2, 4)])
def test_what_was_pruned_before_stays_pruned_and_counts(pattern: Pattern | None) -> None:
    weight, gram = normal(ROWS, COLUMNS), correlated_gram()
    before = keep_by_row(weight.abs(), 0.3)
    weight = weight * before
    results = [
        sparsegpt.solve([weight], gram, sparsity=0.5, pattern=pattern, masks=[before])[0],
        alps.solve([weight], gram, sparsity=0.5, pattern=pattern, masks=[before])[0],
    ]
    for ours, keep in results:
        assert not bool((keep & ~before).any())
        assert not bool(ours[~keep].any())
        removed = int((~keep).sum())
        assert removed == int(0.5 * weight.numel()) if pattern is None else removed >= int(0.5 * weight.numel())


def test_inputs_that_are_always_zero_are_pruned_away() -> None:
    weight, gram = normal(ROWS, COLUMNS), correlated_gram()
    gram[5] = gram[:, 5] = 0
    ((ours, _),) = sparsegpt.solve([weight], gram, sparsity=0.5)
    assert not bool(ours[:, 5].any())
    assert bool(ours.isfinite().all())
    ((repaired, _),) = alps.solve([weight], gram, sparsity=0.5)
    assert bool(repaired.isfinite().all())


def test_alps_ends_near_the_optimum_of_its_support() -> None:
    weight, gram = normal(8, 64), correlated_gram(64, 400)
    damped = gram + 0.01 * gram.diagonal().mean() * torch.eye(64)
    ((ours, keep),) = alps.solve([weight], gram, sparsity=0.5)
    for row, support in enumerate(keep):
        exact = torch.linalg.solve(damped[support][:, support], damped[support] @ weight[row])
        assert torch.allclose(ours[row, support], exact, atol=2e-2 * float(exact.abs().max()))


def test_a_gram_matrix_with_infinity_is_refused() -> None:
    gram = correlated_gram()
    gram[3, 3] = math.inf
    with pytest.raises(ValueError, match="NaN or infinity"):
        alps.solve([normal(ROWS, COLUMNS)], gram, sparsity=0.5)
    with pytest.raises(ValueError, match="not positive definite"):
        sparsegpt.solve([normal(ROWS, COLUMNS)], gram, sparsity=0.5)
