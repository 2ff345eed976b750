"""Depth pruning: whole blocks go. How much each matters is measured of the dense model, or said by the recipe."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from ...storage.artifacts import Artifact, ArtifactReader, ArtifactWriter
from ..architectures import arranged_config, block_count, family_of
from ..formats import FORMATS
from ..stage import ModelFacts, Parameters, Run, StageError, json_file, stage
from .order import CONFIGURATIONS, CONFIGURED_BLOCKS, parse_order
from .statistics import StreamParameters, measure_blocks, read_blocks, write_blocks

if TYPE_CHECKING:
    from torch import Tensor

    from ..skeleton import Skeleton

PLUS_FIRST, PLUS_LAST = 4, 2  # blocks that Shortened LLaMA's "+" rule keeps
_MOST_COPIES_BYTES = 8e9


class DepthParameters(Parameters):
    """Parameters of depth pruning."""

    blocks: int | None = Field(None, ge=1, description="how many blocks are removed")
    sparsity: float | None = Field(None, gt=0, lt=1, description="share of the blocks removed instead")
    plus: bool = Field(False, description="never remove the first four and the last two blocks")

    @model_validator(mode="after")
    def _one_of_both(self) -> DepthParameters:
        if (self.blocks is None) == (self.sparsity is None):
            raise ValueError("say how much to remove: either 'blocks: 6' or 'sparsity: 0.2'")
        return self

    def count(self, blocks: int) -> int:
        """How many of so many blocks go."""
        return self.blocks if self.blocks is not None else int(blocks * (self.sparsity or 0))


class PlusDepthParameters(DepthParameters):
    """Parameters of depth pruning by weights and gradients, whose papers keep the ends."""

    plus: bool = Field(True, description="never remove the first four and the last two blocks")


class InfluenceParameters(DepthParameters):
    """Parameters of depth pruning with a calibration pass."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="of the calibration pass; auto is the checkpoint's own"
    )


class TaylorDepthParameters(PlusDepthParameters):
    """Parameters of depth pruning by gradients."""

    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="of the passes forward and back; auto is the checkpoint's own"
    )


def check_depth(parameters: DepthParameters, facts: ModelFacts) -> Iterator[str]:
    """Some blocks must go, some must stay, and the rule for the ends must leave enough."""
    blocks = block_count(facts.config)
    count = parameters.count(blocks)
    free = blocks - (PLUS_FIRST + PLUS_LAST if parameters.plus else 1)
    if count == 0:
        yield f"sparsity {parameters.sparsity} of {blocks} blocks is less than one; remove at least 'blocks: 1'"
    elif count > free:
        kept = "with 'plus' the first four and last two stay" if parameters.plus else "one must stay"
        yield f"{count} of {blocks} blocks can't go: {kept}; remove at most {max(free, 0)}"


def least_important(importance: Sequence[float], count: int, plus: bool) -> list[int]:
    """The `count` blocks of lowest importance, in the order of removal; of equal ones the first."""
    free = range(PLUS_FIRST, len(importance) - PLUS_LAST) if plus else range(len(importance))
    return sorted(free, key=lambda block: (importance[block], block))[:count]


def arrange(run: Run, model: Artifact, order: Sequence[int]) -> Artifact:
    """A checkpoint whose blocks are those of `model` in this order. No tensor is read; repeats share their blobs."""
    manifest = run.store.manifest(model)
    config = json.loads(run.store.read_file(model, "config.json"))
    family = family_of(config)
    names: dict[int | None, list[str]] = {}
    for name in manifest.tensors:
        names.setdefault(family.block_of(name), []).append(name)
    with ArtifactWriter(run.store, "checkpoint") as writer:
        writer.share_as(manifest, {name: name for name in names.get(None, [])})
        for new, old in enumerate(order):
            before, after = family.block_prefix(old), family.block_prefix(new)
            writer.share_as(manifest, {after + name.removeprefix(before): name for name in names[old]})
            for name in manifest.masks:  # of packed weights, whose own names are no tensor's
                if name.startswith(before):
                    writer.share_as(manifest, {after + name.removeprefix(before): name})
        writer.share_files(manifest)
        writer.add_file("config.json", json_file(arranged_config(config, order, _layer_types(config))))
        run.note("order", list(order))
        return writer.publish(format=manifest.format, quantization=manifest.quantization)


def _layer_types(config: dict[str, Any]) -> list[str] | None:
    """The kind of attention of each block where `transformers` derives it from the block's number."""
    from transformers import AutoConfig

    plain = {key: value for key, value in config.items() if key not in ("quantization_config", "model_type")}
    return getattr(AutoConfig.for_model(config["model_type"], **plain), "layer_types", None)


def _remove(run: Run, parameters: DepthParameters, model: Artifact, importance: Sequence[float]) -> Artifact:
    removed = least_important(importance, parameters.count(len(importance)), parameters.plus)
    run.note("blocks", [round(value, 6) for value in importance])
    run.note("removed", removed)
    return arrange(run, model, [block for block in range(len(importance)) if block not in removed])


def _after(parameters: DepthParameters, facts: ModelFacts) -> ModelFacts:
    blocks = block_count(facts.config)
    config = arranged_config(facts.config, range(blocks - parameters.count(blocks)))
    return ModelFacts(config, facts.format, facts.masked)


_DEPTH: dict[str, Any] = {"output": "checkpoint", "check": check_depth, "after": _after, "bits_written": 0}
_CALIBRATED: dict[str, Any] = {"model": "checkpoint", "calibration": "tokens"}
_MEASURED: dict[str, Any] = {**_DEPTH, "inputs": _CALIBRATED, "passed_on": frozenset({"calibration"})}


@stage(
    "prune",
    "shortgpt",
    version=1,
    parameters=InfluenceParameters,
    paper="Men et al. 2024 (ShortGPT), arXiv:2403.03853",
    derived=lambda parameters: {"measured": ("statistics/influence", {"dtype": parameters.dtype})},
    **_MEASURED,
)
def shortgpt(run: Run, parameters: InfluenceParameters, model: Artifact, measured: Artifact) -> Artifact:
    """Depth: blocks with the lowest influence, the mean of 1 - cos(input, output) over all tokens, go."""
    return _remove(run, parameters, model, read_blocks(run.store, measured))


@stage(
    "prune",
    "shortened-perplexity",
    version=1,
    parameters=InfluenceParameters,
    paper="Kim et al. 2024 (Shortened LLaMA), arXiv:2402.02834",
    derived=lambda parameters: {"measured": ("statistics/removal", {"dtype": parameters.dtype})},
    **_MEASURED,
)
def shortened_perplexity(run: Run, parameters: InfluenceParameters, model: Artifact, measured: Artifact) -> Artifact:
    """Depth: blocks whose removal, each alone, raises the calibration data's perplexity least go."""
    return _remove(run, parameters, model, read_blocks(run.store, measured))


@stage(
    "prune",
    "shortened-taylor",
    version=1,
    parameters=TaylorDepthParameters,
    paper="Kim et al. 2024 (Shortened LLaMA), eq. 3, arXiv:2402.02834",
    derived=lambda parameters: {"measured": ("statistics/taylor", {"dtype": parameters.dtype})},
    **_MEASURED,
)
def shortened_taylor(run: Run, parameters: TaylorDepthParameters, model: Artifact, measured: Artifact) -> Artifact:
    """Depth: blocks with the lowest sum of |w g| over all their weights go."""
    config = json.loads(run.store.read_file(model, "config.json"))
    names = [f"{family_of(config).block_prefix(index)}block" for index in range(block_count(config))]
    with ArtifactReader(run.store, measured) as reader:
        found = reader.tensors(names)
    return _remove(run, parameters, model, [float(found[name]) for name in names])


@stage(
    "prune",
    "shortened-magnitude",
    version=1,
    parameters=PlusDepthParameters,
    inputs={"model": "checkpoint"},
    paper="Kim et al. 2024 (Shortened LLaMA), section 3.2, arXiv:2402.02834",
    **_DEPTH,
)
def shortened_magnitude(run: Run, parameters: PlusDepthParameters, model: Artifact) -> Artifact:
    """Depth: blocks with the lowest sum of |w| over all their weights go."""
    from ..blocks import StoredModel

    sums = []
    with StoredModel(run, model) as stored:
        for index in range(stored.blocks):
            stored.prefetch(index + 1)
            tensors = stored.stored(index).values()
            sums.append(math.fsum(float(tensor.to(run.device).float().abs().sum()) for tensor in tensors))
            run.progress("measuring", index + 1, stored.blocks)
            run.stop_if_asked()
    return _remove(run, parameters, model, sums)


@stage(
    "statistics",
    "influence",
    version=1,
    parameters=StreamParameters,
    inputs=_CALIBRATED,
    output="statistics",
    paper="Men et al. 2024 (ShortGPT), eq. 1, arXiv:2403.03853",
)
def influence(run: Run, parameters: StreamParameters, model: Artifact, calibration: Artifact) -> Artifact:
    """Each block's influence: the mean over all tokens of 1 - cos(its input, its output)."""
    from torch.nn.functional import cosine_similarity

    from ..blocks import not_finite
    from ..skeleton import parts

    def advances(skeleton: Skeleton, windows: Tensor) -> Callable[[int, dict[str, Tensor], Tensor], dict[str, Any]]:
        def advance(index: int, weights: dict[str, Tensor], hidden: Tensor) -> dict[str, Any]:
            total = 0.0
            for part in parts(hidden):
                inputs = part.to(run.device)
                outputs = skeleton.forward_block(index, weights, inputs)
                total += float((1 - cosine_similarity(inputs.float(), outputs.float(), dim=-1)).double().sum())
                part.copy_(outputs)
            if not math.isfinite(total):
                raise not_finite(f"the activations of block {index}", skeleton.dtype)
            return {"value": total / windows.numel()}

        return advance

    return measure_blocks(run, parameters, model, calibration, advances=advances)


@stage(
    "statistics",
    "removal",
    version=2,
    parameters=StreamParameters,
    inputs=_CALIBRATED,
    output="statistics",
    paper="Kim et al. 2024 (Shortened LLaMA), eq. 4, arXiv:2402.02834",
)
def removal(run: Run, parameters: StreamParameters, model: Artifact, calibration: Artifact) -> Artifact:
    """The calibration data's perplexity without each block alone; one pass carries a copy of the data for each."""
    import torch

    from ..blocks import StoredModel, not_finite, read_windows, resolve_dtype, stream_hidden
    from ..evaluation.perplexity import window_losses
    from ..skeleton import Skeleton

    with StoredModel(run, model) as stored, torch.no_grad():
        windows = read_windows(run, calibration, stored)
        skeleton = Skeleton(stored.config, resolve_dtype(parameters.dtype, stored), run.device)
        count, blocks = len(windows), stored.blocks
        nbytes = (blocks + 1) * windows.numel() * int(stored.config["hidden_size"]) * skeleton.dtype.itemsize
        if nbytes > _MOST_COPIES_BYTES:
            raise StageError(
                f"the activations of {count} windows of {windows.shape[1]} tokens without each of {blocks} blocks take "
                f"{nbytes / 1e9:.0f} GB; use fewer or shorter windows (the paper has 10 of 128 tokens)"
            )

        def advance(index: int, weights: dict[str, Tensor], hidden: Tensor) -> dict[str, Any]:
            # Copy b is without block b, the last copy has them all: until block b the two are the same.
            whole = hidden[blocks * count :]
            hidden[index * count : (index + 1) * count] = whole
            if index:
                skeleton.advance(index, weights, hidden[: index * count])
            skeleton.advance(index, weights, whole)
            return {}

        copies = windows.repeat(blocks + 1, 1)
        hidden, outer, _ = stream_hidden(run, stored, skeleton, copies, "measuring", advance=advance)
        values = []
        for index, part in enumerate(hidden[: blocks * count].split(count)):
            losses = window_losses(skeleton, outer, windows, part, run.device)
            values.append(math.exp(min(math.fsum(losses) / count, 700.0)))
            run.progress("scoring", index + 1, blocks)
            run.stop_if_asked()
    if not all(math.isfinite(value) for value in values):
        raise not_finite("the loss without a block", skeleton.dtype)
    return write_blocks(run, values)


class ArrangeParameters(Parameters):
    """Parameters of arranging blocks."""

    remove: tuple[int, ...] | None = Field(None, description="numbers of the blocks left out, from 0 on: [21, 22]")
    order: str | tuple[int, ...] | None = Field(
        None, description="or the blocks in the order they run: [0, 1, 1, 2], '0-23 27-31', '0-5 14-18x2 19-31'"
    )
    configuration: str | None = Field(None, description="or one of Franken-LLaMA's configurations, by name")

    @model_validator(mode="after")
    def _one_of_three(self) -> ArrangeParameters:
        given = [name for name in ("remove", "order", "configuration") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                "say which blocks run: one of 'remove: [21, 22]', 'order: \"0-5 14-18x2 19-31\"', 'configuration: …'"
            )
        if isinstance(self.order, str):
            parse_order(self.order)
        if self.order is not None and not self.order:
            raise ValueError("order names no block")
        if self.remove is not None and (not self.remove or len(set(self.remove)) < len(self.remove)):
            raise ValueError("remove must name at least one block, and each once")
        if self.configuration is not None and self.configuration not in CONFIGURATIONS:
            from ..catalogue import did_you_mean

            meant = did_you_mean(self.configuration, list(CONFIGURATIONS))
            raise ValueError(f"unknown configuration '{self.configuration}'; {meant}")
        return self

    def blocks_of(self, blocks: int) -> list[int]:
        """The blocks in the order they run, for a model of so many."""
        if self.remove is not None:
            return [block for block in range(blocks) if block not in self.remove]
        if self.configuration is not None:
            return parse_order(CONFIGURATIONS[self.configuration])
        return parse_order(self.order) if isinstance(self.order, str) else list(self.order or ())


def _check_arrangement(parameters: ArrangeParameters, facts: ModelFacts) -> Iterator[str]:
    blocks = block_count(facts.config)
    if parameters.configuration is not None and blocks != CONFIGURED_BLOCKS:
        yield (
            f"configuration '{parameters.configuration}' is for models of {CONFIGURED_BLOCKS} blocks, but this one has "
            f"{blocks}; say 'order' instead"
        )
        return
    named = parameters.remove if parameters.remove is not None else parameters.blocks_of(blocks)
    wrong = [block for block in named if not 0 <= block < blocks]
    if wrong:
        yield f"block {wrong[0]} is out of range: the model has blocks 0 to {blocks - 1}"
    elif not parameters.blocks_of(blocks):
        yield f"remove names all {blocks} blocks; one must stay"


@stage(
    "layers",
    "arrange",
    version=1,
    parameters=ArrangeParameters,
    inputs={"model": "checkpoint"},
    output="checkpoint",
    paper="for its configurations the study Franken-LLaMA, 2024",
    accepts=frozenset(FORMATS),
    bits_written=0,
    check=_check_arrangement,
    after=lambda parameters, facts: ModelFacts(
        arranged_config(facts.config, parameters.blocks_of(block_count(facts.config))), facts.format, facts.masked
    ),
)
def arrange_blocks(run: Run, parameters: ArrangeParameters, model: Artifact) -> Artifact:
    """The model's blocks left out, repeated or in another order; repeats share their weights in the store."""
    config = json.loads(run.store.read_file(model, "config.json"))
    return arrange(run, model, parameters.blocks_of(block_count(config)))
