"""Linear layers whose weights stay as they are while something beside them learns.

A frozen weight is given as a function, so that a packed one is unpacked when it is used and let go: neither forward nor
backward pass keeps a dense copy.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout

from ..half_precision import linear

# () -> a weight [out_features, in_features] on the device.
Weight = Callable[[], Tensor]


class Frozen(nn.Module):
    """y = x W^T + bias. It learns nothing, and gradients pass through it."""

    def __init__(self, weight: Weight, bias: Tensor | None) -> None:
        super().__init__()
        self.weight_of = weight
        self.bias_value = bias

    def forward(self, inputs: Tensor) -> Tensor:
        """[..., in_features] to [..., out_features], in the inputs' dtype."""
        result: Tensor = _FrozenLinear.apply(inputs, self.weight_of, self.bias_value)
        return result


class Lora(nn.Module):
    """y = x W^T + scale dropout(x) A^T B^T with A [rank, in_features], B [out_features, rank] in float32.

    Hu et al. 2021 (LoRA), arXiv:2106.09685, section 4.1: A is random, B zero, so that training begins at W.
    """

    def __init__(self, frozen: Frozen, shape: tuple[int, int], rank: int, scale: float, dropout: float) -> None:
        super().__init__()
        self.frozen = frozen
        self.scale = scale
        self.dropout = dropout
        self.a = nn.Parameter(torch.empty(rank, shape[1]))
        self.b = nn.Parameter(torch.zeros(shape[0], rank))
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))

    def forward(self, inputs: Tensor) -> Tensor:
        low = linear(dropout(inputs, self.dropout), self.a.to(inputs.dtype)) * self.scale
        whole: Tensor = self.frozen(inputs)
        return linear(low, self.b.to(inputs.dtype), whole)

    def factors(self) -> tuple[Tensor, Tensor]:
        """A and B of what is added to the weight, the scale in B."""
        return self.a.detach(), self.b.detach() * self.scale

    def merged(self) -> Tensor:
        """The weight with what was learned, float32 [out_features, in_features]."""
        a, b = self.factors()
        return (b @ a).add_(self.frozen.weight_of())


class MaskedLora(Lora):
    """y = x W^T + scale dropout(x) ((B A) * mask)^T: what was pruned stays pruned, so that B A can be merged into W.

    Huang et al. 2025 (LoSA), arXiv:2501.07668. The weights are put together for each pass, and only the gradient of
    their sum is as large as they are. With dropout, which the inputs of W do not get, they need a product each.
    mask: bool [out_features, in_features], True where W was kept. start: A and B to begin with, whose term W has
    already: what is added is the difference to it.
    """

    def __init__(
        self,
        frozen: Frozen,
        mask: Tensor,
        shape: tuple[int, int],
        rank: int,
        scale: float,
        dropout: float,
        start: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        super().__init__(frozen, shape, rank, scale, dropout)
        self.mask: Tensor
        self.register_buffer("mask", mask, persistent=False)
        self.start_a: Tensor | None
        self.start_b: Tensor | None
        self.register_buffer("start_a", None if start is None else start[0].clone(), persistent=False)
        self.register_buffer("start_b", None if start is None else start[1].clone(), persistent=False)
        if start is not None:
            with torch.no_grad():
                self.a.copy_(start[0])
                self.b.copy_(start[1])

    def forward(self, inputs: Tensor) -> Tensor:
        weight, bias = self.frozen.weight_of, self.frozen.bias_value
        a, b = self._difference()
        if self.dropout == 0:
            whole: Tensor = _MaskedLinear.apply(inputs, a, b, weight, self.mask, self.scale, bias)
            return whole
        term: Tensor = _MaskedLinear.apply(dropout(inputs, self.dropout), a, b, None, self.mask, self.scale, None)
        result: Tensor = self.frozen(inputs) + term
        return result

    def _difference(self) -> tuple[Tensor, Tensor]:
        """Factors of B A without what W has of it."""
        if self.start_a is None or self.start_b is None:
            return self.a, self.b
        return torch.cat([self.a, self.start_a]), torch.cat([self.b, -self.start_b], 1)

    def merged(self) -> Tensor:
        """The weight with what was learned, float32 [out_features, in_features]; exactly zero where it was pruned."""
        with torch.no_grad():
            return _with_term(self.frozen.weight_of(), *self._difference(), self.mask, self.scale)


class MaskedWeight(nn.Module):
    """y = x W^T + bias with W learning in float32 where the mask has True, zero elsewhere; everywhere without one."""

    def __init__(self, frozen: Frozen, mask: Tensor | None) -> None:
        super().__init__()
        self.bias_value = frozen.bias_value
        weight = frozen.weight_of().detach().float().clone()
        if mask is not None:
            weight.mul_(_as_numbers(mask))
        self.weight = nn.Parameter(weight)
        if mask is not None:
            self.weight.register_hook(lambda gradient: gradient * _as_numbers(mask))

    def forward(self, inputs: Tensor) -> Tensor:
        return linear(inputs, self.weight.to(inputs.dtype), self.bias_value)

    def merged(self) -> Tensor:
        """The weight, float32 [out_features, in_features]."""
        return self.weight.detach()


class _FrozenLinear(torch.autograd.Function):
    """A linear layer that keeps neither its inputs nor its weight for the backward pass."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight_of: Weight, bias: Tensor | None) -> Tensor:
        ctx.weight_of = weight_of
        return linear(inputs, weight_of().to(inputs.dtype), bias)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        return linear(upstream, ctx.weight_of().to(upstream.dtype).T), None, None


class _MaskedLinear(torch.autograd.Function):
    """x (W + scale (B A) * mask)^T + bias, the sum made anew in the backward pass instead of kept."""

    @staticmethod
    def forward(
        ctx: Any,
        inputs: Tensor,
        a: Tensor,
        b: Tensor,
        weight_of: Weight | None,
        mask: Tensor,
        scale: float,
        bias: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(inputs, a, b, mask)
        ctx.weight_of, ctx.scale = weight_of, scale
        weight = _with_term(None if weight_of is None else weight_of(), a, b, mask, scale)
        return linear(inputs, weight.to(inputs.dtype), bias)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        inputs, a, b, mask = ctx.saved_tensors
        weight_of = ctx.weight_of
        onward = None
        if ctx.needs_input_grad[0]:
            weight = _with_term(None if weight_of is None else weight_of(), a, b, mask, ctx.scale)
            onward = linear(upstream, weight.to(upstream.dtype).T)
        flat = linear(upstream.reshape(-1, upstream.shape[-1]).T, inputs.reshape(-1, inputs.shape[-1]).T)
        gradient = flat.float().mul_(_as_numbers(mask)).mul_(ctx.scale)
        return onward, b.T @ gradient, gradient @ a.T, None, None, None, None


def _with_term(weight: Tensor | None, a: Tensor, b: Tensor, mask: Tensor, scale: float) -> Tensor:
    """(W + scale B A) * mask in float32; W counts as zero when it is None."""
    term = (b @ a).mul_(scale)
    if weight is not None:
        term.add_(weight)
    return term.mul_(_as_numbers(mask))


def _as_numbers(mask: Tensor) -> Tensor:
    """A bool tensor as zeros and ones in the same memory; a product with bool takes thrice as long on CPUs."""
    return mask.view(torch.uint8)
