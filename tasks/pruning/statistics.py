"""What allocations need to know of a dense model, as cached `statistics` artifacts: one pass of the windows through it.

They do not depend on how much is pruned, so one artifact feeds every stage that allocates by it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from ...storage.artifacts import Artifact, ArtifactWriter
from ...storage.store import Store
from ..stage import Parameters, Run, StageError, json_file, stage

if TYPE_CHECKING:
    from torch import Tensor

    from ..blocks import StoredModel
    from ..skeleton import Skeleton

    Visit = Callable[[int, dict[str, Tensor], Tensor], dict[str, Any]]

_FILE = "blocks.json"
_POSITIONS_AT_ONCE = 64
_FEWEST_WINDOWS = 3


class StreamParameters(Parameters):
    """Parameters of a pass through the model."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="of the pass; auto is the checkpoint's own"
    )


class OwlParameters(StreamParameters):
    """Parameters of the outlier shares."""

    threshold: float = Field(5.0, gt=0, description="a score is an outlier above so many times its block's mean")


def read_blocks(store: Store, artifact: Artifact) -> list[float]:
    """The figure of each block."""
    values: list[float] = json.loads(store.read_file(artifact, _FILE))
    return values


@stage(
    "statistics",
    "owl",
    version=1,
    parameters=OwlParameters,
    inputs={"model": "checkpoint", "calibration": "tokens"},
    output="statistics",
    paper="Yin et al. 2023, arXiv:2310.05175",
)
def owl(run: Run, parameters: OwlParameters, model: Artifact, calibration: Artifact) -> Artifact:
    """Share of each block's Wanda scores above `threshold` times their mean, all linear layers of a block together."""
    from ..blocks import gather_statistics
    from .criteria import InputNorm, wanda_score

    def visits(stored: StoredModel, skeleton: Skeleton) -> Visit:
        def visit(index: int, weights: dict[str, Tensor], hidden: Tensor) -> dict[str, Any]:
            linears = stored.linears(index)
            norms = gather_statistics(skeleton, index, weights, hidden, linears, InputNorm, run.stop_if_asked)
            scores = [
                wanda_score(weights[f"{linear.name}.weight"], norms[name].norm())  # type: ignore[attr-defined]
                for name, linear in linears.items()
            ]
            count = sum(score.numel() for score in scores)
            mean = sum(float(score.double().sum()) for score in scores) / count
            outliers = sum(int((score > parameters.threshold * mean).sum()) for score in scores)
            return {"value": outliers / count}

        return visit

    return measure_blocks(run, parameters, model, calibration, visits)


@stage(
    "statistics",
    "rmi",
    version=1,
    parameters=StreamParameters,
    inputs={"model": "checkpoint", "calibration": "tokens"},
    output="statistics",
    paper="Huang et al. 2025 (LoSA), section 3.2; Kornblith et al. 2019, arXiv:1905.00414",
)
def rmi(run: Run, parameters: StreamParameters, model: Artifact, calibration: Artifact) -> Artifact:
    """Sum of each block input's similarities (normalized HSIC of linear kernels) to the inputs of all other blocks."""
    from ..blocks import not_finite

    def visits(stored: StoredModel, skeleton: Skeleton) -> Visit:
        def visit(index: int, weights: dict[str, Tensor], hidden: Tensor) -> dict[str, Any]:
            if len(hidden) < _FEWEST_WINDOWS:
                raise StageError(
                    f"rmi compares how windows differ from each other: {len(hidden)} are too few, take at least "
                    f"{_FEWEST_WINDOWS} samples"
                )
            kernel = centred_kernel(hidden)
            if not bool(kernel.isfinite().all()):
                raise not_finite(f"the inputs of block {index}", skeleton.dtype)
            return {"value": kernel.tolist()}

        return visit

    return measure_blocks(run, parameters, model, calibration, visits, redundancies)


class FluctuationParameters(StreamParameters):
    """Parameters of FLAP's fluctuations."""

    metric: Literal["WIFV", "IFV", "WIFN"] = Field(
        "WIFV", description="weighted input fluctuation, the fluctuation alone, or weighted input norm"
    )


@stage(
    "statistics",
    "fluctuation",
    version=1,
    parameters=FluctuationParameters,
    inputs={"model": "checkpoint", "calibration": "tokens"},
    output="statistics",
    paper="An et al. 2023 (FLAP), section 3.2, arXiv:2312.11983",
)
def fluctuation(run: Run, parameters: FluctuationParameters, model: Artifact, calibration: Artifact) -> Artifact:
    """Mean and FLAP's score of each input of the layers that write to the residual stream, in the dense model.

    Stored for each block as "mean.query", "score.query" [query features], "mean.width" and "score.width" [channels].
    """
    import torch

    from ..blocks import StoredModel, gather_statistics, read_windows, resolve_dtype, stream_hidden
    from ..skeleton import Skeleton
    from .width import Moments, fluctuation_score

    journal = run.journal
    assert journal is not None
    with (
        StoredModel(run, model) as stored,
        ArtifactWriter(run.store, "statistics") as writer,
        torch.no_grad(),
    ):
        for step in journal.steps:
            writer.take_over(step)
        skeleton = Skeleton(stored.config, resolve_dtype(parameters.dtype, stored), run.device)
        # Only there are parts of the block read that can go; a family that has no heads to lose has one such layer.
        written = {linear.name: linear for linear in stored.family.linears if linear.inputs in ("query", "width")}

        def visit(index: int, weights: dict[str, Tensor], hidden: Tensor) -> dict[str, Any]:
            moments = gather_statistics(skeleton, index, weights, hidden, written, Moments, run.stop_if_asked)
            prefix = stored.family.block_prefix(index)
            measured = {}
            for name, linear in written.items():
                seen: Moments = moments[name]  # type: ignore[assignment]
                score = fluctuation_score(weights[f"{name}.weight"], seen, parameters.metric)
                measured[f"{prefix}mean.{linear.inputs}"] = seen.mean()
                measured[f"{prefix}score.{linear.inputs}"] = score
            writer.add_tensors(measured, prefix)
            writer.settle()
            return writer.part(measured, [])

        stream_hidden(run, stored, skeleton, read_windows(run, calibration, stored), "measuring", visit)
        return writer.publish()


def centred_kernel(inputs: Tensor) -> Tensor:
    """The doubly centred linear kernel [windows, windows] in float64 of activations [windows, length, hidden]."""
    import torch

    kernel = torch.zeros(len(inputs), len(inputs), dtype=torch.float64)
    for part in inputs.split(_POSITIONS_AT_ONCE, dim=1):
        features = part.flatten(1).float()
        kernel += (features @ features.T).double().cpu()
    return kernel - kernel.mean(0) - kernel.mean(1, keepdim=True) + kernel.mean()


def redundancies(kernels: list[Any]) -> list[float]:
    """For each block the sum over all others of <K_l, K_m> / (|K_l| |K_m|), for centred kernels as nested lists."""
    import torch

    flat = torch.tensor(kernels, dtype=torch.float64).flatten(1)
    unit = flat / flat.norm(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    similarity = unit @ unit.T
    result: list[float] = (similarity.sum(1) - similarity.diagonal()).tolist()
    return result


def measure_blocks(
    run: Run,
    parameters: StreamParameters,
    model: Artifact,
    calibration: Artifact,
    visits: Callable[[StoredModel, Skeleton], Visit] | None = None,
    conclude: Callable[[list[Any]], list[float]] = lambda values: values,
    advances: Callable[[Skeleton, Tensor], Visit] | None = None,
) -> Artifact:
    """One pass of the windows through the dense model, one figure for each block.

    visits, advances: make what `stream_hidden` takes as `visit` and `advance`; one of them returns {"value": …} for
    each block. conclude: the figures, from the values of all blocks.
    """
    import torch

    from ..blocks import StoredModel, read_windows, resolve_dtype, stream_hidden
    from ..skeleton import Skeleton

    with StoredModel(run, model) as stored, torch.no_grad():
        windows = read_windows(run, calibration, stored)
        skeleton = Skeleton(stored.config, resolve_dtype(parameters.dtype, stored), run.device)
        hooks: dict[str, Visit] = {}
        if visits is not None:
            hooks["visit"] = visits(stored, skeleton)
        if advances is not None:
            hooks["advance"] = advances(skeleton, windows)
        _, _, records = stream_hidden(run, stored, skeleton, windows, "measuring", **hooks)
    return write_blocks(run, conclude([record["value"] for record in records]))


def write_blocks(run: Run, values: list[float]) -> Artifact:
    """A `statistics` artifact with a figure for each block."""
    run.note("blocks", [round(value, 6) for value in values])
    with ArtifactWriter(run.store, "statistics") as writer:
        writer.add_file(_FILE, json_file(values))
        return writer.publish()
