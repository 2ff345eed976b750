"""Quantization stages: the block loop with a quantizer in it. AWQ, which also changes norms, is in `awq_stage.py`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from math import gcd
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from ...storage.artifacts import Artifact, ArtifactWriter
from ..architectures import family_of
from ..stage import ModelFacts, Parameters, Run, StageError, json_file, stage

if TYPE_CHECKING:
    from torch import Tensor

    from ..blocks import Block, Change, StoredModel

ComputeDtype = Literal["auto", "float32", "bfloat16", "float16"]


class GroupParameters(Parameters):
    """Parameters of all that is stored in GPTQ's format."""

    bits: Literal[2, 3, 4, 8] = Field(4, description="bits of a weight")
    group_size: int = Field(128, description="inputs that share a scale; -1 for a whole row")
    symmetric: bool = Field(True, description="the zero point stands in the middle of the codes")


class GptqParameters(GroupParameters):
    """Parameters of GPTQ."""

    act_order: bool = Field(False, description="quantize the inputs with the largest activations first")
    static_groups: bool = Field(False, description="scales from the original weights, not from the updated ones")
    damping: float = Field(0.01, gt=0, le=1, description="share of the mean diagonal added to the Hessian's diagonal")
    dtype: ComputeDtype = Field("auto", description="of the calibration pass; auto is the checkpoint's own")


class Nf4Parameters(Parameters):
    """Parameters of NF4."""

    block_size: Literal[64, 128, 256, 512, 1024, 2048, 4096] = Field(64, description="weights that share a scale")
    double_quant: bool = Field(False, description="quantize the scales too, to 8 bit")


class Int8Parameters(Parameters):
    """Parameters of LLM.int8()."""

    threshold: float = Field(
        6.0,
        ge=0,
        allow_inf_nan=False,
        description="inputs from this magnitude on are not rounded when the model runs; 0 rounds all",
    )


def check_groups(parameters: GroupParameters, facts: ModelFacts) -> Iterator[str]:
    """Groups must fill the rows of every layer, and codes must fill int32 words both ways."""
    bits, size = parameters.bits, parameters.group_size
    count = 32 // gcd(bits, 32)
    words = bits * count // 32
    if size != -1 and size < 1:
        yield f"group_size {size} is neither positive nor -1 (a whole row)"
        return
    weights = family_of(facts.config).linear_weights(facts.config)
    for name, (rows, columns) in weights.items():
        if size != -1 and columns % size:
            fitting = [n for n in (32, 64, 128, 256) if all(c % n == 0 for _, c in weights.values())]
            advice = f"{' or '.join(map(str, fitting))} would" if fitting else "-1 (a whole row) would"
            yield f"group_size {size} does not divide the {columns} inputs of {name}; {advice}"
            return
        if columns % count or rows % count:
            to_what = "a word" if words == 1 else f"{words} words"
            yield (
                f"{name} is {rows} x {columns}, and {bits}-bit codes are packed {count} to {to_what}, "
                f"which needs both to be multiples of {count}"
            )
            return


def check_nf4(parameters: Nf4Parameters, facts: ModelFacts) -> Iterator[str]:
    """Blocks must end where rows do: bitsandbytes' CPU kernel unpacks others wrongly."""
    for name, (_, columns) in family_of(facts.config).linear_weights(facts.config).items():
        if columns % parameters.block_size:
            yield f"block_size {parameters.block_size} does not divide the {columns} inputs of {name}; 64 is the usual"
            return


def quantized_checkpoint(
    run: Run,
    model: StoredModel,
    change: Callable[[Block], Change],
    settings: Mapping[str, Any],
    what: str = "quantizing",
    **calibration: Any,
) -> Artifact:
    """A model in a packed format after every block went through `change`; it keeps the masks that were there.

    settings: those of the format, which name it. what, calibration: what `run_blocks` is to be given besides.
    """
    from ..blocks import run_blocks

    format = settings["quant_method"]
    with ArtifactWriter(run.store, "checkpoint") as writer:
        writer.share_masks(model.manifest)
        run_blocks(run, model, what, change=change, writer=writer, format=format, quantization=settings, **calibration)
        writer.share_files(model.manifest)
        if format in ("gptq", "awq"):
            writer.add_file("quantize_config.json", json_file(settings))
        writer.add_file("config.json", json_file({**model.config, "quantization_config": settings}))
        return writer.publish(format=format, quantization=settings)


@stage(
    "quantize",
    "rtn",
    version=1,
    parameters=GroupParameters,
    inputs={"model": "checkpoint"},
    output="checkpoint",
    paper="the baseline of Frantar et al. 2022, arXiv:2210.17323",
    check=check_groups,
    after=lambda parameters, facts: replace(facts, format="gptq"),
)
def rtn(run: Run, parameters: GroupParameters, model: Artifact) -> Artifact:
    """Round to nearest: each weight by itself, without data. Stored in GPTQ's format."""
    from ..blocks import Change, StoredModel
    from .gptq_format import pack, quantization_config
    from .grid import round_to_nearest

    asked = parameters.model_dump()
    settings = quantization_config(**asked)

    def change(block: Block) -> Change:
        tensors: dict[str, Tensor] = {}
        for name, weight in block.weights.items():
            solution = round_to_nearest(weight, **asked, keep=block.masks.get(name))
            tensors.update(pack(name.removesuffix(".weight"), solution, settings))
        return Change(tensors, frozenset(block.weights))

    with StoredModel(run, model) as stored:
        return quantized_checkpoint(run, stored, change, settings)


@stage(
    "quantize",
    "gptq",
    version=1,
    parameters=GptqParameters,
    inputs={"model": "checkpoint", "calibration": "tokens"},
    output="checkpoint",
    paper="Frantar et al. 2022, arXiv:2210.17323",
    check=check_groups,
    after=lambda parameters, facts: replace(facts, format="gptq"),
)
def gptq(run: Run, parameters: GptqParameters, model: Artifact, calibration: Artifact) -> Artifact:
    """Second-order quantization: min ||W X - Q X||^2 column by column, each error spread over the columns to come."""
    import torch

    from ..blocks import Change, StoredModel, read_windows, resolve_dtype
    from ..gram import Gram
    from .gptq import solve
    from .gptq_format import pack_together, quantization_config

    settings = quantization_config(
        parameters.bits,
        parameters.group_size,
        parameters.symmetric,
        act_order=parameters.act_order,
        damping=parameters.damping,
    )

    def change(block: Block) -> Change:
        tensors: dict[str, Tensor] = {}
        for names in block.by_input():
            weight = torch.cat([block.weights[name] for name in names])
            try:
                solution = solve(
                    weight,
                    block.statistics[names[0]].matrix(),
                    bits=parameters.bits,
                    group_size=parameters.group_size,
                    symmetric=parameters.symmetric,
                    act_order=parameters.act_order,
                    static_groups=parameters.static_groups,
                    damping=parameters.damping,
                    keep=stacked_masks(block, names),
                )
            except ValueError as error:
                raise StageError(f"GPTQ failed on {names[0]}: {error}") from error
            tensors.update(pack_together({name: block.weights[name] for name in names}, solution, settings))
        return Change(tensors, frozenset(block.weights))

    with StoredModel(run, model) as stored:
        return quantized_checkpoint(
            run,
            stored,
            change,
            settings,
            windows=read_windows(run, calibration, stored),
            statistic=Gram,
            dtype=resolve_dtype(parameters.dtype, stored),
        )


@stage(
    "quantize",
    "nf4",
    version=1,
    parameters=Nf4Parameters,
    inputs={"model": "checkpoint"},
    output="checkpoint",
    paper="Dettmers et al. 2023, arXiv:2305.14314",
    bits_written=6,
    check=check_nf4,
    after=lambda parameters, facts: replace(facts, format="bitsandbytes"),
)
def nf4(run: Run, parameters: Nf4Parameters, model: Artifact) -> Artifact:
    """4-bit NormalFloat: the nearest of 16 quantiles of the normal, scaled by each block's largest magnitude."""
    from ..blocks import Change, StoredModel
    from .nf4_format import pack, quantization_config

    def change(block: Block) -> Change:
        tensors: dict[str, Tensor] = {}
        for name, weight in block.weights.items():
            tensors.update(pack(name, weight, parameters.block_size, parameters.double_quant))
        return Change(tensors, frozenset(block.weights))

    with StoredModel(run, model) as stored:
        dtype = str(stored.dtype).removeprefix("torch.")
        settings = quantization_config(parameters.double_quant, dtype, ["lm_head"])
        return quantized_checkpoint(run, stored, change, settings)


@stage(
    "quantize",
    "int8",
    version=1,
    parameters=Int8Parameters,
    inputs={"model": "checkpoint"},
    output="checkpoint",
    paper="Dettmers et al. 2022, arXiv:2208.07339",
    bits_written=9,
    after=lambda parameters, facts: replace(facts, format="bitsandbytes"),
)
def int8(run: Run, parameters: Int8Parameters, model: Artifact) -> Artifact:
    """LLM.int8(): each row of weights in 127 steps of its largest magnitude; inputs are rounded when the model runs."""
    from ..blocks import Change, StoredModel
    from .int8_format import pack, quantization_config

    def change(block: Block) -> Change:
        tensors: dict[str, Tensor] = {}
        for name, weight in block.weights.items():
            try:
                tensors.update(pack(name, weight))
            except ValueError as error:
                raise StageError(f"LLM.int8() failed on {name}: {error}") from error
        return Change(tensors, frozenset(block.weights))

    with StoredModel(run, model) as stored:
        return quantized_checkpoint(run, stored, change, quantization_config(parameters.threshold, ["lm_head"]))


def stacked_masks(block: Block, names: list[str]) -> Tensor | None:
    """Masks of layers one below the other, True where kept, or None where none of them was pruned."""
    import torch

    if not any(name in block.masks for name in names):
        return None
    return torch.cat([block.masks.get(name, torch.ones_like(block.weights[name], dtype=torch.bool)) for name in names])
