"""The pruning stage: the block loop with a criterion in it. One catalogue entry for each criterion."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field, model_validator

from ...storage.artifacts import Artifact, ArtifactWriter
from ..architectures import family_of
from ..stage import ModelFacts, Parameters, Run, stage
from .criteria import CRITERIA, Criterion, InputNorm
from .selection import apply_mask, keep_by_matrix, keep_by_pattern, keep_by_row, parse_pattern


class PruneParameters(Parameters):
    """Parameters of unstructured and N:M pruning."""

    sparsity: float | None = Field(None, gt=0, lt=1, description="share of the weights removed, between 0 and 1")
    pattern: str | None = Field(None, description="N:M sparsity instead: '2:4' keeps two in each four inputs")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="of the calibration pass; auto is the checkpoint's own"
    )

    @model_validator(mode="after")
    def _one_of_both(self) -> PruneParameters:
        if self.pattern is not None:
            pattern = parse_pattern(self.pattern)
            if self.sparsity is not None and abs(self.sparsity - (1 - pattern.kept / pattern.group)) > 1e-9:
                raise ValueError(
                    f"sparsity {self.sparsity} contradicts pattern '{self.pattern}', which removes "
                    f"{1 - pattern.kept / pattern.group:g}; leave sparsity out"
                )
        elif self.sparsity is None:
            raise ValueError("say how much to prune: 'sparsity: 0.5', or 'pattern: \"2:4\"'")
        return self


def check_pruning(parameters: PruneParameters, facts: ModelFacts) -> Iterator[str]:
    """N:M groups must fill the rows of every layer."""
    if parameters.pattern is None:
        return
    group = parse_pattern(parameters.pattern).group
    for name, (_, columns) in family_of(facts.config).linear_weights(facts.config).items():
        if columns % group:
            yield (
                f"pattern '{parameters.pattern}' needs rows that {group} divides, but {name} has {columns} inputs; "
                "use a group that divides them, or 'sparsity'"
            )
            return


def _masked(parameters: PruneParameters, facts: ModelFacts) -> ModelFacts:
    return ModelFacts(facts.config, facts.format, masked=True)


def _prune(
    run: Run,
    parameters: PruneParameters,
    criterion: Criterion,
    model: Artifact,
    calibration: Artifact | None,
) -> Artifact:
    from ..blocks import Block, Change, StoredModel, read_windows, resolve_dtype, run_blocks

    pattern = parse_pattern(parameters.pattern) if parameters.pattern else None
    sparsity = parameters.sparsity or 0.0

    def change(block: Block) -> Change:
        tensors, masks, removed = {}, {}, {}
        for name, weight in block.weights.items():
            if criterion.needs == "input_norm":
                score = criterion.score(weight, block.statistics[name].norm())
            else:
                score = criterion.score(weight)
            if name in block.masks:
                score = score.masked_fill(~block.masks[name], -1.0)  # what went before goes first
            if pattern:
                keep = keep_by_pattern(score, pattern)
            elif criterion.compare == "row":
                keep = keep_by_row(score, sparsity)
            else:
                keep = keep_by_matrix(score, sparsity)
            if name in block.masks:
                keep &= block.masks[name]
            masks[name] = keep
            tensors[name] = apply_mask(weight, keep)
            removed[name] = 1 - int(keep.count_nonzero()) / keep.numel()
        return Change(tensors, frozenset(tensors), masks, {"sparsity": removed})

    with StoredModel(run, model) as stored, ArtifactWriter(run.store, "checkpoint") as writer:
        windows = read_windows(run, calibration, stored) if calibration is not None else None
        run_blocks(
            run,
            stored,
            "pruning",
            change=change,
            writer=writer,
            windows=windows,
            statistic=InputNorm,
            dtype=resolve_dtype(parameters.dtype, stored),
        )
        writer.share_files(stored.manifest)
        return writer.publish()


def _register(name: str, criterion: Criterion) -> None:
    calibrated = criterion.needs != "nothing"

    def prune(run: Run, parameters: PruneParameters, model: Artifact, calibration: Artifact | None = None) -> Artifact:
        return _prune(run, parameters, criterion, model, calibration)

    prune.__doc__ = criterion.score.__doc__
    stage(
        "prune",
        name,
        version=criterion.version,
        parameters=PruneParameters,
        inputs={"model": "checkpoint", "calibration": "tokens"} if calibrated else {"model": "checkpoint"},
        output="checkpoint",
        paper=criterion.paper,
        check=check_pruning,
        after=_masked,
    )(prune)


for _name, _criterion in CRITERIA.items():
    _register(_name, _criterion)
