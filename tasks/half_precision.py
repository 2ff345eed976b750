"""Linear layers in bfloat16 and float16 on CPUs that have no instructions for them.

torch takes eight times as long for such products there as for float32's. Here they are made of float32 ones, and each
sum is rounded once, which is also what those instructions do. On all other devices everything is torch's own.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

# With fewer rows of inputs, as when tokens are generated, widening the weight takes longer than torch's products.
_FEWEST_ROWS = 8
_ELEMENTS_AT_ONCE = 1 << 20  # of a weight in float32: what fits into a processor's caches


def use_fast_linears(model: nn.Module) -> None:
    """Let the linear layers of a `transformers` model compute by `linear`."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = _FastLinear


def linear(inputs: Tensor, weight: Tensor, added: Tensor | None = None) -> Tensor:
    """x W^T + added, [..., out_features] in the inputs' dtype, differentiable.

    inputs: [..., in_features]; weight: [out_features, in_features]; added: a bias [out_features], or a tensor
    [..., out_features].
    """
    rows = inputs.shape[:-1].numel()
    if inputs.device.type == "cpu" and rows >= _FEWEST_ROWS and lacks_instructions(inputs.dtype):
        result: Tensor = _InFloat32.apply(inputs, weight, added)
        return result
    if added is None or added.ndim == 1:
        return torch.nn.functional.linear(inputs, weight, added)
    return torch.addmm(added.flatten(0, -2), inputs.flatten(0, -2), weight.T).view(added.shape)


@lru_cache
def lacks_instructions(dtype: torch.dtype) -> bool:
    """Whether this machine's CPU has no instructions for products of this dtype."""
    if dtype not in (torch.bfloat16, torch.float16):
        return False
    if not torch.backends.mkldnn.is_available():
        return True
    known = torch.ops.mkldnn
    supported = known._is_mkldnn_bf16_supported if dtype == torch.bfloat16 else known._is_mkldnn_fp16_supported
    return not supported()


class _FastLinear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


class _InFloat32(torch.autograd.Function):
    """Keeps for the backward pass what it was given, in half precision."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, added: Tensor | None) -> Tensor:
        by_inputs, by_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(inputs if by_weight else None, weight if by_inputs else None)
        ctx.added = None if added is None else added.shape
        return _product(inputs, weight, added)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weight = ctx.saved_tensors
        by_inputs, by_weight, by_added = ctx.needs_input_grad
        return (
            _product(upstream, weight.T) if by_inputs else None,
            _product(upstream.flatten(0, -2).T, inputs.flatten(0, -2).T) if by_weight else None,
            upstream.sum_to_size(ctx.added) if by_added else None,
        )


def _product(inputs: Tensor, weight: Tensor, added: Tensor | None = None) -> Tensor:
    flat = inputs.flatten(0, -2)
    offset = None if added is None else added.reshape(-1, len(weight))
    result = _row_by_row(flat, weight, offset) if weight.is_contiguous() else _column_by_column(flat, weight, offset)
    return result.view(*inputs.shape[:-1], len(weight))


def _row_by_row(inputs: Tensor, weight: Tensor, offset: Tensor | None) -> Tensor:
    wide = inputs.float()
    result = inputs.new_empty(len(inputs), len(weight))
    step = max(1, _ELEMENTS_AT_ONCE // max(1, weight.shape[1]))
    for start in range(0, len(weight), step):
        part = wide @ weight[start : start + step].float().T
        if offset is not None:
            part += offset[:, start : start + step]
        result[:, start : start + step] = part
    return result


def _column_by_column(inputs: Tensor, weight: Tensor, offset: Tensor | None) -> Tensor:
    """For transposed weights, whose columns lie together: through the head the gradient has the vocabulary's width."""
    total = inputs.new_zeros(len(inputs), len(weight), dtype=torch.float32)
    step = max(1, _ELEMENTS_AT_ONCE // max(1, len(weight)))
    for start in range(0, weight.shape[1], step):
        total.addmm_(inputs[:, start : start + step].float(), weight[:, start : start + step].float().T)
    if offset is not None:
        total += offset
    return total.to(inputs.dtype)
