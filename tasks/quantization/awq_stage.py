"""The stage of AWQ: scales into the modules before, clipped outliers, then rounding to the nearest code."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from ...storage.artifacts import Artifact
from ..architectures import family_of, feeding_rows, folds_of
from ..stage import ModelFacts, Run, StageError, stage
from .precision import GroupParameters, check_groups, precision_of
from .stage import ComputeDtype, group_settings, quantized_checkpoint, stacked_masks

if TYPE_CHECKING:
    from torch import Tensor

    from ..blocks import Block
    from .awq import Rounding


class AwqParameters(GroupParameters):
    """Parameters of AWQ."""

    symmetric: bool = Field(False, description="the zero point stands in the middle of the codes")
    clip: bool = Field(True, description="cut outliers off where that makes the error smaller; not of queries and keys")
    format: Literal["gptq", "awq"] = Field("gptq", description="of the checkpoint; awq has 4 bits, asymmetric")
    dtype: ComputeDtype = Field("auto", description="of the calibration pass; auto is the checkpoint's own")


def check_awq(parameters: AwqParameters, facts: ModelFacts) -> Iterator[str]:
    """What the format asks for."""
    if parameters.format == "awq" and (parameters.bits != 4 or parameters.symmetric or parameters.group_size == -1):
        yield "format awq has 4 bits, asymmetric, in groups; with other settings write format: gptq"
        return
    if parameters.format == "awq" and (parameters.overrides or parameters.budget):
        yield "format awq has the same bits and groups in all layers; for overrides or a budget write format: gptq"
        return
    yield from check_groups(parameters, facts)


@stage(
    "quantize",
    "awq",
    version=1,
    parameters=AwqParameters,
    inputs={"model": "checkpoint", "calibration": "tokens"},
    output="checkpoint",
    paper="Lin et al. 2023, arXiv:2306.00978",
    check=check_awq,
    after=lambda parameters, facts: replace(facts, format=parameters.format),
    derived=AwqParameters.sensitivity,
)
def awq(
    run: Run, parameters: AwqParameters, model: Artifact, calibration: Artifact, sensitivity: Artifact | None = None
) -> Artifact:
    """Activation-aware rounding: large inputs are scaled down and the weights that read them up, which then get finer
    steps.

    The scales go into norms and layers before (`architectures.Fold`). Features that no module can take a scale of, such
    as what GELU gives, are left as they are. Query heads that read one key-value head share its values' scales.
    """
    import torch

    from ..blocks import Change, StoredModel, read_windows, resolve_dtype
    from . import awq_format, gptq_format
    from .awq import InputSummary, Rounding, clip
    from .grid import round_to_nearest

    gemm = parameters.format == "awq"

    def rounding_of(name: str) -> Rounding | None:
        precision = precision_of(settings, name.removesuffix(".weight"))
        return None if precision is None else Rounding(*precision, parameters.symmetric)

    def change(block: Block) -> Change:
        roundings = {name: rounding_of(name) for name in block.weights}
        try:
            tensors, scales, exponents = scale_block(block, stored.config, roundings)
        except ValueError as error:
            raise StageError(f"AWQ failed in {block.prefix.rstrip('.')}: {error}") from error
        packed: dict[str, Tensor] = {}
        for names in block.by_input():
            scale = scales[names[0]]
            gram = block.statistics[names[0]].gram() / torch.outer(scale, scale)
            for name in names:
                weight, keep = tensors.pop(name), block.masks.get(name)
                rounding = roundings[name]
                if rounding is None:
                    packed[name] = weight.to(stored.dtype)
                    continue
                if parameters.clip and not block.linears[name].compared:
                    weight = clip(weight, gram, rounding, keep)
                solution = round_to_nearest(weight, **asdict(rounding), keep=keep)
                module = name.removesuffix(".weight")
                packed.update(
                    awq_format.pack(module, solution) if gemm else gptq_format.pack(module, solution, settings)
                )
        changed = {name: tensor for name, tensor in tensors.items() if tensor is not block.rest[name]}
        return Change(
            {**packed, **changed}, frozenset(block.weights) | changed.keys(), notes={"scale_exponent": exponents}
        )

    with StoredModel(run, model) as stored:
        settings = (
            awq_format.quantization_config(parameters.group_size)
            if gemm
            else group_settings(run, parameters, stored, sensitivity)
        )
        return quantized_checkpoint(
            run,
            stored,
            change,
            settings,
            windows=read_windows(run, calibration, stored),
            statistic=InputSummary,
            dtype=resolve_dtype(parameters.dtype, stored),
        )


def scale_block(
    block: Block, config: Mapping[str, Any], roundings: Mapping[str, Rounding | None]
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, float]]:
    """A block after its scales were found and moved: it computes what it did before.

    roundings: of each weight, None for those that are not quantized.
    Returns all its tensors, the linears' weights in float32, the others as they are to be stored; by weight, what its
    inputs were divided by, [in_features] float32; and by weight, the exponent chosen.
    """
    import torch

    from .awq import Stacked, pooled, search_scale
    from .folding import fold_scale, storable_scale

    family, folds = family_of(config), folds_of(config)
    tensors: dict[str, Tensor] = {**{name: weight.float() for name, weight in block.weights.items()}, **block.rest}
    scales: dict[str, Tensor] = {}
    exponents: dict[str, float] = {}
    for names in block.by_input():
        summary = block.statistics[names[0]]
        magnitude = summary.mean_magnitude()
        scale, exponent = torch.ones_like(magnitude), 0.0
        fold = folds.get(block.linears[names[0]].reads)
        if fold is not None:
            norm = block.rest.get(f"{block.prefix}{fold.into}.weight")  # None where it is a linear layer
            scale, exponent = search_scale(
                torch.cat([tensors[name] for name in names]),
                summary.gram(),
                pooled(magnitude, torch.tensor(feeding_rows(config, fold), device=magnitude.device)),
                Stacked(tuple((len(block.weights[name]), roundings[name]) for name in names)),
                stacked_masks(block, names),
                None if norm is None else partial(storable_scale, norm, family.norm_offset),
            )
            fold_scale(tensors, block.prefix, config, fold, scale)
        scales.update(dict.fromkeys(names, scale))
        exponents.update(dict.fromkeys(names, exponent))
    return tensors, scales, exponents
