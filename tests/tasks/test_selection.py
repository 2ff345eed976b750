"""Scores to masks: exact counts and the right choice, against brute force."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from coldpress.tasks.pruning.selection import apply_mask, keep_by_matrix, keep_by_pattern, keep_by_row, parse_pattern
from torch import Tensor

SPARSITIES = [0.001, 0.1, 0.25, 0.37, 0.5, 0.7, 0.999]


def _drop_lowest(scores: list[float], count: int) -> list[bool]:
    """Which of a list stay when the lowest go, the first of equal ones first."""
    order = sorted(range(len(scores)), key=lambda position: (scores[position], position))
    return [position not in order[:count] for position in range(len(scores))]


def _scores(rows: int, columns: int, ties: bool) -> Tensor:
    torch.manual_seed(columns)
    scores = torch.rand(rows, columns)
    return (scores * 4).round() if ties else scores


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("columns", [1, 7, 10, 64, 96])
@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_every_row_loses_exactly_the_floor_of_its_share_and_the_lowest_go(
    sparsity: float, columns: int, ties: bool
) -> None:
    scores = _scores(9, columns, ties)
    expected = [_drop_lowest(row, int(columns * sparsity)) for row in scores.tolist()]
    assert keep_by_row(scores, sparsity).tolist() == expected


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_a_matrix_loses_exactly_the_floor_of_its_share_wherever_the_lowest_are(sparsity: float, ties: bool) -> None:
    scores = _scores(9, 31, ties)
    expected = _drop_lowest(scores.flatten().tolist(), int(9 * 31 * sparsity))
    assert keep_by_matrix(scores, sparsity).flatten().tolist() == expected


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(("text", "kept", "group"), [("2:4", 2, 4), ("4:8", 4, 8), ("1:4", 1, 4), ("3:4", 3, 4)])
def test_a_pattern_keeps_the_highest_of_each_group_of_consecutive_inputs(
    text: str, kept: int, group: int, ties: bool
) -> None:
    scores = _scores(5, 24, ties)
    expected = [
        [stays for start in range(0, 24, group) for stays in _drop_lowest(row[start : start + group], group - kept)]
        for row in scores.tolist()
    ]
    assert keep_by_pattern(scores, parse_pattern(text)).tolist() == expected


def test_of_equal_scores_the_first_columns_go() -> None:
    assert keep_by_row(torch.ones(2, 5), 0.4).tolist() == [[False, False, True, True, True]] * 2


def test_a_share_below_one_weight_removes_nothing() -> None:
    assert bool(keep_by_row(torch.zeros(3, 9), 0.1).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_mask_makes_positive_zeros_and_leaves_the_rest_as_it_is(dtype: torch.dtype) -> None:
    weight = torch.tensor([[-1.5, 2.0, float("inf"), -0.0, float("-inf"), 3.0]], dtype=dtype)
    keep = torch.tensor([[False, True, True, True, False, False]])
    result = apply_mask(weight, keep)
    assert result.dtype == dtype
    assert str(result.tolist()) == "[[0.0, 2.0, inf, -0.0, 0.0, 0.0]]"


def test_no_other_choice_in_a_row_removes_less() -> None:
    torch.manual_seed(3)
    scores = torch.rand(6, 8)
    removed = (scores**2).masked_fill(keep_by_row(scores, 0.5), 0).sum(1)
    for row, cost in zip(scores.tolist(), removed.tolist(), strict=True):
        assert cost == pytest.approx(min(sum(score**2 for score in choice) for choice in combinations(row, 4)))


@pytest.mark.parametrize("text", ["4:2", "0:4", "4:4", "2/4", "2:", "half", "-2:4", "2:4 "])
def test_what_is_no_pattern_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ValueError, match="'2:4' keeps two in each four"):
        parse_pattern(text)
