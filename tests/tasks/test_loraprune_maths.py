"""LoRAPrune's maths: importance from the gradients of LoRA's factors, which parts go and when."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from coldpress.tasks.adaptation.loraprune import (
    Parts,
    drop_least,
    part_scores,
    sensitivity,
    share_of_removal,
    weight_gradient,
)
from coldpress.tasks.architectures import family_of, widths
from torch import Tensor


def toy_loss(weight: Tensor) -> Tensor:
    """Of a layer with four inputs and three outputs, on fixed inputs and targets."""
    generator = torch.Generator().manual_seed(5)
    inputs, targets = (torch.randn(20, size, generator=generator, dtype=torch.float64) for size in (4, 3))
    return (torch.tanh(inputs @ weight.T) - targets).square().sum()


def test_with_a_square_factor_the_estimate_is_the_gradient_by_finite_differences() -> None:
    """Where A is orthogonal and B zero, as training begins, nothing is lost by looking through A."""
    torch.manual_seed(0)
    weight, scale = torch.randn(3, 4, dtype=torch.float64), 2.0
    a = (torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64)).Q / scale).requires_grad_()
    b = torch.zeros(3, 4, dtype=torch.float64, requires_grad=True)
    toy_loss(weight + scale * b @ a).backward()
    assert a.grad is not None
    assert b.grad is not None
    found = weight_gradient(a.detach(), b.detach(), a.grad, b.grad, scale)
    for row in range(3):
        for column in range(4):
            step = torch.zeros_like(weight)
            step[row, column] = 1e-6
            difference = (toy_loss(weight + step) - toy_loss(weight - step)) / 2e-6
            assert float(found[row, column]) == pytest.approx(float(difference), rel=1e-5)


def test_the_estimate_is_what_a_step_on_the_factors_takes_away_and_lowers_the_loss() -> None:
    torch.manual_seed(1)
    weight, scale = torch.randn(3, 4, dtype=torch.float64), 2.0
    a = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    b = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    toy_loss(weight + scale * b @ a).backward()
    assert a.grad is not None
    assert b.grad is not None
    with torch.no_grad():
        found = weight_gradient(a, b, a.grad, b.grad, scale)
        taken = scale * (b @ a - (b - b.grad) @ (a - a.grad))
        torch.testing.assert_close(found, taken)
        torch.testing.assert_close(
            sensitivity(weight, a, b, a.grad, b.grad, scale),
            (found * (weight + scale * b @ a)).abs(),
        )
        # Small gradients, so that the product of both does not matter: a direction in which the loss falls.
        found = weight_gradient(a, b, a.grad * 1e-4, b.grad * 1e-4, scale)
        assert float(toy_loss(weight + scale * b @ a - 1e-3 * found)) < float(toy_loss(weight + scale * b @ a))


@pytest.mark.parametrize("key_value_heads", [4, 2])
def test_scores_are_sums_over_the_weights_that_go_together(key_value_heads: int) -> None:
    config = {"model_type": "llama", "hidden_size": 12, "intermediate_size": 5, "num_hidden_layers": 1,
              "num_attention_heads": 4, "num_key_value_heads": key_value_heads, "head_dim": 3}  # fmt: skip
    wide, family = widths(config), family_of(config)
    sharing = 4 // key_value_heads
    shapes = family.linear_weights(config)
    torch.manual_seed(0)
    for linear in family.linears:
        values = torch.rand(shapes[f"{linear.name}.weight"])
        (found,) = part_scores(linear, values, wide).items()
        name = linear.name.rpartition(".")[2]
        lines = values.T if name in ("o_proj", "down_proj") else values
        if name in ("gate_proj", "up_proj", "down_proj"):
            sums = [sum(map(float, lines[channel])) for channel in range(5)]
        else:
            heads = {"k_proj": 1, "v_proj": 1}.get(name, sharing)  # of this layer, in a group
            sums = [0.0] * key_value_heads
            for feature, line in enumerate(lines):
                sums[feature // 3 // heads] += float(line.sum())
        length = sum(value**2 for value in sums) ** 0.5
        assert found[0] == ("group" if "self_attn" in linear.name else "channel")
        assert found[1].tolist() == pytest.approx([value / length for value in sums], rel=1e-5)


def test_a_layer_that_nothing_depends_on_scores_zero() -> None:
    config = {"model_type": "llama", "hidden_size": 4, "intermediate_size": 3, "num_attention_heads": 2}
    linear = family_of(config).linears[-1]
    assert part_scores(linear, torch.zeros(4, 3), widths(config))["channel"].tolist() == [0, 0, 0]


def test_the_average_takes_a_tenth_of_what_is_new_and_nothing_that_is_not_finite() -> None:
    wide = widths({"model_type": "llama", "hidden_size": 4, "intermediate_size": 3, "num_attention_heads": 2})
    parts = Parts.whole(2, wide, "cpu")
    parts.average(1, {"group": torch.tensor([1.0, 3.0]), "channel": torch.tensor([1.0, torch.nan, 2.0])})
    parts.average(1, {"group": torch.tensor([2.0, torch.inf]), "channel": torch.tensor([10.0, 0.0, 20.0])})
    parts.average(1, {"group": torch.tensor([10.0, 0.0])})
    assert parts.importance["group"].tolist() == [[0, 0], pytest.approx([0.09 + 1, 0.27])]
    assert parts.importance["channel"].tolist() == [[0, 0, 0], pytest.approx([1, 0, 2])]


def test_the_least_important_go_and_none_comes_back() -> None:
    kept = torch.tensor([True, True, False, True, True])
    drop_least(kept, torch.tensor([0.0, 5.0, 9.0, 1.0, 0.0]), 2)
    assert kept.tolist() == [False, True, False, True, True]
    drop_least(kept, torch.tensor([9.0, 5.0, 9.0, 1.0, 7.0]), 3)
    assert kept.tolist() == [False, True, False, False, True]
    drop_least(kept, torch.tensor([9.0, 5.0, 9.0, 1.0, 7.0]), 1)
    assert kept.tolist() == [False, True, False, False, True]


def test_the_schedule_is_cubic_between_a_tenth_and_nine_tenths_and_ends_exactly() -> None:
    shares = {updates: share_of_removal(updates, 100, 10, 0.9) for updates in range(1, 101)}
    pruned = {updates: share for updates, share in shares.items() if share is not None}
    assert list(pruned) == [20, 30, 40, 50, 60, 70, 80, 90]
    assert pruned[90] == 1.0
    assert pruned[50] == pytest.approx(1 - 0.5**3)
    assert pruned[20] == pytest.approx(1 - 0.875**3)
    assert sorted(pruned.values()) == list(pruned.values())


def test_it_can_be_over_earlier() -> None:
    shares = {updates: share_of_removal(updates, 100, 10, 0.5) for updates in range(1, 101)}
    assert {updates: share for updates, share in shares.items() if share is not None} == {
        20: pytest.approx(1 - 0.75**3), 30: pytest.approx(1 - 0.5**3), 40: pytest.approx(1 - 0.25**3), 50: 1.0
    }  # fmt: skip


@pytest.mark.parametrize("until", [0.11, 0.5, 0.9, 1.0])
@pytest.mark.parametrize(("steps", "every"), [(1, 10), (3, 1), (7, 10), (10, 1), (60, 7), (123, 50)])
def test_whatever_the_number_of_steps_the_last_pruning_is_whole_and_no_earlier_one(
    steps: int, every: int, until: float
) -> None:
    shares = [share_of_removal(updates, steps, every, until) for updates in range(1, steps + 1)]
    pruned = [share for share in shares if share is not None]
    assert pruned[-1] == 1.0
    assert all(0 < share < 1 for share in pruned[:-1])
    assert shares.index(1.0) + 1 == math.ceil(Fraction(str(until)) * steps)
