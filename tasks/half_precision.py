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
        ctx.save_for_backward(inputs, weight)
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
    rows, columns = weight.shape
    flat = inputs.reshape(-1, columns).float()
    result = inputs.new_empty(len(flat), rows)
    offset = None if added is None else added.reshape(-1, rows)
    step = max(1, _ELEMENTS_AT_ONCE // columns)
    for start in range(0, rows, step):
        part = flat @ weight[start : start + step].float().T
        if offset is not None:
            part += offset[:, start : start + step]
        result[:, start : start + step] = part
    return result.view(*inputs.shape[:-1], rows)
