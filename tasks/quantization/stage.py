"""Quantization stages: the block loop with a quantizer in it. AWQ, which also changes norms, is in `awq_stage.py`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from ...storage.artifacts import Artifact, ArtifactWriter
from ..architectures import family_of
from ..stage import ModelFacts, Parameters, Run, StageError, json_file, stage
from .precision import GroupParameters, Precision, check_groups, precision_of

if TYPE_CHECKING:
    from torch import Tensor

    from ..blocks import Block, Change, StoredModel

ComputeDtype = Literal["auto", "float32", "bfloat16", "float16"]


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


def group_settings(
    run: Run, parameters: GroupParameters, model: StoredModel, sensitivity: Artifact | None, **further: Any
) -> dict[str, Any]:
    """The settings of GPTQ's format, with the precision of each layer that `parameters` ask for.

    sensitivity: the losses by which a budget is spent. further: what `quantization_config` takes besides. The plan goes
    into the notes where layers differ.
    """
    from .gptq_format import quantization_config
    from .precision import bits_of_block, dynamic_of

    if parameters.budget is None:
        usual = Precision(parameters.bits, parameters.group_size)
        if not parameters.overrides:
            return quantization_config(*usual, parameters.symmetric, **further)
        plan = parameters.precisions(model.config)
    else:
        from .sensitivity import plan_for_budget

        assert sensitivity is not None
        plan = plan_for_budget(run.store, sensitivity, parameters, model.config)
        usual = max(dict.fromkeys(plan.values()), key=list(plan.values()).count)
    run.note("precision", {module: precision._asdict() for module, precision in plan.items()})
    run.note("bits_of_block", bits_of_block(plan, model.config))
    return quantization_config(*usual, parameters.symmetric, **further, dynamic=dynamic_of(plan, usual, model.config))


def by_precision(block: Block, settings: Mapping[str, Any]) -> Iterator[tuple[Precision | None, list[str]]]:
    """The block's weights, those together that read the same input and get the same precision; None: none at all."""
    for names in block.by_input():
        alike: dict[Precision | None, list[str]] = {}
        for name in names:
            alike.setdefault(precision_of(settings, name.removesuffix(".weight")), []).append(name)
        yield from alike.items()


@stage(
    "quantize",
    "rtn",
    version=1,
    parameters=GroupParameters,
    inputs={"model": "checkpoint", "calibration": "tokens"},
    passed_on=frozenset({"calibration"}),
    output="checkpoint",
    paper="the baseline of Frantar et al. 2022, arXiv:2210.17323",
    check=check_groups,
    after=lambda parameters, facts: replace(facts, format="gptq"),
    derived=GroupParameters.sensitivity,
)
def rtn(run: Run, parameters: GroupParameters, model: Artifact, sensitivity: Artifact | None = None) -> Artifact:
    """Round to nearest: each weight by itself, without data. Stored in GPTQ's format."""
    from ..blocks import Change, StoredModel
    from .gptq_format import pack
    from .grid import round_to_nearest

    def change(block: Block) -> Change:
        tensors: dict[str, Tensor] = {}
        replaced = set()
        for name, weight in block.weights.items():
            module = name.removesuffix(".weight")
            precision = precision_of(settings, module)
            if precision is None:
                continue
            solution = round_to_nearest(
                weight, **precision._asdict(), symmetric=parameters.symmetric, keep=block.masks.get(name)
            )
            tensors.update(pack(module, solution, settings))
            replaced.add(name)
        return Change(tensors, frozenset(replaced))

    with StoredModel(run, model) as stored:
        settings = group_settings(run, parameters, stored, sensitivity)
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
    derived=GptqParameters.sensitivity,
)
def gptq(
    run: Run, parameters: GptqParameters, model: Artifact, calibration: Artifact, sensitivity: Artifact | None = None
) -> Artifact:
    """Second-order quantization: min ||W X - Q X||^2 column by column, each error spread over the columns to come."""
    import torch

    from ..blocks import Change, StoredModel, read_windows, resolve_dtype
    from ..gram import Gram
    from .gptq import solve
    from .gptq_format import pack_together

    def change(block: Block) -> Change:
        tensors: dict[str, Tensor] = {}
        replaced: set[str] = set()
        for precision, names in by_precision(block, settings):
            if precision is None:
                continue
            weight = torch.cat([block.weights[name] for name in names])
            try:
                solution = solve(
                    weight,
                    block.statistics[names[0]].matrix(),
                    **precision._asdict(),
                    symmetric=parameters.symmetric,
                    act_order=parameters.act_order,
                    static_groups=parameters.static_groups,
                    damping=parameters.damping,
                    keep=stacked_masks(block, names),
                )
            except ValueError as error:
                raise StageError(f"GPTQ failed on {names[0]}: {error}") from error
            tensors.update(pack_together({name: block.weights[name] for name in names}, solution, settings))
            replaced.update(names)
        return Change(tensors, frozenset(replaced))

    with StoredModel(run, model) as stored:
        settings = group_settings(
            run, parameters, stored, sensitivity, act_order=parameters.act_order, damping=parameters.damping
        )
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
