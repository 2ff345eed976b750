"""The width pruning stages: heads and FFN channels go, and a smaller dense model is left.

Where every block keeps as much, the checkpoint is as small as it sounds. Stock configs know one width for all blocks:
where blocks keep different widths, all are stored as wide as the widest, filled up with zeros that a mask covers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from ...storage.artifacts import Artifact, ArtifactReader, ArtifactWriter
from ..architectures import (
    UnsupportedModel,
    Widths,
    block_count,
    family_of,
    has_biases,
    narrowed_config,
    widths,
)
from ..stage import ModelFacts, Parameters, Run, json_file, stage
from .width import (
    Counts,
    Left,
    best_of_structure,
    bias_of,
    features_left,
    group_scores,
    highest,
    magnitude_sp_score,
    narrow,
    removed_output,
    share_left,
    uniform_counts,
)

if TYPE_CHECKING:
    from torch import Tensor

    from ..blocks import Block


class NarrowingParameters(Parameters):
    """Parameters of all that makes blocks narrower."""

    multiple_of: int = Field(
        1, ge=1, description="the FFN width that stays is rounded up to a multiple, as group sizes and processors like"
    )

    @property
    def biased(self) -> tuple[str, ...]:
        """Modules within the blocks that get biases."""
        return ()


class WidthParameters(NarrowingParameters):
    """Parameters of width pruning."""

    sparsity: float = Field(gt=0, lt=1, description="share of the blocks' linear weights removed, between 0 and 1")
    parts: Literal["all", "attention", "ffn"] = Field(
        "all",
        description="all: heads and FFN channels; attention, ffn: the share of the heads, or of the channels, alone",
    )

    @property
    def uniform(self) -> bool:
        """Whether every block keeps as much."""
        return True

    def counts(self, before: Widths) -> Counts:
        """How many groups and channels each block keeps, of those there are."""
        return uniform_counts(before, self.sparsity, self.parts, self.multiple_of)


class CalibratedWidthParameters(WidthParameters):
    """Parameters of width pruning with a calibration pass."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="of the calibration pass; auto is the checkpoint's own"
    )


class FlapParameters(CalibratedWidthParameters):
    """Parameters of FLAP."""

    structure: Literal["UL-UM", "AL-MM", "AL-AM"] = Field(
        "UL-UM",
        description="UL-UM: every block gets equally narrow; AL-MM: heads of all blocks compete, and channels; AL-AM: "
        "heads and channels of all blocks do, as in the paper; both are stored as wide as the widest block",
    )
    metric: Literal["WIFV", "IFV", "WIFN"] = Field(
        "WIFV", description="weighted input fluctuation, the fluctuation alone, or weighted input norm"
    )
    bias: bool = Field(True, description="add what the removed parts contribute on average as a bias")

    @model_validator(mode="after")
    def _structure_of_parts(self) -> FlapParameters:
        if self.parts == "attention" and not self.uniform:
            raise ValueError(f"structure {self.structure} is for parts all and ffn; leave it out")
        return self

    def statistics(self) -> dict[str, tuple[str, dict[str, Any]]]:
        """The input that it asks for."""
        return {"measured": ("statistics/fluctuation", {"metric": self.metric, "dtype": self.dtype})}

    @property
    def uniform(self) -> bool:
        return self.structure == "UL-UM"

    @property
    def biased(self) -> tuple[str, ...]:
        if not self.bias:
            return ()
        return {"all": ("self_attn", "mlp"), "attention": ("self_attn",), "ffn": ("mlp",)}[self.parts]


class LlmPrunerParameters(WidthParameters):
    """Parameters of LLM-Pruner."""

    importance: Literal["param_first", "param_second", "param_mix", "vectorize"] = Field(
        "param_first", description="|w g|, w^2 g^2, |w g - w^2 g^2 / 2|, or |sum w g| of the weights of a part"
    )
    spare_first: int = Field(0, ge=0, description="so many blocks at the beginning stay as they are")
    spare_last: int = Field(
        0, ge=0, description="and so many at the end; the others lose the more, and the model is stored at full width"
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="of the passes forward and back; auto is the checkpoint's own"
    )

    def statistics(self) -> dict[str, tuple[str, dict[str, Any]]]:
        """The input that it asks for."""
        return {"measured": ("statistics/taylor", {"dtype": self.dtype})}

    @property
    def uniform(self) -> bool:
        return not self.spare_first and not self.spare_last

    def share(self, blocks: int) -> float:
        """The share removed of each block that is not spared."""
        return self.sparsity * blocks / max(1, blocks - self.spare_first - self.spare_last)


def check_width(parameters: WidthParameters, facts: ModelFacts) -> Iterator[str]:
    """The family must be able to lose heads; the counts left must be ones that a stock config can say."""
    family, before = family_of(facts.config), widths(facts.config)
    if not before.groups and parameters.parts != "ffn":
        yield f"{family.name} models can't lose heads here; set parts to ffn"
        return
    if isinstance(parameters, LlmPrunerParameters):
        blocks = block_count(facts.config)
        if parameters.spare_first + parameters.spare_last >= blocks:
            yield f"spare_first and spare_last leave none of the {blocks} blocks to prune"
            return
        if parameters.share(blocks) >= 1:
            yield (
                f"sparsity {parameters.sparsity} is more than the {blocks} blocks that are not spared can lose; "
                "spare fewer, or lower it"
            )
            return
    yield from _check_counts(parameters, before, block_count(facts.config))
    try:
        _config_after(parameters, facts)
    except UnsupportedModel as error:
        yield str(error)


def _check_counts(parameters: WidthParameters, before: Widths, blocks: int) -> Iterator[str]:
    """Something must go, and as much as was asked must be there to go."""
    share = parameters.share(blocks) if isinstance(parameters, LlmPrunerParameters) else parameters.sparsity
    counts = uniform_counts(before, share, parameters.parts, parameters.multiple_of)
    if counts == (before.groups, before.channels):
        yield (
            f"sparsity {share:g} of {before.groups} groups of heads and {before.channels} channels removes none "
            f"(parts {parameters.parts}, multiple_of {parameters.multiple_of}); ask for more, or set parts to ffn"
        )
    elif parameters.parts == "all" and counts.channels == min(parameters.multiple_of, before.channels):
        gone = (before.groups - counts.groups) * before.group_weights
        gone += (before.channels - counts.channels) * before.channel_weights
        if share * before.weights - gone > parameters.multiple_of * before.channel_weights:
            yield (
                f"sparsity {share:g} can't be met: {counts.groups} of {before.groups} groups of heads stay, and "
                f"without all channels but {counts.channels} that is {gone / before.weights:.3f}; lower it"
            )


def _config_after(parameters: WidthParameters, facts: ModelFacts) -> dict[str, Any]:
    """The config when every block keeps as much; otherwise the widest there can be."""
    before = widths(facts.config)
    counts = parameters.counts(before) if parameters.uniform else Counts(before.groups, before.channels)
    return narrowed_config(facts.config, *counts, biased=new_biases(parameters, facts.config))


def new_biases(parameters: NarrowingParameters, config: Mapping[str, Any]) -> tuple[str, ...]:
    """Modules that get biases which the model has not had."""
    return () if has_biases(config) else parameters.biased


def facts_after(parameters: WidthParameters, facts: ModelFacts) -> ModelFacts:
    """The facts of the narrower checkpoint; blocks of widths of their own are taken as wide as they can get."""
    masked = facts.masked or not parameters.uniform
    return ModelFacts(_config_after(parameters, facts), facts.format, masked)


def narrow_blocks(
    run: Run,
    parameters: WidthParameters,
    model: Artifact,
    choose: Callable[[Block], Left],
    *,
    padded: Counts,
    calibration: Artifact | None = None,
    dtype: str = "auto",
    means: Callable[[Block], dict[str, Tensor]] | None = None,
) -> Artifact:
    """The block loop with `choose` in it. means: of the inputs, by layer, for the biases that make up for them."""
    import torch

    from ..blocks import Change, StoredModel, read_windows, resolve_dtype, run_blocks
    from .criteria import InputNorm

    with StoredModel(run, model) as stored, ArtifactWriter(run.store, "checkpoint") as writer:
        before = widths(stored.config)
        biased = new_biases(parameters, stored.config)

        def change(block: Block) -> Change:
            left = choose(block)
            tensors = {**block.weights, **block.rest}
            for name, mean in (means(block) if means else {}).items():
                kept = features_left(block.linears[name].inputs, before, left)
                assert kept is not None
                bias = removed_output(block.weights[name], mean, kept)
                bias += tensors.get(bias_of(name), 0)
                tensors[bias_of(name)] = bias.to(block.weights[name].dtype)
            for name, linear in block.linears.items():
                if linear.name.split(".")[0] in biased and bias_of(name) not in tensors:
                    tensors[bias_of(name)] = block.weights[name].new_zeros(len(block.weights[name]))
            masks = dict(block.masks)
            if (len(left.groups), len(left.channels)) != padded:
                every = {name: torch.ones(weight.shape, dtype=torch.bool) for name, weight in block.weights.items()}
                masks = {**every, **masks}
            narrowed = narrow(tensors, block.linears, before, left, padded)
            removed = {name: 1 - share_left(linear, before, left) for name, linear in block.linears.items()}
            return Change(
                narrowed,
                frozenset(narrowed),
                narrow(masks, block.linears, before, left, padded),
                block.removal_notes(removed),
            )

        run_blocks(
            run,
            stored,
            "pruning",
            change=change,
            writer=writer,
            windows=read_windows(run, calibration, stored) if calibration is not None else None,
            statistic=InputNorm if calibration is not None else None,
            dtype=resolve_dtype(dtype, stored),
        )
        run.note("left", {"groups": padded.groups, "channels": padded.channels})
        writer.share_files(stored.manifest)
        config = narrowed_config(stored.config, *padded, biased=biased)
        writer.add_file("config.json", json_file(config))
        return writer.publish()


def written_layers(block: Block) -> dict[str, str]:
    """{what its input is made of ("query", "width"): weight} of the layers that write to the residual stream."""
    return {linear.inputs: name for name, linear in block.linears.items() if linear.inputs in ("query", "width")}


def _by_score(
    parameters: WidthParameters, config: Mapping[str, Any], score: Callable[[Block, str], Tensor]
) -> Callable[..., Left]:
    """The highest sums stay; score(block, weight's name) gives one for each input of a layer."""
    before = widths(config)
    counts = parameters.counts(before)

    def choose(block: Block) -> Left:
        layers = written_layers(block)
        heads = group_scores(score(block, layers["query"]).cpu(), before) if before.groups else None
        return best_left(heads, score(block, layers["width"]).cpu(), counts, before)

    return choose


def best_left(heads: Tensor | None, channels: Tensor, counts: Counts, before: Widths) -> Left:
    import torch

    if heads is None or counts.groups == before.groups:
        groups = torch.arange(before.groups)
    else:
        groups = highest(heads, counts.groups)
    return Left(groups, highest(channels, counts.channels))


def config_of(run: Run, model: Artifact) -> dict[str, Any]:
    config: dict[str, Any] = json.loads(run.store.read_file(model, "config.json"))
    return config


# What the stages of width pruning have in common.
WIDTH: dict[str, Any] = {"output": "checkpoint", "check": check_width, "after": facts_after}
CALIBRATED: dict[str, Any] = {**WIDTH, "inputs": {"model": "checkpoint", "calibration": "tokens"}}
_MEASURED: dict[str, Any] = {**CALIBRATED, "passed_on": frozenset({"calibration"})}


@stage(
    "prune",
    "magnitude-sp",
    version=1,
    parameters=WidthParameters,
    inputs={"model": "checkpoint"},
    paper="the baseline of An et al. 2023, arXiv:2312.11983",
    **WIDTH,
)
def magnitude_sp(run: Run, parameters: WidthParameters, model: Artifact) -> Artifact:
    """Width: heads and FFN channels with the lowest sums of ||W_:j||_2 over the columns that read them go."""
    config = config_of(run, model)
    choose = _by_score(parameters, config, lambda block, name: magnitude_sp_score(block.weights[name]))
    counts = parameters.counts(widths(config))
    return narrow_blocks(run, parameters, model, choose, padded=counts)


@stage(
    "prune",
    "flap",
    version=2,
    parameters=FlapParameters,
    paper="An et al. 2023 (FLAP), arXiv:2312.11983",
    derived=FlapParameters.statistics,
    **_MEASURED,
)
def flap(run: Run, parameters: FlapParameters, model: Artifact, measured: Artifact) -> Artifact:
    """Width: heads and channels whose inputs vary least, Var(X_j) sum_i W_ij^2, go; a bias keeps their mean."""
    import torch

    config = config_of(run, model)
    family, before, blocks = family_of(config), widths(config), block_count(config)
    with ArtifactReader(run.store, measured) as reader:
        prefixes = [family.block_prefix(index) for index in range(blocks)]

        def stacked(key: str) -> Tensor:
            found = reader.tensors([prefix + key for prefix in prefixes])
            return torch.stack([found[prefix + key] for prefix in prefixes])

        ffn = stacked("score.width")
        attention = torch.zeros(blocks, 0) if parameters.parts == "ffn" else stacked("score.query")
        if parameters.parts == "attention":
            counts = parameters.counts(before)
            left = [
                best_left(group_scores(heads.square(), before), torch.ones(before.channels), counts, before)
                for heads in attention
            ]
        else:
            left = best_of_structure(
                attention, ffn, before, parameters.sparsity, parameters.structure, parameters.multiple_of
            )
        widest = Counts(max(len(one.groups) for one in left), max(len(one.channels) for one in left))
        padded = allowed_counts(config, widest, before, parameters)

        def means(block: Block) -> dict[str, Tensor]:
            layers = written_layers(block)
            words = {"all": ("query", "width"), "attention": ("query",), "ffn": ("width",)}[parameters.parts]
            found = reader.tensors([f"{block.prefix}mean.{word}" for word in words])
            return {layers[word]: found[f"{block.prefix}mean.{word}"] for word in words}

        return narrow_blocks(
            run,
            parameters,
            model,
            lambda block: left[block.index],
            padded=padded,
            means=means if parameters.bias else None,
        )


def allowed_counts(
    config: Mapping[str, Any], widest: Counts, before: Widths, parameters: NarrowingParameters
) -> Counts:
    """The least widths, from those of the widest block on, that a stock config can say."""
    multiple = parameters.multiple_of
    channels = min(-(-widest.channels // multiple) * multiple, before.channels)
    for groups in range(widest.groups, before.groups):
        try:
            narrowed_config(config, groups, channels, biased=new_biases(parameters, config))
        except UnsupportedModel:
            continue
        return Counts(groups, channels)
    return Counts(before.groups, channels)


@stage(
    "prune",
    "llm-pruner",
    version=1,
    parameters=LlmPrunerParameters,
    paper="Ma et al. 2023 (LLM-Pruner), arXiv:2305.11627",
    derived=LlmPrunerParameters.statistics,
    **_MEASURED,
)
def llm_pruner(run: Run, parameters: LlmPrunerParameters, model: Artifact, measured: Artifact) -> Artifact:
    """Width: heads and channels that the loss needs least by Taylor's estimate, sum |w g| over their weights, go."""
    import torch

    config = config_of(run, model)
    before, blocks = widths(config), block_count(config)
    share = parameters.share(blocks)
    counts = uniform_counts(before, share, parameters.parts, parameters.multiple_of)
    whole = Left(torch.arange(before.groups), torch.arange(before.channels))
    with ArtifactReader(run.store, measured) as reader:

        def choose(block: Block) -> Left:
            if not parameters.spare_first <= block.index < blocks - parameters.spare_last:
                return whole
            names = {part: f"{block.prefix}{part}.{parameters.importance}" for part in ("group", "channel")}
            found = reader.tensors([name for name in names.values() if name in reader.manifest.tensors])
            return best_left(found.get(names["group"]), found[names["channel"]], counts, before)

        padded = counts if parameters.uniform else Counts(before.groups, before.channels)
        return narrow_blocks(run, parameters, model, choose, padded=padded)
