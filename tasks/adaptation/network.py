"""A whole model in memory, as training needs it: a checkpoint's tensors in a `transformers` model.

The linear layers of the blocks are replaced by those that a method makes; everything else is frozen. The model stays in
evaluation mode, so that dropout of its own never acts; layers of ours have theirs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from ..blocks import StoredModel
from ..formats import unpack
from ..half_precision import linear
from ..skeleton import build_model
from ..stage import Run
from .layers import Frozen
from .peft_format import PREFIX

# Logits of so many tokens are in memory at once.
HEAD_CHUNK = 512


class Network:
    """A checkpoint as a `transformers` model whose block linears are what `make(name, frozen, shape, mask)` returned.

    make gets a weight's full name, the layer as it is, its shape (out_features, in_features) and its mask, if it was
    pruned. layers: what it made, by weight name, in the order of the blocks. Packed weights stay packed.
    dtype: of the computation and of everything that is frozen.
    """

    def __init__(
        self,
        run: Run,
        stored: StoredModel,
        dtype: torch.dtype,
        make: Callable[[str, Frozen, tuple[int, int], Tensor | None], nn.Module],
        *,
        gradient_checkpointing: bool = False,
    ) -> None:
        self.dtype = dtype
        self.config = stored.config
        self.layers: dict[str, nn.Module] = {}
        self.model = build_model(stored.config, dtype)
        self.blocks: nn.ModuleList = self.model.get_submodule(stored.family.blocks)
        for module in self.model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(run.device))
        tensors = stored.outer(dtype)
        for index in range(stored.blocks):
            stored.prefetch(index + 1)
            tensors.update(self._block(run, stored, index, make))
            run.progress("loading", index + 1, stored.blocks)
        for name, _ in list(self.model.named_parameters(remove_duplicate=False)):
            key = stored.family.file_name(name)
            owner, _, last = name.rpartition(".")
            if key in tensors:
                parameter = nn.Parameter(tensors[key], requires_grad=False)
                self.model.get_submodule(owner)._parameters[last] = parameter
        head, embedding = self.model.get_output_embeddings(), self.model.get_input_embeddings()
        if head.weight.is_meta:  # tied
            head._parameters["weight"] = embedding.weight
        if gradient_checkpointing:
            for block in self.blocks:
                block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)

    def _block(
        self,
        run: Run,
        stored: StoredModel,
        index: int,
        make: Callable[[str, Frozen, tuple[int, int], Tensor | None], nn.Module],
    ) -> dict[str, Tensor]:
        """Put a block's linear layers in place. Returns its other tensors, on the device."""
        format, quantization = stored.manifest.format, stored.manifest.quantization
        tensors = {name: tensor.to(run.device) for name, tensor in stored.stored(index).items()}
        shapes = stored.linear_shapes(index)
        masks = {name: mask.to(run.device) for name, mask in stored.reader.masks(shapes).items()}
        rest = dict(tensors)
        for name, shape in shapes.items():
            module = name.removesuffix(".weight")
            mine = {
                key: tensor for key, tensor in tensors.items() if key.startswith((f"{module}.", f"{PREFIX}{module}."))
            }
            for key in mine:
                rest.pop(key)
            bias = mine.pop(f"{module}.bias", None)
            weight = functools.partial(_unpacked, name, format, quantization, mine, self.dtype, run.device)
            if format == "dense":
                weight = functools.partial(_same, weight())
            frozen = Frozen(weight, _cast(bias, self.dtype))
            layer = make(name, frozen, shape, masks.get(name)).to(run.device)
            self.layers[name] = layer
            owner, _, last = module.rpartition(".")
            setattr(self.model.get_submodule(owner), last, layer)
        return {name: tensor.to(self.dtype) for name, tensor in rest.items()}

    def features(self, windows: Tensor) -> Tensor:
        """What the head reads, [windows, length, features], for token ids [windows, length]."""
        hidden: Tensor = self.model.base_model(input_ids=windows, use_cache=False).last_hidden_state
        return hidden

    def logits(self, features: Tensor) -> Tensor:
        """Logits in float32, [..., vocabulary]."""
        head = self.model.get_output_embeddings()
        logits = linear(features, head.weight, head.bias).float()
        cap = self.config.get("final_logit_softcapping")
        return torch.tanh(logits / cap) * cap if cap else logits

    def loss(self, windows: Tensor, counted: Tensor) -> Tensor:
        """Summed cross-entropy, in nats, of the tokens 1.. of windows [windows, length] where `counted` is True.

        counted: bool [windows, length - 1].
        """
        features = self.features(windows)[:, :-1][counted]
        return self.over_tokens(_cross_entropy, features, windows[:, 1:][counted])

    def over_tokens(self, loss: Callable[..., Tensor], features: Tensor, *others: Tensor) -> Tensor:
        """The sum of `loss(logits, *others)` over tokens [tokens, features]; few logits are in memory at a time."""
        total: Tensor = _OverTokens.apply(features, self.logits, loss, *others)
        return total

    def learned(self) -> dict[str, nn.Parameter]:
        """What is trained, by name within the model, in a fixed order."""
        return {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}


class _OverTokens(torch.autograd.Function):
    """A loss over tokens with its gradient by the features, both made in one pass over the head, which is frozen."""

    @staticmethod
    def forward(
        ctx: Any, features: Tensor, logits: Callable[[Tensor], Tensor], loss: Callable[..., Tensor], *others: Tensor
    ) -> Tensor:
        total = torch.zeros((), device=features.device)
        gradients = []
        chunks = (tensor.split(HEAD_CHUNK) for tensor in (features, *others))
        for part, *rest in zip(*chunks, strict=True):
            with torch.enable_grad():
                leaf = part.detach().requires_grad_()
                value = loss(logits(leaf), *rest)
            if ctx.needs_input_grad[0]:
                gradients.append(torch.autograd.grad(value, leaf)[0])
            total += value.detach()
        ctx.save_for_backward(torch.cat(gradients) if gradients else features)
        return total

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        onward = (gradient.float() * upstream).to(gradient.dtype)
        return (onward, *(None,) * (len(ctx.needs_input_grad) - 1))


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _unpacked(
    name: str,
    format: str,
    quantization: Mapping[str, Any] | None,
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype,
    device: str,
) -> Tensor:
    return unpack(format, quantization, tensors, dtype, device)[name]


def _cast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.to(dtype)


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return cross_entropy(logits, targets, reduction="sum")
