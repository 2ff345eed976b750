"""The GPTQ solver against optimal brain quantization written out: no Cholesky factor, no blocks of columns, float64."""

from __future__ import annotations

from typing import Any, NamedTuple

import plain_methods
import pytest
import torch
from coldpress.tasks.gram import inverse_factor
from coldpress.tasks.quantization.gptq import solve
from coldpress.tasks.quantization.grid import Solution
from torch import Tensor

DEFAULTS: dict[str, Any] = {
    "bits": 4, "group_size": 32, "symmetric": False, "act_order": False, "static_groups": False, "damping": 0.01,
}  # fmt: skip


class Problem(NamedTuple):
    weight: Tensor
    gram: Tensor


def problem(rows: int = 12, columns: int = 64, seed: int = 0) -> Problem:
    """A layer whose inputs are correlated and of very different sizes."""
    draw = torch.Generator().manual_seed(seed)
    mixing = torch.eye(columns) + 0.15 * torch.randn(columns, columns, generator=draw)
    sizes = torch.rand(columns, generator=draw) * 2 + 0.2
    inputs = torch.randn(6 * columns, columns, generator=draw) @ mixing * sizes
    return Problem(torch.randn(rows, columns, generator=draw), inputs.T @ inputs)


def solved(given: Problem, keep: Tensor | None = None, **changes: Any) -> Solution:
    return solve(given.weight, given.gram, keep=keep, **{**DEFAULTS, **changes})


def dequantized(solution: Solution) -> Tensor:
    group = solution.group_index.long()
    return ((solution.codes.float() - solution.zeros.float()[group].T) * solution.scales[group].T).double()


def output_error(given: Problem, quantized: Tensor) -> float:
    """||(W - Q) X||^2 over all calibration tokens."""
    difference = given.weight.double() - quantized
    return ((difference @ given.gram.double()) * difference).sum().item()


def assert_same_as_plain(given: Problem, keep: Tensor | None = None, **changes: Any) -> None:
    settings = {**DEFAULTS, **changes}
    solution = solve(given.weight, given.gram, keep=keep, **settings)
    codes, scales, zeros = plain_methods.gptq(given.weight, given.gram, keep=keep, **settings)
    # One step of a stored float16 scale is 2^-10; a code on the border between two may fall either way.
    torch.testing.assert_close(solution.scales.double(), scales, rtol=1.1e-3, atol=0)
    assert (solution.zeros == zeros).double().mean() >= 0.99
    assert (solution.codes == codes).double().mean() >= 0.995


@pytest.mark.parametrize("static_groups", [False, True])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group_size", [-1, 16, 64])
def test_solution_is_that_of_optimal_brain_quantization(
    group_size: int, symmetric: bool, act_order: bool, static_groups: bool
) -> None:
    assert_same_as_plain(
        problem(), group_size=group_size, symmetric=symmetric, act_order=act_order, static_groups=static_groups
    )


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_solution_is_that_of_optimal_brain_quantization_at_every_width(bits: int) -> None:
    assert_same_as_plain(problem(), bits=bits)


@pytest.mark.parametrize(
    ("columns", "group_size", "act_order"),
    [(288, 96, False), (288, 96, True), (384, 192, False), (384, 192, True), (320, 160, False), (300, -1, False)],
)
def test_a_grid_is_fitted_to_up_to_date_weights_however_groups_and_blocks_of_columns_lie(
    columns: int, group_size: int, act_order: bool
) -> None:
    assert_same_as_plain(problem(rows=6, columns=columns), group_size=group_size, act_order=act_order)


@pytest.mark.parametrize("group_size", [16, 32, 48, 96])
def test_the_size_of_the_blocks_of_columns_does_not_matter(group_size: int) -> None:
    given = problem(columns=96)
    whole, pieces = (solved(given, group_size=group_size, column_block=block) for block in (128, 32))
    assert (whole.codes == pieces.codes).double().mean() >= 0.995
    torch.testing.assert_close(whole.scales, pieces.scales, rtol=1.1e-3, atol=0)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
def test_pruned_weights_stay_exactly_zero_and_the_rest_is_that_of_optimal_brain_quantization(
    symmetric: bool, act_order: bool
) -> None:
    given = problem()
    keep = torch.rand(given.weight.shape, generator=torch.Generator().manual_seed(1)) > 0.5
    pruned = Problem(given.weight * keep, given.gram)
    assert_same_as_plain(pruned, keep, symmetric=symmetric, act_order=act_order)
    assert bool((dequantized(solved(pruned, keep, symmetric=symmetric, act_order=act_order))[~keep] == 0).all())


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_error_is_below_that_of_plain_rounding(bits: int, symmetric: bool) -> None:
    given = problem(rows=32)
    rounded = plain_methods.round_to_nearest(given.weight, bits, 32, symmetric)
    solution = dequantized(solved(given, bits=bits, symmetric=symmetric))
    assert output_error(given, solution) < output_error(given, rounded)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_codes_and_zero_points_use_their_range_and_never_leave_it(bits: int) -> None:
    solution = solved(problem(rows=64), bits=bits)
    top = 2**bits - 1
    assert (int(solution.codes.min()), int(solution.codes.max())) == (0, top)
    assert 0 < int(solution.zeros.min()) <= int(solution.zeros.max()) < top


def test_symmetric_zero_points_stand_in_the_middle() -> None:
    assert bool((solved(problem(), symmetric=True).zeros == 8).all())


def test_uncorrelated_inputs_give_plain_rounding() -> None:
    given = problem()
    alone = Problem(given.weight, torch.eye(64) * 3)
    expected = plain_methods.round_to_nearest(given.weight, 4, 32, False)
    torch.testing.assert_close(dequantized(solved(alone)), expected, rtol=2e-3, atol=1e-6)


def test_weights_of_an_input_that_is_always_zero_become_zero() -> None:
    given = problem()
    gram = given.gram.clone()
    gram[[3, 40], :] = 0
    gram[:, [3, 40]] = 0
    dead = Problem(given.weight, gram)
    assert_same_as_plain(dead)
    assert bool((dequantized(solved(dead))[:, [3, 40]] == 0).all())


def test_a_row_of_zeros_stays_a_row_of_zeros() -> None:
    given = problem()
    given.weight[2] = 0
    assert bool((dequantized(solved(given))[2] == 0).all())


def test_without_act_order_groups_are_consecutive_inputs() -> None:
    expected = [column // 16 for column in range(64)]
    assert solved(problem(), group_size=16).group_index.tolist() == expected
    assert solved(problem(), group_size=16, act_order=True, static_groups=True).group_index.tolist() == expected


def test_with_act_order_the_inputs_with_the_largest_activations_share_the_first_group() -> None:
    given = problem()
    largest = set(given.gram.diagonal().argsort(descending=True)[:16].tolist())
    index = solved(given, group_size=16, act_order=True).group_index.tolist()
    assert {column for column, group in enumerate(index) if group == 0} == largest


def test_layers_that_share_inputs_are_solved_together_as_they_are_alone() -> None:
    given = problem(rows=12)
    together = solved(given)
    for rows in (slice(0, 5), slice(5, 12)):
        alone = solved(Problem(given.weight[rows], given.gram))
        assert (alone.codes == together.codes[rows]).double().mean() >= 0.995
        torch.testing.assert_close(alone.scales, together.scales[:, rows], rtol=1.1e-3, atol=0)


def test_neither_weight_nor_gram_matrix_nor_masks_are_changed() -> None:
    given = problem()
    keep = given.weight > 0
    solved(given, keep, act_order=True)
    assert torch.equal(given.weight, problem().weight)
    assert torch.equal(given.gram, problem().gram)
    assert torch.equal(keep, problem().weight > 0)


def test_inverse_factor_is_the_upper_cholesky_factor_of_the_damped_inverse() -> None:
    gram = problem().gram
    factor = inverse_factor(gram, 0.01).double()
    damped = gram.double() + 0.01 * gram.diagonal().double().mean() * torch.eye(64, dtype=torch.float64)
    assert torch.equal(factor, factor.triu())
    torch.testing.assert_close(factor.T @ factor, torch.linalg.inv(damped), rtol=1e-3, atol=1e-7)


def test_a_singular_gram_matrix_is_solved_with_more_damping() -> None:
    inputs = torch.randn(3, 64, generator=torch.Generator().manual_seed(2)) * 1e3
    solution = solved(Problem(problem().weight, inputs.T @ inputs), damping=1e-9)
    assert bool(dequantized(solution).isfinite().all())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_activations_that_are_no_numbers_are_reported(value: float) -> None:
    gram = problem().gram
    gram[5, 5] = value
    with pytest.raises(ValueError, match="not positive definite"):
        solved(Problem(problem().weight, gram))
