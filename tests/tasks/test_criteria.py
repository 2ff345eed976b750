"""Pruning criteria and the statistics they take, against the formulas written out."""

from __future__ import annotations

import torch
from coldpress.tasks.gram import Gram
from coldpress.tasks.pruning.criteria import InputNorm, magnitude_score, wanda_cumulative_score, wanda_score
from coldpress.tasks.pruning.selection import keep_by_matrix, keep_by_row


def _inputs(windows: int = 3, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    torch.manual_seed(1)
    return [torch.randn(5 + window, 8).to(dtype) for window in range(windows)]


def test_magnitude_is_the_absolute_value_in_float32() -> None:
    weight = torch.tensor([[1.5, -2.0], [0.0, -0.25]], dtype=torch.bfloat16)
    score = magnitude_score(weight)
    assert score.dtype == torch.float32
    assert score.tolist() == [[1.5, 2.0], [0.0, 0.25]]


def test_wanda_multiplies_each_column_by_its_input_norm() -> None:
    score = wanda_score(torch.tensor([[1.0, -2.0, 3.0], [-4.0, 0.5, 0.0]]), torch.tensor([10.0, 1.0, 0.5]))
    assert score.tolist() == [[10.0, 2.0, 1.5], [40.0, 0.5, 0.0]]


def test_wanda_with_equal_norms_chooses_what_magnitude_chooses_in_each_row() -> None:
    torch.manual_seed(2)
    weight = torch.randn(16, 40)
    by_wanda = keep_by_row(wanda_score(weight, torch.full((40,), 3.0)), 0.5)
    assert torch.equal(by_wanda, keep_by_row(magnitude_score(weight), 0.5))


def test_the_cumulative_variant_by_hand() -> None:
    score = wanda_cumulative_score(torch.tensor([[1.0, 5.0, -2.0], [0.0, 3.0, 1.0]]), torch.tensor([1.0, 1.0, 2.0]))
    assert torch.equal(score, torch.tensor([[0.1, 1.0, 0.5], [0.0, 1.0, 0.4]]))


def test_the_cumulative_variant_removes_what_bisection_of_its_threshold_does() -> None:
    torch.manual_seed(5)
    weight, norm = torch.randn(64, 200) * torch.rand(64, 1), torch.rand(200) + 0.1
    scores = wanda_score(weight, norm)
    ordered = scores.sort(dim=1).values
    low, high, alpha = 0.0, 0.8, 0.4
    while True:
        below = ordered.cumsum(1) <= scores.sum(1, keepdim=True) * alpha
        thresholds = ordered.gather(1, below.sum(1, keepdim=True) - 1)
        removed = scores <= thresholds
        share = float(removed.float().mean())
        if abs(share - 0.5) <= 1e-3 or high - low < 1e-3:
            break
        low, high = (low, alpha) if share > 0.5 else (alpha, high)
        alpha = (low + high) / 2
    keep = keep_by_matrix(wanda_cumulative_score(weight, norm), 0.5)
    assert int(keep.sum()) == 6400
    assert float((keep == ~removed).float().mean()) > 0.998


def test_input_norm_is_the_norm_over_the_tokens_of_all_windows() -> None:
    statistic = InputNorm(8)
    for window in _inputs():
        statistic.add(window)
    expected = torch.cat(_inputs()).double().pow(2).sum(0).sqrt()
    torch.testing.assert_close(statistic.norm().double(), expected, rtol=1e-6, atol=0)


def test_input_norm_of_half_precision_inputs_is_summed_in_float32() -> None:
    statistic = InputNorm(2)
    for _ in range(50):
        statistic.add(torch.ones(1000, 2, dtype=torch.bfloat16))
    torch.testing.assert_close(statistic.norm(), torch.full((2,), 50_000.0).sqrt())


def test_input_norm_leaves_its_inputs_alone() -> None:
    window = _inputs()[0]
    InputNorm(8).add(window)
    assert torch.equal(window, _inputs()[0])


def test_gram_is_the_sum_of_outer_products_over_the_tokens_of_all_windows() -> None:
    statistic = Gram(8)
    expected = torch.zeros(8, 8, dtype=torch.float64)
    for window in _inputs():
        statistic.add(window)
        for token in window.double():
            expected += torch.outer(token, token)
    torch.testing.assert_close(statistic.matrix().double(), expected, rtol=1e-5, atol=1e-5)


def test_gram_of_half_precision_inputs_is_summed_in_float32() -> None:
    statistic = Gram(2)
    for _ in range(50):
        statistic.add(torch.ones(1000, 2, dtype=torch.bfloat16))
    assert statistic.matrix().tolist() == [[50_000.0] * 2] * 2


def test_input_norms_are_the_roots_of_the_gram_diagonal() -> None:
    norm, gram = InputNorm(8), Gram(8)
    for window in _inputs(dtype=torch.bfloat16):
        norm.add(window)
        gram.add(window)
    torch.testing.assert_close(norm.norm() ** 2, gram.matrix().diagonal())
