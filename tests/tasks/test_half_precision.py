"""Linear layers in half precision without the processor's help: made of float32's, rounded once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from coldpress.storage.artifacts import Artifact
from coldpress.tasks import half_precision
from coldpress.tasks.adaptation.layers import Frozen, Lora, MaskedLora
from coldpress.tasks.half_precision import lacks_instructions, linear, use_fast_linears
from coldpress.tasks.skeleton import Skeleton
from torch import Tensor, nn

HALVES = (torch.bfloat16, torch.float16)


@pytest.fixture
def without_instructions(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """As on a CPU that lacks them. Returns the shapes of all inputs that were computed in float32."""
    seen = []
    product = half_precision._product

    def see(inputs: Tensor, *arguments: Tensor | None) -> Tensor:
        seen.append(inputs.shape)
        return product(inputs, *arguments)

    monkeypatch.setattr(half_precision, "lacks_instructions", lambda dtype: dtype in HALVES)
    monkeypatch.setattr(half_precision, "_product", see)
    return seen


def some(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def is_rounded_once(found: Tensor, exact: Tensor) -> bool:
    """Within half a unit in the last place, and the little that sums in float32 are off near a tie."""
    size = exact.abs().clamp(min=torch.finfo(found.dtype).tiny).log2().floor().exp2()
    return bool(((found.double() - exact).abs() <= size * torch.finfo(found.dtype).eps * 0.502 + 1e-5).all())


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("added", [None, (24,), (3, 10, 24)])
@pytest.mark.parametrize("elements", [1, 500, 1 << 20])  # a row of the weight at a time, seven of them, all
def test_the_product_is_rounded_once(
    dtype: torch.dtype,
    added: tuple[int, ...] | None,
    elements: int,
    without_instructions: list[torch.Size],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(half_precision, "_ELEMENTS_AT_ONCE", elements)
    inputs, weight = some(3, 10, 64, dtype=dtype), some(24, 64, dtype=dtype, seed=1)
    term = None if added is None else some(*added, dtype=dtype, seed=2)
    exact = inputs.double() @ weight.double().T + (0 if term is None else term.double())
    result = linear(inputs, weight, term)
    assert result.dtype == dtype
    assert is_rounded_once(result, exact)
    assert without_instructions == [inputs.shape]


@pytest.mark.parametrize("elements", [1, 500, 1 << 20])  # a column of the weight at a time, twenty, all
def test_so_it_is_with_a_transposed_weight(
    elements: int, without_instructions: list[torch.Size], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(half_precision, "_ELEMENTS_AT_ONCE", elements)
    upstream, head, term = some(10, 200), some(200, 24, seed=1), some(24, seed=2)
    for added in (None, term):
        exact = upstream.double() @ head.double() + (0 if added is None else added.double())
        assert is_rounded_once(linear(upstream, head.T, added), exact)
    assert len(without_instructions) == 2


def test_layers_without_inputs_or_outputs_give_what_torchs_give(without_instructions: list[torch.Size]) -> None:
    for outs, ins in ((24, 0), (0, 64)):
        inputs, weight = some(2, 10, ins), some(outs, ins)
        assert torch.equal(linear(inputs, weight), nn.functional.linear(inputs, weight))
    assert len(without_instructions) == 2


@pytest.mark.parametrize("added", [(24,), (3, 10, 24)])
def test_gradients_are_those_of_float64(added: tuple[int, ...], without_instructions: list[torch.Size]) -> None:
    given = [some(3, 10, 64), some(24, 64, seed=1), some(*added, seed=2)]
    upstream = some(3, 10, 24, seed=3)
    halves = [tensor.clone().requires_grad_() for tensor in given]
    doubles = [tensor.double().requires_grad_() for tensor in given]
    found = torch.autograd.grad(linear(*halves), halves, upstream)
    exact = torch.autograd.grad(doubles[0] @ doubles[1].T + doubles[2], doubles, upstream.double())
    for mine, wanted in zip(found[:2], exact[:2], strict=True):
        assert mine.dtype == torch.bfloat16
        assert is_rounded_once(mine, wanted)
    torch.testing.assert_close(found[2].double(), exact[2], rtol=0.01, atol=0.01)
    assert len(without_instructions) == 3


def test_only_many_rows_in_half_precision_are_computed_so(without_instructions: list[torch.Size]) -> None:
    linear(some(7, 64), some(24, 64))
    linear(some(100, 64, dtype=torch.float32), some(24, 64, dtype=torch.float32))
    assert without_instructions == []
    linear(some(2, 4, 64), some(24, 64))
    assert without_instructions == [(2, 4, 64)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_cpu_multiplies_these(dtype: torch.dtype) -> None:
    assert not lacks_instructions(dtype)


def test_with_instructions_products_are_torchs_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(half_precision, "lacks_instructions", lambda dtype: False)
    inputs, weight, bias, term = some(2, 16, 64), some(24, 64, seed=1), some(24, seed=2), some(2, 16, 24, seed=3)
    assert torch.equal(linear(inputs, weight, bias), nn.functional.linear(inputs, weight, bias))
    whole = torch.addmm(term.flatten(0, 1), inputs.flatten(0, 1), weight.T).view(term.shape)
    assert torch.equal(linear(inputs, weight, term), whole)


def test_a_models_layers_stay_linear_layers(without_instructions: list[torch.Size]) -> None:
    model = nn.Sequential(nn.Linear(64, 24, bias=False), nn.ReLU(), nn.Linear(24, 8)).to(torch.bfloat16)
    names = [name for name, _ in model.named_parameters()]
    use_fast_linears(model)
    assert isinstance(model[0], nn.Linear)
    assert [name for name, _ in model.named_parameters()] == names
    model(some(16, 64))
    assert without_instructions == [(16, 64), (16, 24)]


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt_neox"])  # without and with biases
def test_blocks_come_as_close_to_float32_as_with_torchs_own_products(
    family: str,
    import_model: Callable[..., Artifact],
    whole_model: Callable[..., Any],
    block_loop_logits: Callable[..., Tensor],
    without_instructions: list[torch.Size],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("coldpress.tasks.skeleton.TOKENS_AT_ONCE", 64)
    windows = torch.randint(0, 128, (3, 32), generator=torch.Generator().manual_seed(0))
    found = block_loop_logits(import_model(family), windows, dtype=torch.bfloat16)
    assert without_instructions
    with torch.no_grad():
        exact = whole_model(family).float()(windows, use_cache=False).logits
        torchs = whole_model(family).bfloat16()(windows, use_cache=False).logits
    assert (found - exact).norm() < 1.1 * (torchs - exact).norm() < 0.1 * exact.norm()


@pytest.mark.parametrize("masked", [False, True])
def test_what_learns_beside_a_frozen_weight_gets_the_same_gradients(
    masked: bool, without_instructions: list[torch.Size]
) -> None:
    weight, mask = some(24, 64), some(24, 64, seed=5) > 0
    inputs, upstream = some(2, 16, 64, seed=1), some(2, 16, 24, seed=2)

    def gradients(dtype: torch.dtype) -> list[Tensor]:
        frozen = Frozen(lambda: weight.to(dtype), None)
        layer = MaskedLora(frozen, mask, (24, 64), 4, 2.0, 0.0) if masked else Lora(frozen, (24, 64), 4, 2.0, 0.0)
        with torch.no_grad():
            layer.a.copy_(some(4, 64, seed=3))
            layer.b.copy_(some(24, 4, seed=4))
        leaf = inputs.to(dtype).requires_grad_()
        return list(torch.autograd.grad(layer(leaf), [leaf, layer.a, layer.b], upstream.to(dtype)))

    exact = gradients(torch.float32)
    assert without_instructions == []
    found = gradients(torch.bfloat16)
    assert without_instructions
    for mine, wanted in zip(found, exact, strict=True):
        assert float((mine - wanted).norm() / wanted.norm()) < 0.02


def test_on_other_devices_layers_are_left_alone(whole_model: Callable[..., Any]) -> None:
    config = whole_model("llama").config.to_dict()
    kinds = {type(m) for m in Skeleton(config, torch.bfloat16, "meta").model.modules() if isinstance(m, nn.Linear)}
    assert kinds == {nn.Linear}
