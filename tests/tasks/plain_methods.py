"""The methods once more, as plainly as they can be written, on whole `transformers` models.

Nothing here uses coldpress: these are what its results are compared with. Slow, and all weights in memory at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class Enough(Exception):
    """Ends a forward pass when the block of interest is done."""


@torch.no_grad()
def linear_inputs(model: Any, blocks: str, index: int, windows: Tensor) -> dict[str, list[Tensor]]:
    """{weight name: inputs [tokens, in_features] of each window} of all linear layers in block `index`.

    blocks: name of the module list, "model.layers".
    """
    block = model.get_submodule(f"{blocks}.{index}")
    seen: dict[str, list[Tensor]] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            seen.setdefault(f"{blocks}.{index}.{name}.weight", []).append(inputs[0].flatten(0, -2).clone())

        return hook

    def stop(*_: Any) -> None:
        raise Enough

    handles = [
        module.register_forward_pre_hook(keep(name))
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear)
    ]
    handles.append(block.register_forward_hook(stop))
    for window in windows:
        try:
            model(window[None], use_cache=False)
        except Enough:
            continue
    for handle in handles:
        handle.remove()
    return seen


def progressively(model: Any, blocks: str, windows: Tensor) -> Iterator[dict[str, list[Tensor]]]:
    """`linear_inputs` of one block after the other; each sees what the caller did to those before it."""
    for index in range(len(model.get_submodule(blocks))):
        yield linear_inputs(model, blocks, index, windows)


@torch.no_grad()
def wanda(model: Any, blocks: str, windows: Tensor, sparsity: float) -> dict[str, Tensor]:
    """Prune `model` in place as in Sun et al. 2023, algorithm 1; returns {weight name: mask, True where kept}.

    Squares are summed in float64, so that the masks do not hang on an order of summation: two float32 sums that differ
    in the last bit decide near-ties differently, and every block after such a one sees other inputs.
    """
    masks = {}
    for inputs in progressively(model, blocks, windows):
        for name, windows_of_inputs in inputs.items():
            weight = model.get_parameter(name)
            squares = sum(one_window.double().square().sum(0) for one_window in windows_of_inputs)
            order = torch.sort(weight.abs() * squares.sqrt().float(), dim=1, stable=True).indices
            mask = torch.ones_like(weight, dtype=torch.bool)
            mask.scatter_(1, order[:, : int(weight.shape[1] * sparsity)], False)
            weight *= mask
            masks[name] = mask
    return masks


@torch.no_grad()
def perplexity(model: Any, windows: Tensor) -> float:
    """exp of the mean over windows of the mean cross-entropy of tokens 1, 2, …"""
    losses = []
    for window in windows:
        log_probabilities = model(window[None], use_cache=False).logits[0].double().log_softmax(-1)
        targets = window[1:]
        losses.append(-log_probabilities[:-1].gather(1, targets[:, None]).mean().item())
    return math.exp(sum(losses) / len(losses))


# GPTQ


def grid(weight: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Scale (a float16 number) and zero point of each row of [rows, columns], spanning its values and zero."""
    steps = 2**bits - 1
    low, high = weight.double().amin(1).clamp(max=0), weight.double().amax(1).clamp(min=0)
    if symmetric:
        high = torch.maximum(-low, high)
        low = -high
    empty = low == high
    low, high = low.masked_fill(empty, -1.0), high.masked_fill(empty, 1.0)
    scale = ((high - low) / steps).half().double()
    zero = torch.full_like(scale, (steps + 1) // 2) if symmetric else (-low / scale).round().clamp(0, steps)
    return scale, zero


def nearest(values: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """Codes of the values of one column, [rows]."""
    return (torch.round(values / scale) + zero).clamp(0, 2**bits - 1)


def round_to_nearest(weight: Tensor, bits: int, group_size: int, symmetric: bool) -> Tensor:
    """What plain rounding, without GPTQ, makes of a weight; float64."""
    result = weight.double().clone()
    for start in range(0, weight.shape[1], group_size):
        scale, zero = grid(result[:, start : start + group_size], bits, symmetric)
        for column in range(start, start + group_size):
            result[:, column] = (nearest(result[:, column], scale, zero, bits) - zero) * scale
    return result


def gptq(
    weight: Tensor,
    gram: Tensor,
    *,
    bits: int,
    group_size: int,
    symmetric: bool,
    act_order: bool,
    static_groups: bool,
    damping: float,
    keep: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Optimal brain quantization, column by column in float64: codes [rows, columns], scales and zeros [groups, rows].

    Every step spreads the column's error over all columns that are left, by the inverse Hessian of these, and then
    takes the column out of that inverse (Frantar et al. 2022, eq. 2 and 3). No Cholesky factor, no blocks of columns.
    """
    work = weight.double().clone()
    hessian = gram.double().clone()
    columns = work.shape[1]
    size = columns if group_size == -1 else group_size
    dead = hessian.diagonal() == 0
    hessian.diagonal()[dead] = 1
    work[:, dead] = 0
    order = list(range(columns))
    if act_order:
        order.sort(key=lambda column: -hessian[column, column].item())
    hessian.diagonal().add_(damping * hessian.diagonal().mean())
    inverse = torch.linalg.inv(hessian)

    grids: dict[int, tuple[Tensor, Tensor]] = {}
    if static_groups:
        grids = {
            group: grid(work[:, group * size : (group + 1) * size], bits, symmetric) for group in range(columns // size)
        }
    codes = torch.empty_like(work)
    for position, column in enumerate(order):
        group = column // size if static_groups else position // size
        if group not in grids:
            grids[group] = grid(work[:, order[position : position + size]], bits, symmetric)
        scale, zero = grids[group]
        code = nearest(work[:, column], scale, zero, bits)
        if keep is not None:
            code = torch.where(keep[:, column], code, zero)
        codes[:, column] = code
        error = (work[:, column] - (code - zero) * scale) / inverse[column, column]
        work -= error[:, None] * inverse[column]
        inverse -= torch.outer(inverse[:, column], inverse[column]) / inverse[column, column]
        inverse[column, :] = 0
        inverse[:, column] = 0
        inverse[column, column] = 1  # never used again
    scales = torch.stack([grids[group][0] for group in range(len(grids))])
    zeros = torch.stack([grids[group][1] for group in range(len(grids))])
    return codes, scales, zeros


def stream(words: list[int]) -> int:
    """The number that 32-bit words make up, the first one lowest."""
    return sum((word % 2**32) << (32 * place) for place, word in enumerate(words))


def gptq_weight(tensors: dict[str, Tensor], module: str, bits: int, offset: int = 1) -> Tensor:
    """The float32 weight [out_features, in_features] of a layer in GPTQ's checkpoint format, number by number.

    offset: by how much stored zero points are too low, 1 in version 1 of the format and 0 in version 2.
    """
    qweight, qzeros = tensors[f"{module}.qweight"], tensors[f"{module}.qzeros"]
    scales, g_idx = tensors[f"{module}.scales"].float(), tensors[f"{module}.g_idx"].tolist()
    top = 2**bits - 1
    # Along its packed dimension a tensor is one number, the first word lowest.
    numbers = [stream(words) for words in qweight.T.tolist()]
    zero_numbers = [stream(words) for words in qzeros.tolist()]
    steps = [
        [
            ((number >> (bits * column)) & top) - (((zero_numbers[group] >> (bits * row)) & top) + offset)
            for column, group in enumerate(g_idx)
        ]
        for row, number in enumerate(numbers)
    ]
    return torch.tensor(steps).float() * scales[g_idx].T


# AWQ

AWQ_GROUPS = (
    (("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"), "input_layernorm.weight"),
    (("self_attn.o_proj.weight",), "self_attn.v_proj.weight"),
    (("mlp.gate_proj.weight", "mlp.up_proj.weight"), "post_attention_layernorm.weight"),
    (("mlp.down_proj.weight",), "mlp.up_proj.weight"),
)
"""Weights of a Llama's block that read the same input, and what makes that input."""


@torch.no_grad()
def awq(
    block: dict[str, Tensor], inputs: dict[str, Tensor], config: Any, bits: int, group_size: int
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Lin et al. 2023 on the tensors of a Llama's block, in place and in float64, by running inputs through its layers.

    inputs: [tokens, in_features] of each weight. Asymmetric. Returns {first weight of a group: what its inputs are
    divided by}, and {weight: what its outputs are divided by} of v_proj and up_proj.
    """
    work = {name: tensor.double() for name, tensor in block.items()}
    sharing, head = config.num_attention_heads // config.num_key_value_heads, config.head_dim
    scales, row_scales = {}, {}
    for names, before in AWQ_GROUPS:
        x = inputs[names[0]]
        size = x.abs().mean(0)
        if before == "self_attn.v_proj.weight":
            size = size.view(-1, sharing, head).mean(1, keepdim=True).expand(-1, sharing, head).flatten()
        losses = []
        for step in range(21):
            s = (size ** (step / 20)).clamp(min=1e-4)
            s = s / (s.max() * s.min()).sqrt()
            errors = [
                (x / s) @ round_to_nearest(work[name] * s, bits, group_size, symmetric=False).T - x @ work[name].T
                for name in names
            ]
            losses.append((sum(error.square().sum().item() for error in errors), s))
        s = min(losses, key=lambda one: one[0])[1]
        scales[names[0]] = s
        for name in names:
            work[name] *= s
        rows = s.view(-1, sharing, head)[:, 0].flatten() if before == "self_attn.v_proj.weight" else s
        work[before] /= rows[:, None] if work[before].dim() == 2 else rows
        if work[before].dim() == 2:
            row_scales[before] = rows
    for names, _ in AWQ_GROUPS:
        for name in names:
            x = inputs[name] / scales[names[0]]
            weight = work[name]
            for start in range(0, weight.shape[1], group_size):
                columns = slice(start, start + group_size)
                part = weight[:, columns]
                most = part.abs().amax(1, keepdim=True)
                tries = [part] if "q_proj" in name or "k_proj" in name else []
                tries = tries or [part.clamp(-most * (1 - i / 20), most * (1 - i / 20)) for i in range(10)]
                rounded = torch.stack([round_to_nearest(one, bits, group_size, symmetric=False) for one in tries])
                best = ((rounded - part) @ x[:, columns].T).square().sum(2).argmin(0)
                work[name][:, columns] = rounded[best, torch.arange(len(part))]
    for name, tensor in work.items():
        block[name].copy_(tensor)
    return scales, row_scales


# NF4

NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""Dettmers et al. 2023, appendix E."""


def nf4_weight(codes: Tensor, absmax: Tensor, shape: tuple[int, int], block_size: int) -> Tensor:
    """The float32 weight for packed codes, two a byte, the first in the high half."""
    halves = torch.stack([codes.flatten() >> 4, codes.flatten() & 15], 1).flatten().long()
    values = torch.tensor(NF4)[halves]
    return (values * absmax.repeat_interleave(block_size)[: len(values)]).reshape(shape)


@contextmanager
def weights_of(model: Any, weights: dict[str, Tensor]) -> Iterator[Any]:
    """The model with some weights replaced."""
    saved = {name: model.get_parameter(name).detach().clone() for name in weights}
    with torch.no_grad():
        for name, weight in weights.items():
            model.get_parameter(name).copy_(weight)
        yield model
        for name, weight in saved.items():
            model.get_parameter(name).copy_(weight)


def sparsegpt(
    weight: Tensor,
    gram: Tensor,
    sparsity: float,
    kept_of: tuple[int, int] | None = None,
    block: int = 128,
    quantized: tuple[int, int, bool] | None = None,
) -> tuple[Tensor, Tensor]:
    """Frantar and Alistarh 2023, algorithm 1, for one layer in float64: (new weight, mask, True where kept).

    gram: sum x x^T. kept_of: (2, 4) for two in each four inputs. Exactly int(sparsity * elements) go, block by block.
    quantized: what stays is rounded, by (bits, group size or -1, symmetric).
    """
    w, h = weight.double().clone(), gram.double().clone()
    dead = h.diagonal() == 0
    h[dead, dead] = 1
    w[:, dead] = 0
    h += 0.01 * h.diagonal().mean() * torch.eye(len(h), dtype=h.dtype)
    u = torch.linalg.cholesky(torch.linalg.inv(h)).T
    # torch gives the lower factor of H^-1 = L L^T; the paper's upper one is that of H^-1 = U^T U.
    assert torch.allclose(u.T @ u, torch.linalg.inv(h))
    rows, columns = w.shape
    mask = torch.ones_like(w, dtype=torch.bool)
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        if kept_of is None:
            score = w[:, start:stop] ** 2 / u.diagonal()[start:stop] ** 2
            count = int(sparsity * rows * stop) - int(sparsity * rows * start)
            chosen = score.flatten().argsort()[:count]
            part = torch.ones(score.numel(), dtype=torch.bool)
            part[chosen] = False
            mask[:, start:stop] = part.reshape(score.shape)
        for column in range(start, stop):
            if kept_of is not None and column % kept_of[1] == 0:
                group = slice(column, column + kept_of[1])
                score = w[:, group] ** 2 / u.diagonal()[group] ** 2
                order = score.argsort(dim=1)
                mask[:, group] = mask[:, group].scatter(1, order[:, : kept_of[1] - kept_of[0]], False)
            value = w[:, column] * mask[:, column]
            if quantized is not None:
                bits, group_size, symmetric = quantized
                size = columns if group_size == -1 else group_size
                if column % size == 0:
                    staying = w[:, column : column + size] * mask[:, column : column + size]  # as far as is known
                    scale, zero = grid(staying, bits, symmetric)
                value = (nearest(value, scale, zero, bits) - zero) * scale
            error = (w[:, column] - value) / u[column, column]
            w[:, column:] -= error[:, None] * u[column, column:]
            w[:, column] = value
    return w, mask


@torch.no_grad()
def wanda_sp(model: Any, blocks: str, windows: Tensor, heads: int, channels: int) -> list[tuple[list[int], list[int]]]:
    """Zero the columns of `o_proj` and `down_proj` of so many key-value groups and channels of each block, in place.

    For Llama's names. Returns the (groups, channels) removed of each block.
    """
    config = model.config
    per_group = config.head_dim * config.num_attention_heads // config.num_key_value_heads
    removed = []
    for index, inputs in enumerate(progressively(model, blocks, windows)):
        gone = []
        for layer, size, count in (("self_attn.o_proj", per_group, heads), ("mlp.down_proj", 1, channels)):
            name = f"{blocks}.{index}.{layer}.weight"
            weight = model.get_parameter(name)
            squares = sum(one_window.double().square().sum(0) for one_window in inputs[name])
            score = (weight.abs().double() * squares.sqrt()).mean(0).view(-1, size).sum(1)
            gone.append(sorted(score.argsort()[:count].tolist()))
            for part in gone[-1]:
                weight[:, part * size : (part + 1) * size] = 0
        removed.append((gone[0], gone[1]))
    return removed
