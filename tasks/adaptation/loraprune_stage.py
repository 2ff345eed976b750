"""LoRAPrune as a stage: low-rank terms learn while heads and FFN channels go, and a smaller dense model is left.

Every block loses as much, so that the checkpoint is as small as it sounds: stock configs know one width for all blocks.
Blocks that are spared, as the published code spares the first tenth and the last, make it stored at full width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from ...storage.artifacts import Artifact, ArtifactWriter
from ..architectures import block_count, family_of, narrowed_config, widths
from ..formats import FORMATS
from ..pruning.gradients import parts_of
from ..pruning.width import Counts, narrow, share_left, uniform_counts
from ..pruning.width_stage import LlmPrunerParameters, check_width, facts_after
from ..stage import ModelFacts, Run, StageError, json_file, stage
from .lora_stage import LoraParameters, check_lora, modules_named, note_training, training_dtype

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from ..blocks import StoredModel
    from .layers import Frozen, Lora
    from .loraprune import Parts
    from .network import Network

_NAMES = {"group": "heads", "channel": "FFN channels"}


class LoraPruneParameters(LoraParameters):
    """Parameters of LoRAPrune."""

    sparsity: float = Field(
        gt=0, lt=1, description="share of all blocks' linear weights removed, blocks that are spared included"
    )
    parts: Literal["all", "attention", "ffn"] = Field(
        "all",
        description="all: heads and FFN channels; attention, ffn: the share of the heads, or of the channels, alone",
    )
    multiple_of: int = Field(
        1, ge=1, description="the FFN width that stays is rounded up to a multiple, as group sizes and processors like"
    )
    spare_first: int = Field(
        0, ge=0, description="so many blocks at the beginning stay whole; in the published code a tenth of them"
    )
    spare_last: int = Field(
        0,
        ge=0,
        description="and so many at the end, there one; the others lose the more, and all are stored at full width",
    )
    every: int = Field(10, ge=1, description="steps between two prunings")
    prune_until: float = Field(
        0.9,
        gt=0.1,  # until when nothing goes
        le=1,
        description="share of the steps after which all is removed; the rest is for recovery, so lower it for few",
    )
    epochs: float = Field(2.0, gt=0, description="how often the data is gone through")
    batch_size: int = Field(128, ge=1, description="windows of one update")
    learning_rate: float = Field(1e-4, gt=0, description="at its peak")
    dropout: float = Field(0.05, ge=0, lt=1, description="share of the inputs that what is added does not see")

    @property
    def width(self) -> LlmPrunerParameters:
        """What is to go, as the other width pruning stages have it."""
        names = {"sparsity", "parts", "multiple_of", "spare_first", "spare_last"}
        return LlmPrunerParameters.model_validate(self.model_dump(include=names))


def check_loraprune(parameters: LoraPruneParameters, facts: ModelFacts) -> Iterator[str]:
    """What width pruning and LoRA ask for; each kind of part needs a term in one of its layers."""
    if facts.masked:
        yield (
            "merging what LoRAPrune learns would make the model's pruned weights dense again; "
            "name the checkpoint from before it was pruned"
        )
        return
    problems = [*check_width(parameters.width, facts), *check_lora(parameters, facts)]
    yield from problems
    if problems or parameters.modules is None:
        return
    wanted, before = modules_named(facts.config, parameters.modules), widths(facts.config)
    layers: dict[str, list[str]] = {"group": [], "channel": []}
    for linear in family_of(facts.config).linears:
        for part, _, _ in parts_of(linear, before):
            layers[part].append(linear.name)
    asked = {"all": ("group", "channel"), "attention": ("group",), "ffn": ("channel",)}[parameters.parts]
    for part in asked:
        if not wanted.intersection(layers[part]):
            short = ", ".join(name.rpartition(".")[2] for name in layers[part])
            yield f"modules: how much {_NAMES[part]} matter is learned from their layers; add one of {short}, or all"


def _after(parameters: LoraPruneParameters, facts: ModelFacts) -> ModelFacts:
    return replace(facts_after(parameters.width, facts), format="dense")


@stage(
    "adapt",
    "loraprune",
    version=1,
    parameters=LoraPruneParameters,
    inputs={"model": "checkpoint", "data": "tokens"},
    output="checkpoint",
    accepts=frozenset(FORMATS),
    paper="Zhang et al. 2023 (LoRAPrune), arXiv:2305.18403",
    check=check_loraprune,
    after=_after,
)
def loraprune(run: Run, parameters: LoraPruneParameters, model: Artifact, data: Artifact) -> Artifact:
    """Width: heads and channels go bit by bit while LoRA learns, whose gradients say which; LoRA is merged at the end.

    Packed weights stay packed until then; the result is dense.
    """
    from ..blocks import StoredModel

    with StoredModel(run, model) as stored:
        network, parts = train_pruned(run, parameters, stored, data)
        return _publish_sliced(run, parameters, stored, network, parts)


def train_pruned(
    run: Run, parameters: LoraPruneParameters, stored: StoredModel, data: Artifact
) -> tuple[Network, Parts]:
    """Train, and prune on the way. Returns the network with its masks, and what is kept."""
    import torch

    from .layers import Lora
    from .loraprune import MaskedInputs, Parts, part_scores, sensitivity, share_of_removal
    from .network import Network
    from .training import read_examples, step_count, train

    before, counts = widths(stored.config), _counts(parameters, stored)
    parts = Parts.whole(stored.blocks, before, run.device)
    wanted = modules_named(stored.config, parameters.modules)
    scale = parameters.alpha / parameters.rank
    pruned = range(parameters.spare_first, stored.blocks - parameters.spare_last)

    def make(name: str, frozen: Frozen, shape: tuple[int, int], mask: Tensor | None) -> nn.Module:
        index = stored.family.block_of(name)
        assert index is not None
        linear = stored.linears(index)[name]
        learns = linear.name in wanted
        layer = Lora(frozen, shape, parameters.rank, scale, parameters.dropout) if learns else frozen
        part = {"query": "group", "width": "channel"}.get(linear.inputs)
        return layer if part is None or index not in pruned else MaskedInputs(layer, parts.kept[part][index])

    torch.manual_seed(parameters.seed)
    examples = read_examples(run, data, stored)
    dtype = training_dtype(parameters.dtype, stored)
    network = Network(run, stored, dtype, make, gradient_checkpointing=parameters.gradient_checkpointing)
    learned = network.learned()
    steps = step_count(parameters, len(examples))

    @torch.no_grad()
    def observe(step: int) -> None:
        for index in pruned:
            total: dict[str, Tensor] = {}
            for name, linear in stored.linears(index).items():
                layer = lora_of(network.layers[name])
                if layer is None or layer.a.grad is None or layer.b.grad is None:
                    continue  # it does not learn, or no token of the batch counts
                weight = layer.frozen.weight_of()
                sensitive = sensitivity(weight, layer.a, layer.b, layer.a.grad, layer.b.grad, layer.scale)
                for part, score in part_scores(linear, sensitive, before).items():
                    total[part] = total[part] + score if part in total else score
            parts.average(index, total)

    def prune(step: int, rate: float) -> None:
        share = share_of_removal(step + 1, steps, parameters.every, parameters.prune_until)
        if share is not None:
            final = Counts(before.groups - counts.groups, before.channels - counts.channels)
            for index in pruned:
                parts.prune(index, Counts(int(final.groups * share), int(final.channels * share)))

    losses = train(
        run,
        learned,
        parameters,
        examples,
        network.loss,
        memory=parts.tensors(),
        before_update=observe,
        after_update=prune,
        may_rise_to=math.log(int(stored.config["vocab_size"])),  # all tokens alike
    )
    note_training(run, parameters, losses, sum(parameter.numel() for parameter in learned.values()))
    return network, parts


def lora_of(layer: nn.Module) -> Lora | None:
    """The low-rank term of a layer that `train_pruned` made, if it has one."""
    from .layers import Lora
    from .loraprune import MaskedInputs

    inner = layer.layer if isinstance(layer, MaskedInputs) else layer
    return inner if isinstance(inner, Lora) else None


def _counts(parameters: LoraPruneParameters, stored: StoredModel) -> Counts:
    """How many groups and channels each block keeps that is not spared."""
    share = parameters.width.share(block_count(stored.config))
    return uniform_counts(widths(stored.config), share, parameters.parts, parameters.multiple_of)


def _publish_sliced(
    run: Run, parameters: LoraPruneParameters, stored: StoredModel, network: Network, parts: Parts
) -> Artifact:
    """The checkpoint with what was learned merged, in its own dtype, and without what was removed."""
    import torch

    from ..blocks import Block

    before = widths(stored.config)
    padded = _counts(parameters, stored) if parameters.width.uniform else Counts(before.groups, before.channels)
    with ArtifactWriter(run.store, "checkpoint") as writer, torch.no_grad():
        writer.share(stored.manifest, stored.names(None))
        for index in range(stored.blocks):
            tensors = stored.stored(index)
            if stored.packed:
                tensors = stored.unpack(tensors, torch.float32)
            linears, left = stored.linears(index), parts.left(index)
            for name in linears:
                tensors[name] = _merged(name, tensors[name].to(run.device), network.layers[name], stored.dtype)
            narrowed = {
                name: tensor.to(stored.dtype) for name, tensor in narrow(tensors, linears, before, left, padded).items()
            }
            masks = {}
            if (len(left.groups), len(left.channels)) != padded:
                every = {name: torch.ones_like(tensors[name], dtype=torch.bool) for name in linears}
                masks = narrow(every, linears, before, left, padded)
            prefix = stored.family.block_prefix(index)
            writer.add_tensors(narrowed, prefix)
            writer.add_masks(masks, prefix)
            writer.share(stored.manifest, [n for n in stored.names(index) if n in tensors and n not in narrowed])
            block = Block(index, prefix, {name: tensors[name] for name in linears}, {}, {}, linears, {})
            run.merge_notes(
                block.removal_notes({name: 1 - share_left(linear, before, left) for name, linear in linears.items()})
            )
        run.note("left", {"groups": padded.groups, "channels": padded.channels})
        writer.share_files(stored.manifest)
        writer.add_file("config.json", json_file(narrowed_config(stored.config, *padded)))
        return writer.publish()


def _merged(name: str, weight: Tensor, layer: nn.Module, dtype: torch.dtype) -> Tensor:
    """W + scale B A, [out_features, in_features] in `dtype`."""
    lora = lora_of(layer)
    if lora is None:
        return weight.to(dtype)
    a, b = lora.factors()
    merged = (weight.float() + b @ a).to(dtype)
    if not bool(merged.isfinite().all()):
        raise StageError(f"{name} is not finite in {dtype}; lower learning_rate")
    return merged
