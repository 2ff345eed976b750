"""Wanda and SparseGPT as published (https://github.com/locuslab/wanda), written anew for today's `transformers`.

The whole model is in memory. The first block's inputs are caught; then, block after block: hooks on all seven linears
keep a running mean (of squared inputs, or of the Hessian) during one pass, sample by sample; each layer is pruned; a
second pass gives the next block its inputs. None of coldpress is used.
"""

from __future__ import annotations

import math
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


class Wanda:
    """Running mean over samples of the squared norm of each input feature; a full stable sort of each row."""

    def __init__(self, layer: nn.Linear) -> None:
        self.layer = layer
        self.scaler_row = torch.zeros(layer.weight.shape[1])
        self.samples = 0

    def add_batch(self, inputs: Tensor) -> None:
        batch = inputs.shape[0]
        features = inputs.reshape(-1, inputs.shape[-1]).t().type(torch.float32)
        self.scaler_row *= self.samples / (self.samples + batch)
        self.samples += batch
        self.scaler_row += torch.norm(features, p=2, dim=1) ** 2 / self.samples

    def prune(self, sparsity: float) -> None:
        metric = torch.abs(self.layer.weight.data) * torch.sqrt(self.scaler_row.reshape(1, -1))
        mask = torch.zeros_like(metric) == 1
        order = torch.sort(metric, dim=-1, stable=True)[1]
        mask.scatter_(1, order[:, : int(metric.shape[1] * sparsity)], True)
        self.layer.weight.data[mask] = 0


class SparseGpt:
    """Running mean of the Hessian; columns one by one in blocks of 128, each update over the rest of its block."""

    def __init__(self, layer: nn.Linear) -> None:
        self.layer = layer
        self.hessian = torch.zeros(layer.weight.shape[1], layer.weight.shape[1])
        self.samples = 0

    def add_batch(self, inputs: Tensor) -> None:
        batch = inputs.shape[0]
        features = inputs.reshape(-1, inputs.shape[-1]).t()
        self.hessian *= self.samples / (self.samples + batch)
        self.samples += batch
        features = math.sqrt(2 / self.samples) * features.float()
        self.hessian += features.matmul(features.t())

    def prune(self, sparsity: float, block: int = 128, damping: float = 0.01) -> None:
        weight = self.layer.weight.data.clone().float()
        columns = weight.shape[1]
        hessian = self.hessian
        dead = torch.diag(hessian) == 0
        hessian[dead, dead] = 1
        weight[:, dead] = 0
        diagonal = torch.arange(columns)
        hessian[diagonal, diagonal] += damping * torch.mean(torch.diag(hessian))
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
        factor = torch.linalg.cholesky(inverse, upper=True)
        for start in range(0, columns, block):
            end = min(start + block, columns)
            part = weight[:, start:end].clone()
            pruned = torch.zeros_like(part)
            errors = torch.zeros_like(part)
            inner = factor[start:end, start:end]
            scores = part**2 / torch.diag(inner).reshape(1, -1) ** 2
            threshold = torch.sort(scores.flatten())[0][int(scores.numel() * sparsity)]
            mask = scores <= threshold
            for column in range(end - start):
                values = part[:, column]
                kept = values.clone()
                kept[mask[:, column]] = 0
                pruned[:, column] = kept
                error = (values - kept) / inner[column, column]
                part[:, column:] -= error.unsqueeze(1).matmul(inner[column, column:].unsqueeze(0))
                errors[:, column] = error
            weight[:, start:end] = pruned
            weight[:, end:] -= errors.matmul(factor[start:end, end:])
        self.layer.weight.data = weight.to(self.layer.weight.dtype)


@torch.no_grad()
def prune(model: Any, windows: Tensor, sparsity: float, method: type[Wanda] | type[SparseGpt] = Wanda) -> None:
    """Zero `sparsity` of all block linears of a Llama-like `model`, for token ids [windows, length]."""
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

    def hook(wrapped: Wanda | SparseGpt) -> Callable[..., None]:
        def add(_: nn.Module, layer_inputs: tuple[Tensor, ...], __: Tensor) -> None:
            wrapped.add_batch(layer_inputs[0])

        return add

    for block in blocks:
        linears = {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}
        wrapped = {name: method(linear) for name, linear in linears.items()}
        handles = [linear.register_forward_hook(hook(wrapped[name])) for name, linear in linears.items()]
        run(block)
        for handle in handles:
            handle.remove()
        for layer in wrapped.values():
            layer.prune(sparsity)
        run(block)
        inputs, outputs = outputs, inputs
