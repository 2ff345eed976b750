"""The pruning stages: the block loop with a method in it. One catalogue entry for each criterion and each solver."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from ...storage.artifacts import Artifact, ArtifactReader, ArtifactWriter
from ..architectures import block_count, family_of
from ..stage import ModelFacts, Parameters, Run, StageError, stage
from .allocation import ALLOCATIONS, mixed_patterns, rmi_shares_slsqp
from .criteria import CRITERIA, Criterion, InputNorm
from .selection import Pattern, apply_mask, keep_by_matrix, keep_by_pattern, keep_by_row, parse_pattern

if TYPE_CHECKING:
    from torch import Tensor

    from ..blocks import Block

    # New weights and keep-masks of a block, {name: ([out_features, in_features], bool)}, for a share or a pattern.
    Method = Callable[[Block, float, Pattern | None], Mapping[str, tuple[Tensor, Tensor]]]


class PruneParameters(Parameters):
    """Parameters of unstructured and N:M pruning."""

    sparsity: float | None = Field(None, gt=0, lt=1, description="share of the weights removed, between 0 and 1")
    pattern: str | None = Field(None, description="N:M sparsity instead: '2:4' keeps two in each four inputs")
    allocation: Literal["uniform", "owl", "rmi"] | tuple[float, ...] = Field(
        "uniform",
        description="share of each block: uniform, by its outliers (owl), by its redundancy (rmi), or a list of shares",
    )
    spread: float | None = Field(
        None, gt=0, lt=0.5, description="how far owl and rmi go from the mean: by default 0.08, and 0.01 to 0.03"
    )
    outlier_threshold: float = Field(
        5.0, gt=0, description="for owl: a score is an outlier above so many times its block's mean"
    )
    rmi_solver: Literal["exact", "slsqp"] = Field(
        "exact", description="for rmi: the exact linear program, or where LoSA's code stops early (slsqp)"
    )
    rmi_beta: float = Field(1.0, gt=0, description="for slsqp: LoSA's code has 1 for Wanda, 100 for SparseGPT")
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
        if not isinstance(self.allocation, str):
            self._check_shares(self.allocation)
        if self.spread is not None and self.allocation not in ALLOCATIONS:
            raise ValueError(f"spread is for the allocations {' and '.join(ALLOCATIONS)}")
        if self.rmi_solver != "exact" and self.allocation != "rmi":
            raise ValueError("rmi_solver is for 'allocation: rmi'")
        if self.rmi_beta != 1 and self.rmi_solver != "slsqp":
            raise ValueError("rmi_beta is for 'rmi_solver: slsqp'; the exact solution does not depend on it")
        if self.allocation in ALLOCATIONS and self.pattern is not None:
            mixed_patterns([], parse_pattern(self.pattern))
        return self

    @property
    def mean(self) -> float:
        """The share removed of all blocks together."""
        if self.pattern is None:
            assert self.sparsity is not None
            return self.sparsity
        pattern = parse_pattern(self.pattern)
        return 1 - pattern.kept / pattern.group

    def _check_shares(self, rates: tuple[float, ...]) -> None:
        wrong = [rate for rate in rates if not 0 <= rate < 1]
        if wrong:
            raise ValueError(f"allocation has {wrong[0]}; each block's share must be at least 0 and below 1")
        mean = sum(rates) / max(1, len(rates))
        if abs(mean - self.mean) > 1e-4:
            asked = f"sparsity is {self.sparsity}" if self.pattern is None else f"'{self.pattern}' is {self.mean:g}"
            raise ValueError(f"the mean of allocation is {mean:.4f}, but {asked}; change one of them")
        if self.pattern is not None:
            group = parse_pattern(self.pattern).group
            between = [rate for rate in rates if abs(rate * group - round(rate * group)) > 1e-6]
            if between:
                raise ValueError(
                    f"allocation has {between[0]}, but a group of {group} can only lose whole weights: "
                    f"write multiples of 1/{group}"
                )

    def shares(self, blocks: int, measured: Sequence[float] | None) -> list[float]:
        """The share removed of each matrix, for every block. measured: what the allocation needs to know of each."""
        if not isinstance(self.allocation, str):
            return list(self.allocation)
        if measured is None:
            return [self.mean] * blocks
        if self.rmi_solver == "slsqp":
            return rmi_shares_slsqp(measured, self.mean, self.spread, self.rmi_beta)
        return ALLOCATIONS[self.allocation](measured, self.mean, self.spread)

    def patterns(self, shares: Sequence[float]) -> list[Pattern | None]:
        """The pattern of each block, for the shares of all; None where there is none."""
        if self.pattern is None:
            return [None] * len(shares)
        pattern = parse_pattern(self.pattern)
        if isinstance(self.allocation, str):
            return list(mixed_patterns(shares, pattern)) if self.allocation in ALLOCATIONS else [pattern] * len(shares)
        return [Pattern(round((1 - share) * pattern.group), pattern.group) for share in shares]

    def statistics(self) -> dict[str, tuple[str, dict[str, Any]]]:
        """The input that the allocation asks for."""
        if self.allocation not in ALLOCATIONS:
            return {}
        settings: dict[str, Any] = {"dtype": self.dtype}
        if self.allocation == "owl":
            settings["threshold"] = self.outlier_threshold
        return {"measured": (f"statistics/{self.allocation}", settings)}


class GradientPruneParameters(PruneParameters):
    """Parameters of criteria that take gradients."""

    norm: Literal["l1", "l2"] = Field("l2", description="of the gradients over the calibration windows")

    def statistics(self) -> dict[str, tuple[str, dict[str, Any]]]:
        """The inputs that the allocation and the criterion ask for."""
        dtype = "auto" if self.dtype == "float16" else self.dtype
        return {**super().statistics(), "gradients": ("statistics/gradients", {"norm": self.norm, "dtype": dtype})}


class SolverParameters(PruneParameters):
    """Parameters of methods that also change the weights that stay."""

    damping: float = Field(0.01, gt=0, le=1, description="share of the mean diagonal added to the Gram matrix")


def check_pruning(parameters: PruneParameters, facts: ModelFacts) -> Iterator[str]:
    """N:M groups must fill the rows of every layer; an allocation must name a share for every block."""
    blocks = block_count(facts.config)
    if not isinstance(parameters.allocation, str) and len(parameters.allocation) != blocks:
        yield f"allocation has {len(parameters.allocation)} shares, but the model has {blocks} blocks"
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
    model: Artifact,
    calibration: Artifact | None,
    measured: Artifact | None,
    method: Method,
    statistic: Callable[[int], Any] | None,
) -> Artifact:
    from ..blocks import Change, StoredModel, read_windows, resolve_dtype, run_blocks
    from .statistics import read_blocks

    def change(block: Block) -> Change:
        tensors, masks, removed = {}, {}, {}
        for name, (weight, keep) in method(block, shares[block.index], patterns[block.index]).items():
            masks[name] = keep
            tensors[name] = apply_mask(weight.to(block.weights[name].dtype), keep)
            removed[name] = 1 - int(keep.count_nonzero()) / keep.numel()
        return Change(tensors, frozenset(tensors), masks, block.removal_notes(removed))

    with StoredModel(run, model) as stored, ArtifactWriter(run.store, "checkpoint") as writer:
        shares = parameters.shares(stored.blocks, read_blocks(run.store, measured) if measured else None)
        patterns = parameters.patterns(shares)
        windows = read_windows(run, calibration, stored) if calibration is not None else None
        run_blocks(
            run,
            stored,
            "pruning",
            change=change,
            writer=writer,
            windows=windows,
            statistic=statistic,
            dtype=resolve_dtype(parameters.dtype, stored),
        )
        writer.share_files(stored.manifest)
        return writer.publish()


def _by_score(criterion: Criterion, windows: int, gradients: ArtifactReader | None) -> Method:
    """The lowest scores of each layer go; what stays is not changed. windows: how many the norms are of."""

    def prune(block: Block, sparsity: float, pattern: Pattern | None) -> dict[str, tuple[Tensor, Tensor]]:
        result = {}
        gradient = gradients.tensors(block.weights) if gradients else {}

        def statistic(needed: str, name: str) -> Tensor:
            if needed == "gradient":
                return gradient[name].to(block.weights[name].device)
            norm: Tensor = block.statistics[name].norm()
            return norm / windows**0.5 if needed == "window_norm" else norm

        for name, weight in block.weights.items():
            score = criterion.score(weight, *(statistic(needed, name) for needed in criterion.needs))
            if name in block.masks:
                score = score.masked_fill(~block.masks[name], -1.0)  # what went before goes first
            if not bool(score.sum().isfinite()):
                raise StageError(
                    f"some scores of {name} are not finite: its weights or statistics hold NaN or infinity"
                )
            if pattern:
                keep = keep_by_pattern(score, pattern)
            elif criterion.compare == "row":
                keep = keep_by_row(score, sparsity)
            else:
                keep = keep_by_matrix(score, sparsity)
            if name in block.masks:
                keep &= block.masks[name]
            result[name] = weight, keep
        return result

    return prune


def _register(name: str, criterion: Criterion) -> None:
    passes = criterion.needs not in ((), ("gradient",))
    parameters_class = GradientPruneParameters if "gradient" in criterion.needs else PruneParameters

    def prune(
        run: Run,
        parameters: PruneParameters,
        model: Artifact,
        calibration: Artifact | None = None,
        measured: Artifact | None = None,
        gradients: Artifact | None = None,
    ) -> Artifact:
        windows = run.store.manifest(calibration).tensors["input_ids"].shape[0] if calibration else 0
        with ArtifactReader(run.store, gradients) if gradients else nullcontext() as reader:
            method = _by_score(criterion, windows, reader)
            return _prune(run, parameters, model, calibration, measured, method, InputNorm if passes else None)

    prune.__doc__ = criterion.score.__doc__
    stage(
        "prune",
        name,
        version=criterion.version,
        parameters=parameters_class,
        inputs={"model": "checkpoint", "calibration": "tokens"},
        passed_on=frozenset() if passes else frozenset({"calibration"}),
        output="checkpoint",
        paper=criterion.paper,
        check=check_pruning,
        after=_masked,
        derived=parameters_class.statistics,
    )(prune)


for _name, _criterion in CRITERIA.items():
    _register(_name, _criterion)


def _by_solver(name: str, solve: Callable[..., list[tuple[Tensor, Tensor]]], run: Run, damping: float) -> Method:
    """Layers that read the same input are solved together; what stays makes up for what goes."""

    def prune(block: Block, sparsity: float, pattern: Pattern | None) -> dict[str, tuple[Tensor, Tensor]]:
        result: dict[str, tuple[Tensor, Tensor]] = {}
        for names in block.by_input():
            run.stop_if_asked()
            try:
                solved = solve(
                    [block.weights[name] for name in names],
                    block.statistics[names[0]].matrix(),
                    sparsity=sparsity,
                    pattern=pattern,
                    damping=damping,
                    masks=[block.masks.get(name) for name in names],
                )
            except ValueError as error:
                raise StageError(f"{name} failed on {names[0]}: {error}") from error
            result.update(zip(names, solved, strict=True))
        return result

    return prune


_SOLVER: dict[str, Any] = {
    "parameters": SolverParameters,
    "inputs": {"model": "checkpoint", "calibration": "tokens"},
    "output": "checkpoint",
    "check": check_pruning,
    "after": _masked,
    "derived": SolverParameters.statistics,
}


@stage("prune", "sparsegpt", version=1, paper="Frantar and Alistarh 2023, arXiv:2301.00774", **_SOLVER)
def sparsegpt(
    run: Run, parameters: SolverParameters, model: Artifact, calibration: Artifact, measured: Artifact | None = None
) -> Artifact:
    """Lowest w^2 / [H^-1]_jj of each 128 columns, column by column, each loss spread over the columns to come."""
    from ..gram import Gram
    from .sparsegpt import solve

    method = _by_solver("SparseGPT", solve, run, parameters.damping)
    return _prune(run, parameters, model, calibration, measured, method, Gram)


@stage("prune", "alps", version=1, paper="Meng et al. 2024, arXiv:2406.07831", **_SOLVER)
def alps(
    run: Run, parameters: SolverParameters, model: Artifact, calibration: Artifact, measured: Artifact | None = None
) -> Artifact:
    """Support and weights together: ADMM on ||X W - X W'||^2 with a growing penalty, then conjugate gradients."""
    from ..gram import Gram
    from .alps import solve

    method = _by_solver("ALPS", solve, run, parameters.damping)
    return _prune(run, parameters, model, calibration, measured, method, Gram)
