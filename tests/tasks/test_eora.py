"""The maths of low-rank compensation: what is left of the error, on made-up weights and inputs."""

from __future__ import annotations

import pytest
import torch
from coldpress.tasks.adaptation.eora import Factors, eigenspace, eora, svd
from coldpress.tasks.gram import Gram
from torch import Tensor

ROWS, COLUMNS, TOKENS = 12, 20, 300


def difference() -> Tensor:
    return torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def inputs(directions: int = COLUMNS) -> Tensor:
    """Correlated inputs [tokens, columns] of very different sizes, which span so many directions."""
    draw = torch.Generator().manual_seed(2)
    parts = torch.randn(TOKENS, directions, generator=draw, dtype=torch.float64)
    mixing = torch.randn(directions, COLUMNS, generator=draw, dtype=torch.float64)
    return (parts * torch.logspace(2, -2, directions, dtype=torch.float64)) @ mixing


def error(term: Factors, x: Tensor) -> float:
    """||(D - B A) X^T||^2."""
    return float(((difference() - term.b @ term.a) @ x.T).square().sum())


def compensated(x: Tensor, rank: int) -> Factors:
    return eora(difference(), eigenspace(x.T @ x), rank)


@pytest.mark.parametrize("rank", [1, 4, 11])
def test_what_is_left_are_the_singular_values_left_out(rank: int) -> None:
    x = inputs()
    outputs = torch.linalg.svdvals(difference() @ x.T)  # those of D P: both have the same Gram matrix D C D^T
    assert error(compensated(x, rank), x) == pytest.approx(float(outputs[rank:].square().sum()), rel=1e-6)


@pytest.mark.parametrize("rank", range(1, ROWS))
def test_eora_leaves_less_than_plain_svd_and_svd_less_of_the_weight(rank: int) -> None:
    x = inputs()
    with_inputs, plain = compensated(x, rank), svd(difference(), rank)
    assert error(with_inputs, x) < error(plain, x)
    identity = torch.eye(COLUMNS, dtype=torch.float64)
    assert error(plain, identity) < error(with_inputs, identity)
    left_out = torch.linalg.svdvals(difference())[rank:].square().sum()
    assert error(plain, identity) == pytest.approx(float(left_out), rel=1e-9)


def test_no_other_term_of_the_same_rank_leaves_less() -> None:
    x = inputs()
    term = compensated(x, 3)
    least = error(term, x)
    draw = torch.Generator().manual_seed(3)
    for size in (1e-1, 1e-2, 1e-3):
        for _ in range(20):
            moved = (part * (1 + size * torch.randn(part.shape, generator=draw, dtype=torch.float64)) for part in term)
            assert error(Factors(*moved), x) > least


def test_equally_large_independent_inputs_make_eora_plain_svd() -> None:
    term, plain = eora(difference(), eigenspace(5 * torch.eye(COLUMNS)), 4), svd(difference(), 4)
    torch.testing.assert_close(term.b @ term.a, plain.b @ plain.a)


def test_full_rank_is_exact() -> None:
    for term in (compensated(inputs(), ROWS), svd(difference(), ROWS)):
        torch.testing.assert_close(term.b @ term.a, difference(), rtol=0, atol=1e-9)


def test_the_factors_have_the_shapes_of_the_rank() -> None:
    term = compensated(inputs(), 5)
    assert (term.a.shape, term.b.shape) == ((5, COLUMNS), (ROWS, 5))


@pytest.mark.parametrize("directions", [0, 1, 7])
def test_a_singular_gram_matrix_is_compensated_where_inputs_are_and_nowhere_else(directions: int) -> None:
    x = inputs(directions)
    assert len(eigenspace(x.T @ x).values) == directions
    term = compensated(x, 9)
    assert all(bool(part.isfinite().all()) for part in term)
    before = float((difference() @ x.T).square().sum())
    assert error(term, x) <= 1e-18 * before
    nowhere = torch.linalg.svd(x)[2][directions:]  # directions without inputs
    torch.testing.assert_close(term.a @ nowhere.T, torch.zeros(9, COLUMNS - directions).double(), rtol=0, atol=1e-7)


def test_negative_eigenvalues_are_left_out() -> None:
    values = torch.tensor([4.0, 1.0, 0.0, -1e-20, -1e-16], dtype=torch.float64)
    space = eigenspace(torch.diag(values))
    assert space.values.tolist() == [1.0, 4.0]


def test_inputs_beside_an_outliers_are_compensated_too() -> None:
    x = torch.randn(TOKENS, COLUMNS, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    x[:, 0] *= 1e5  # as a few channels of language models; the rest would be rounding errors of a float32 sum
    gram = Gram.in_float64(COLUMNS)
    for window in x.split(50):
        gram.add(window)
    space = eigenspace(gram.matrix())
    assert space.values[-1] / space.values[-2] > COLUMNS / torch.finfo(torch.float32).eps / 10
    outputs = torch.linalg.svdvals(difference() @ x.T)
    left = error(eora(difference(), space, 4), x)
    assert left == pytest.approx(float(outputs[4:].square().sum()), rel=1e-6)
    assert left < 0.9 * float(outputs[1:].square().sum())


def test_activations_that_overflowed_are_an_error() -> None:
    with pytest.raises(ValueError, match="infinities or NaN"):
        eigenspace(torch.full((3, 3), torch.inf))
