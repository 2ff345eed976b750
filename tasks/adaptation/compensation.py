"""The compensation stages: the block loop with a low-rank term for what compression took away, as an adapter."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from ...storage.artifacts import Artifact, ArtifactWriter
from ..architectures import block_count, family_of
from ..formats import FORMATS
from ..stage import ModelFacts, Parameters, Run, StageError, json_file, stage
from . import peft_format

if TYPE_CHECKING:
    from torch import Tensor

    from ..blocks import Block, StoredModel
    from .eora import Factors


_ADVICE = "name the dense checkpoint that the model's weights come from one by one"


class SvdParameters(Parameters):
    """Parameters of plain SVD."""

    rank: int = Field(128, ge=1, description="of the term added to each linear weight")


class EoraParameters(SvdParameters):
    """Parameters of EoRA."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="of the calibration pass; auto is the checkpoint's own"
    )


def check_compensation(parameters: SvdParameters, facts: ModelFacts) -> Iterator[str]:
    """Every layer must have room for the rank, and the original a weight of the same shape."""
    weights = family_of(facts.config).linear_weights(facts.config)
    largest = min(min(shape) for shape in weights.values())
    for name, (rows, columns) in weights.items():
        if parameters.rank > min(rows, columns):
            yield f"rank {parameters.rank} is above a dimension of {name}, {rows} x {columns}; {largest} is the most"
            break
    original = facts.original
    if original is None:
        return
    if original.format != "dense":
        yield f"'original' is packed ({original.format}); name the checkpoint from before it was quantized"
        return
    theirs = family_of(original.config).linear_weights(original.config)
    counts = block_count(facts.config), block_count(original.config)
    if counts[0] != counts[1]:
        yield f"the model has {counts[0]} blocks and 'original' {counts[1]}, but each needs its counterpart; {_ADVICE}"
    for name, shape in weights.items():
        if theirs.get(name) != shape:
            other = " x ".join(map(str, theirs[name])) if name in theirs else "not there"
            yield f"{name} is {shape[0]} x {shape[1]} in the model and {other} in 'original'; {_ADVICE}"
            return


@stage(
    "compensate",
    "eora",
    version=1,
    parameters=EoraParameters,
    inputs={"model": "checkpoint", "original": "checkpoint", "calibration": "tokens"},
    output="adapter",
    accepts=frozenset(FORMATS),
    paper="Liu et al. 2024 (EoRA), arXiv:2410.21271",
    check=check_compensation,
)
def eora(run: Run, parameters: EoraParameters, model: Artifact, original: Artifact, calibration: Artifact) -> Artifact:
    """The low-rank term beside each compressed weight that brings the layer's outputs closest to the original's."""
    from ..blocks import read_windows, resolve_dtype
    from ..gram import Gram
    from . import eora as maths

    def factors(block: Block) -> Iterator[tuple[str, Factors]]:
        for names in block.by_input():
            try:
                inputs = maths.eigenspace(block.statistics[names[0]].matrix())
            except ValueError as error:
                raise StageError(f"EoRA failed on {names[0]}: {error}") from error
            for name in names:
                yield name, maths.eora(_difference(block, name), inputs, parameters.rank)

    def calibrated(stored: StoredModel) -> dict[str, Any]:
        return {
            "windows": read_windows(run, calibration, stored),
            "statistic": Gram.in_float64,
            "dtype": resolve_dtype(parameters.dtype, stored),
        }

    return _compensate(run, parameters, model, original, factors, calibrated)


@stage(
    "compensate",
    "svd",
    version=1,
    parameters=SvdParameters,
    inputs={"model": "checkpoint", "original": "checkpoint"},
    output="adapter",
    accepts=frozenset(FORMATS),
    paper="Eckart and Young 1936; the baseline of Liu et al. 2024 (EoRA), arXiv:2410.21271",
    check=check_compensation,
)
def svd(run: Run, parameters: SvdParameters, model: Artifact, original: Artifact) -> Artifact:
    """The low-rank term beside each compressed weight that brings it closest to the original; no calibration."""
    from . import eora as maths

    def factors(block: Block) -> Iterator[tuple[str, Factors]]:
        for name in block.weights:
            yield name, maths.svd(_difference(block, name), parameters.rank)

    return _compensate(run, parameters, model, original, factors, lambda stored: {})


def _compensate(
    run: Run,
    parameters: SvdParameters,
    model: Artifact,
    original: Artifact,
    factors: Callable[[Block], Iterator[tuple[str, Factors]]],
    calibrated: Callable[[StoredModel], Mapping[str, Any]],
) -> Artifact:
    """The adapter of `model` with the factors of all its weights, stored in the checkpoint's dtype.

    calibrated: further arguments of `run_blocks`.
    """
    from ..blocks import Change, StoredModel, run_blocks

    with (
        StoredModel(run, model) as stored,
        StoredModel(run, original) as dense,
        ArtifactWriter(run.store, "adapter") as writer,
    ):

        def change(block: Block) -> Change:
            tensors: dict[str, Tensor] = {}
            for name, term in factors(block):
                tensors.update(peft_format.pack(name, term.a.to(stored.dtype), term.b.to(stored.dtype)))
            return Change(tensors, frozenset())

        run_blocks(
            run,
            stored,
            "compensating",
            change=change,
            writer=writer,
            format=stored.manifest.format,
            quantization=stored.manifest.quantization,
            original=dense,
            **calibrated(stored),
        )
        ranks = {
            name.removesuffix(".weight"): parameters.rank
            for index in range(stored.blocks)
            for name in stored.linears(index)
        }
        writer.add_file(peft_format.CONFIG, json_file(peft_format.adapter_config(stored.family, stored.blocks, ranks)))
        return writer.publish(base=model.id)


def _difference(block: Block, name: str) -> Tensor:
    """W - W_c in float64, [out_features, in_features]."""
    return block.originals[name].double() - block.weights[name].double()
