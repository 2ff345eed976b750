"""Wanda as published (Sun et al. 2023, https://github.com/locuslab/wanda), written anew for today's `transformers`.

The whole model is in memory. The first block's inputs are caught; then, block after block: hooks on all seven linears
keep a running mean of squared inputs during one pass, sample by sample; a full stable sort of each row says which
weights become zero; a second pass gives the next block its inputs. None of coldpress is used.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class _Caught(Exception):
    """Ends the forward pass when the first block has been reached."""


class _Catcher(nn.Module):
    """Stands in for the first block and keeps what it is called with."""

    def __init__(self, block: nn.Module, inputs: Tensor) -> None:
        super().__init__()
        self.block = block
        self.inputs = inputs
        self.seen = 0
        self.keywords: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("block"), name)

    def forward(self, hidden: Tensor, **keywords: Any) -> None:
        self.inputs[self.seen] = hidden[0]
        self.seen += 1
        self.keywords = keywords
        raise _Caught


class _WrappedLinear:
    """Running mean over samples of the squared norm of each input feature."""

    def __init__(self, layer: nn.Linear) -> None:
        self.scaler_row = torch.zeros(layer.weight.shape[1])
        self.samples = 0

    def add_batch(self, inputs: Tensor) -> None:
        batch = inputs.shape[0]
        features = inputs.reshape(-1, inputs.shape[-1]).t().type(torch.float32)
        self.scaler_row *= self.samples / (self.samples + batch)
        self.samples += batch
        self.scaler_row += torch.norm(features, p=2, dim=1) ** 2 / self.samples


@torch.no_grad()
def prune(model: Any, windows: Tensor, sparsity: float) -> None:
    """Zero `sparsity` of each row of all block linears of a Llama-like `model`, for token ids [windows, length]."""
    blocks = model.model.layers
    inputs = torch.zeros(*windows.shape, model.config.hidden_size, dtype=model.dtype)
    outputs = torch.zeros_like(inputs)

    catcher = _Catcher(blocks[0], inputs)
    blocks[0] = catcher
    for window in windows:
        try:
            model(window[None], use_cache=False)
        except _Caught:
            continue
    blocks[0] = catcher.block

    def run(block: nn.Module) -> None:
        for sample in range(len(windows)):
            result = block(inputs[sample][None], **catcher.keywords)
            outputs[sample] = (result[0] if isinstance(result, tuple) else result)[0]

    def hook(wrapped: _WrappedLinear) -> Callable[..., None]:
        def add(_: nn.Module, layer_inputs: tuple[Tensor, ...], __: Tensor) -> None:
            wrapped.add_batch(layer_inputs[0])

        return add

    for block in blocks:
        linears = {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}
        wrapped = {name: _WrappedLinear(linear) for name, linear in linears.items()}
        handles = [linear.register_forward_hook(hook(wrapped[name])) for name, linear in linears.items()]
        run(block)
        for handle in handles:
            handle.remove()
        for name, linear in linears.items():
            metric = torch.abs(linear.weight.data) * torch.sqrt(wrapped[name].scaler_row.reshape(1, -1))
            mask = torch.zeros_like(metric) == 1
            order = torch.sort(metric, dim=-1, stable=True)[1]
            mask.scatter_(1, order[:, : int(metric.shape[1] * sparsity)], True)
            linear.weight.data[mask] = 0
        run(block)
        inputs, outputs = outputs, inputs
