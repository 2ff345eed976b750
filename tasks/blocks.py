"""The block loop: one decoder block in memory at a time, whatever the model's size or the method.

`run_blocks` is the whole of it. For each block: load it alone; run the calibration windows through it to gather what
the method needs; let the method change its weights; store the result; run the windows through the block *as stored*
to feed the next one; let it go. Statistics are summed one window at a time in a fixed order, so a run that is
interrupted and resumed ends in the same bytes.

`Skeleton` is the model without weights: it knows how to embed tokens, call one block, and finish with the head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..storage.artifacts import Artifact, ArtifactReader, ArtifactWriter
from ..storage.tensors import torch_dtype
from .architectures import Family, Linear, block_count, family_of, is_tied
from .formats import unpack
from .stage import Run, StageError


class Statistic(Protocol):
    """Something summed over the calibration inputs of a linear layer, one window at a time."""

    def add(self, inputs: Tensor) -> None:
        """Add one window's inputs, [tokens, in_features]."""
        ...


@dataclass(frozen=True)
class Block:
    """A block as a method sees it.

    weights: {linear weight's full name: [out_features, in_features]}, as stored, in the storage dtype, on the device.
    statistics: what was gathered for each of those layers; layers that read the same input share one object.
    masks: {full name: bool, True where kept} of those that were pruned before.
    linears: what each weight is for.
    """

    index: int
    prefix: str
    weights: Mapping[str, Tensor]
    statistics: Mapping[str, Any]
    masks: Mapping[str, Tensor]
    linears: Mapping[str, Linear]


@dataclass(frozen=True)
class Change:
    """What a method made of a block: tensors to store instead of the weights named in `replaced`, and their masks."""

    tensors: Mapping[str, Tensor]
    replaced: frozenset[str]
    masks: Mapping[str, Tensor] = field(default_factory=dict)


class _Stop(Exception):
    """Ends a forward pass early, when everything asked for has been seen."""


class Skeleton:
    """A `transformers` model whose parameters stay on the meta device; weights are handed in call by call."""

    def __init__(self, config: Mapping[str, Any], dtype: torch.dtype, device: str) -> None:
        self.family: Family = family_of(config)
        self.config = config
        self.dtype = dtype
        self.device = device
        self.model = build_model(config, dtype)
        self._blocks: nn.ModuleList = self.model.get_submodule(self.family.blocks)
        for module in self.model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(device))
        self._calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def parameter_names(self) -> dict[str, tuple[int, ...]]:
        """Every parameter by its name in checkpoint files, with its shape; a tied head is not listed."""
        return {self.family.file_name(name): tuple(p.shape) for name, p in self.model.named_parameters()}

    def embed(self, outer: Mapping[str, Tensor], windows: Tensor) -> Tensor:
        """Inputs of the first block, [windows, length, hidden], for token ids [windows, length].

        Also records with which further arguments (mask, positions …) the model calls each of its blocks; they depend
        on the length alone. `outer`: the tensors outside the blocks, by parameter name.
        """
        first: list[Tensor] = []
        hidden: Tensor | None = None
        for index, window in enumerate(windows):
            first.clear()
            self._calls.clear()
            with self._recording(first, stop_at_first=index > 0), self._weights(outer), _ignoring_stop():
                self.model.base_model(input_ids=window[None].to(self.device), use_cache=False)
            if index == 0:
                calls = list(self._calls)
                hidden = torch.empty(len(windows), *first[0].shape[1:], dtype=self.dtype, device=self.device)
            assert hidden is not None
            hidden[index] = first[0][0]
        self._calls = calls
        assert hidden is not None
        return hidden

    def forward_block(self, index: int, weights: Mapping[str, Tensor], hidden: Tensor) -> Tensor:
        """Output of block `index`, [1, length, hidden]; `weights` are named relative to the block."""
        arguments, keywords = self._calls[index]
        output = torch.func.functional_call(
            self._blocks[index], dict(weights), (hidden, *arguments), keywords, strict=True
        )
        return output[0] if isinstance(output, tuple) else output

    def gather(
        self, index: int, weights: Mapping[str, Tensor], hidden: Tensor, wanted: Mapping[str, Statistic]
    ) -> None:
        """Run windows [windows, length, hidden] through block `index`, adding linear inputs to `wanted` by layer name.

        The forward pass ends at the last input asked for: the final projection is never multiplied out.
        """
        block = self._blocks[index]
        left = 0

        def hook(statistic: Statistic) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
            def add(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
                nonlocal left
                statistic.add(inputs[0].reshape(-1, inputs[0].shape[-1]))
                left -= 1
                if left == 0:
                    raise _Stop

            return add

        handles = [
            block.get_submodule(name).register_forward_pre_hook(hook(statistic)) for name, statistic in wanted.items()
        ]
        try:
            for window in hidden:
                left = len(wanted)
                with _ignoring_stop():
                    self.forward_block(index, weights, window[None])
        finally:
            for handle in handles:
                handle.remove()

    def finish(self, outer: Mapping[str, Tensor], hidden: Tensor) -> Tensor:
        """What the head reads, [1, length, features], for the last block's output [1, length, hidden]."""
        with self._passing(hidden), self._weights(outer):
            output = self.model.base_model(inputs_embeds=torch.zeros_like(hidden), use_cache=False)
        return output.last_hidden_state

    def logits(self, outer: Mapping[str, Tensor], features: Tensor) -> Tensor:
        """Logits in float32, [..., vocabulary], for what `finish` returned."""
        with self._weights(outer):
            logits = self.model.get_output_embeddings()(features).float()
        cap = self.config.get("final_logit_softcapping")
        return torch.tanh(logits / cap) * cap if cap else logits

    @contextmanager
    def _weights(self, outer: Mapping[str, Tensor]) -> Iterator[None]:
        """The given tensors in place of the parameters outside the blocks."""
        saved: list[tuple[nn.Module, str, nn.Parameter]] = []
        tensors = dict(outer)
        head = self.model.get_output_embeddings()
        embedding = self.model.get_input_embeddings()
        try:
            for name, parameter in self.model.named_parameters(remove_duplicate=False):
                key = self.family.file_name(name)
                if key in tensors:
                    owner, _, last = name.rpartition(".")
                    module = self.model.get_submodule(owner)
                    saved.append((module, last, parameter))
                    module._parameters[last] = nn.Parameter(tensors[key], requires_grad=False)
            if head.weight.is_meta and not embedding.weight.is_meta:  # a tied head
                saved.append((head, "weight", head.weight))
                head._parameters["weight"] = embedding.weight
            yield
        finally:
            for module, name, parameter in reversed(saved):
                module._parameters[name] = parameter

    @contextmanager
    def _recording(self, first: list[Tensor], *, stop_at_first: bool) -> Iterator[None]:
        count = len(self._blocks)

        def record(number: int) -> Callable[..., Tensor]:
            def forward(hidden: Tensor, *arguments: Any, **keywords: Any) -> Tensor:
                if number == 0:
                    first.append(hidden.to(self.dtype))
                self._calls.append((arguments, keywords))
                if stop_at_first or number == count - 1:
                    raise _Stop
                return hidden

            return forward

        with self._replaced_forward(record):
            yield

    @contextmanager
    def _passing(self, result: Tensor) -> Iterator[None]:
        with self._replaced_forward(lambda number: lambda hidden, *arguments, **keywords: result):
            yield

    @contextmanager
    def _replaced_forward(self, make: Callable[[int], Callable[..., Tensor]]) -> Iterator[None]:
        try:
            for number, block in enumerate(self._blocks):
                block.forward = make(number)
            yield
        finally:
            for block in self._blocks:
                del block.forward  # the class's own comes back


@contextmanager
def _ignoring_stop() -> Iterator[None]:
    try:
        yield
    except _Stop:
        return


def build_model(config: Mapping[str, Any], dtype: torch.dtype) -> Any:
    """A `transformers` causal language model with real buffers, parameters on the meta device, evaluation mode."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    plain = {key: value for key, value in config.items() if key not in ("quantization_config", "model_type")}
    built = AutoConfig.for_model(config["model_type"], **plain)
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(built, dtype=dtype)
    return model.eval().requires_grad_(False)


class StoredModel:
    """A checkpoint artifact, opened for reading block by block."""

    def __init__(self, run: Run, artifact: Artifact) -> None:
        import json

        self.reader = ArtifactReader(run.store, artifact)
        self.manifest = self.reader.manifest
        self.config: dict[str, Any] = json.loads(self.reader.file("config.json"))
        self.family = family_of(self.config)
        self.blocks = block_count(self.config)
        self.device = run.device
        self._names: dict[int | None, list[str]] = {}
        for name in self.manifest.tensors:
            self._names.setdefault(self.family.block_of(name), []).append(name)
        missing = [index for index in range(self.blocks) if index not in self._names]
        if missing:
            raise StageError(f"the checkpoint has no tensors for block {missing[0]} of {self.blocks}")

    def __enter__(self) -> StoredModel:
        return self

    def __exit__(self, *_: object) -> None:
        self.reader.__exit__()

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which the checkpoint's unpacked weights are stored: that of its norms."""
        prefix = self.family.block_prefix(0)
        entries = [self.manifest.tensors[name] for name in self._names[0] if "norm" in name.removeprefix(prefix)]
        return torch_dtype(entries[0].dtype)

    @property
    def tied(self) -> bool:
        return is_tied(self.config, self.manifest.tensors)

    def names(self, index: int | None) -> list[str]:
        """Names of the stored tensors of a block, or (None) of those outside the blocks."""
        return self._names.get(index, [])

    def prefetch(self, index: int) -> None:
        """Begin to read a block, if there is one of that number."""
        if index < self.blocks:
            self.reader.prefetch(self.names(index))

    def stored(self, index: int | None) -> dict[str, Tensor]:
        """A block's tensors as they are stored, on the CPU."""
        return self.reader.tensors(self.names(index))

    def outer(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """All tensors outside the blocks, on the device."""
        return {name: tensor.to(self.device, dtype) for name, tensor in self.stored(None).items()}

    def unpack(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
        """Dense weights for stored tensors."""
        return unpack(self.manifest.format, self.manifest.quantization, tensors, dtype, self.device)

    def linear_shapes(self, index: int) -> dict[str, tuple[int, int]]:
        """{full weight name: (out_features, in_features)} of a block's linear layers."""
        prefix = self.family.block_prefix(index)
        return {prefix + name: shape for name, shape in self.family.linear_weights(self.config).items()}

    def linears(self, index: int) -> dict[str, Linear]:
        """{full weight name: what the layer is for}."""
        prefix = self.family.block_prefix(index)
        return {f"{prefix}{linear.name}.weight": linear for linear in self.family.linears}


def resolve_dtype(name: str, model: StoredModel) -> torch.dtype:
    """The compute dtype that a parameter asks for; "auto" is the checkpoint's own."""
    if name == "auto":
        return model.dtype
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


@torch.no_grad()
def run_blocks(
    run: Run,
    model: StoredModel,
    what: str,
    *,
    change: Callable[[Block], Change],
    writer: ArtifactWriter,
    format: str = "dense",
    quantization: Mapping[str, Any] | None = None,
    windows: Tensor | None = None,
    statistic: Callable[[int], Statistic] | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Take every block through `change` and give the results to `writer`.

    what: the activity's name in progress reports ("pruning"). windows: calibration token ids [windows, length];
    without them nothing is propagated. statistic: makes one for in_features, for each distinct input of the linears.
    dtype: of the calibration pass. format, quantization: how the changed tensors are packed.
    """
    dtype = dtype or model.dtype
    hidden: Tensor | None = None
    skeleton: Skeleton | None = None
    model.prefetch(0)
    if windows is not None:
        skeleton = Skeleton(model.config, dtype, run.device)
        hidden = skeleton.embed(model.outer(dtype), windows)
    writer.share(model.manifest, model.names(None))

    for index in range(model.blocks):
        model.prefetch(index + 1)
        stored = model.stored(index)
        prefix = model.family.block_prefix(index)
        linears = model.linears(index)
        statistics: dict[str, Any] = {}
        if skeleton is not None and hidden is not None and statistic is not None:
            dense = _relative(model.unpack(stored, dtype), prefix)
            statistics = gather_statistics(skeleton, index, dense, hidden, linears, statistic)
            del dense
        block = Block(
            index=index,
            prefix=prefix,
            weights={name: stored[name].to(run.device) for name in linears},
            statistics=statistics,
            masks={name: mask.to(run.device) for name, mask in model.reader.masks(model.linear_shapes(index)).items()},
            linears=linears,
        )
        result = change(block)
        del block, statistics
        writer.add_tensors(result.tensors, prefix)
        writer.add_masks(result.masks, prefix)
        kept = [name for name in stored if name not in result.replaced]
        writer.share(model.manifest, kept)

        if skeleton is not None and hidden is not None and index + 1 < model.blocks:
            as_stored = {**{name: stored[name] for name in kept}, **result.tensors}
            dense = _relative(unpack(format, quantization, as_stored, dtype, run.device), prefix)
            for window in hidden:
                window.copy_(skeleton.forward_block(index, dense, window[None])[0])
            del dense, as_stored
        del stored, result
        run.progress(what, index + 1, model.blocks)


def gather_statistics(
    skeleton: Skeleton,
    index: int,
    weights: Mapping[str, Tensor],
    hidden: Tensor,
    linears: Mapping[str, Linear],
    statistic: Callable[[int], Statistic],
) -> dict[str, Statistic]:
    """One pass of the windows through a block: {full weight name: statistic of that layer's input}."""
    by_input: dict[str, Statistic] = {}
    wanted: dict[str, Statistic] = {}
    for linear in linears.values():
        if linear.reads not in by_input:
            by_input[linear.reads] = statistic(weights[f"{linear.name}.weight"].shape[1])
            wanted[linear.name] = by_input[linear.reads]
    skeleton.gather(index, weights, hidden, wanted)
    return {name: by_input[linear.reads] for name, linear in linears.items()}


@torch.no_grad()
def stream_hidden(
    run: Run, model: StoredModel, skeleton: Skeleton, windows: Tensor, what: str
) -> tuple[Tensor, dict[str, Tensor]]:
    """The last block's outputs [windows, length, hidden] for token ids, and the tensors outside the blocks."""
    outer = model.outer(skeleton.dtype)
    model.prefetch(0)
    hidden = skeleton.embed(outer, windows)
    for index in range(model.blocks):
        model.prefetch(index + 1)
        dense = _relative(model.unpack(model.stored(index), skeleton.dtype), model.family.block_prefix(index))
        for window in hidden:
            window.copy_(skeleton.forward_block(index, dense, window[None])[0])
        run.progress(what, index + 1, model.blocks)
    return hidden, outer


def read_windows(run: Run, tokens: Artifact, model: StoredModel) -> Tensor:
    """Token ids [windows, length] of a tokens artifact, checked against the model's vocabulary and context."""
    with ArtifactReader(run.store, tokens) as reader:
        windows = reader.tensors(["input_ids"])["input_ids"].long()
    vocabulary = int(model.config["vocab_size"])
    if int(windows.max()) >= vocabulary:
        raise StageError(
            f"the tokens hold id {int(windows.max())}, beyond the model's vocabulary of {vocabulary}: "
            "they were made with another tokenizer"
        )
    context = int(model.config.get("max_position_embeddings") or windows.shape[1])
    if windows.shape[1] > context:
        raise StageError(
            f"windows of {windows.shape[1]} tokens exceed the model's context of {context}; "
            f"set length to {context} or less"
        )
    return windows


def _relative(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}


__all__: Sequence[str] = (
    "Block", "Change", "Skeleton", "Statistic", "StoredModel", "build_model", "read_windows", "resolve_dtype",
    "run_blocks", "stream_hidden",
)  # fmt: skip
