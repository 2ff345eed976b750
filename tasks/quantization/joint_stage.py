"""SparseGPT and GPTQ in one pass: whatever goes or is rounded, the columns to come make up for both."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ...storage.artifacts import Artifact
from ..pruning.stage import SolverParameters, check_pruning
from ..stage import ModelFacts, Run, StageError, stage
from .precision import UNQUANTIZED, GroupParameters, check_groups
from .stage import by_precision, group_settings, quantized_checkpoint

if TYPE_CHECKING:
    from torch import Tensor

    from ..blocks import Block


class JointParameters(GroupParameters, SolverParameters):
    """Parameters of joint pruning and quantization: those of SparseGPT, and how what stays is quantized."""

    def measured(self) -> dict[str, tuple[str, dict[str, Any]]]:
        """The inputs that an allocation and a budget ask for."""
        return {**self.statistics(), **self.sensitivity()}


def check_joint(parameters: JointParameters, facts: ModelFacts) -> Iterator[str]:
    """What pruning and what packing ask for."""
    yield from check_pruning(parameters, facts)
    if any(override.bits == UNQUANTIZED for override in parameters.overrides):
        yield "sparsegpt-gptq quantizes all layers; 16 bits are for rtn, gptq and awq"
    yield from check_groups(parameters, facts)


@stage(
    "quantize",
    "sparsegpt-gptq",
    version=1,
    parameters=JointParameters,
    inputs={"model": "checkpoint", "calibration": "tokens"},
    output="checkpoint",
    paper="Frantar and Alistarh 2023, section 3.5, arXiv:2301.00774",
    check=check_joint,
    after=lambda parameters, facts: replace(facts, format="gptq", masked=True),
    derived=JointParameters.measured,
)
def sparsegpt_gptq(
    run: Run,
    parameters: JointParameters,
    model: Artifact,
    calibration: Artifact,
    measured: Artifact | None = None,
    sensitivity: Artifact | None = None,
) -> Artifact:
    """SparseGPT and GPTQ in one pass: a column's weights go or are rounded, both errors spread over those to come."""
    from ..blocks import Change, StoredModel, read_windows, resolve_dtype
    from ..gram import Gram
    from ..pruning.sparsegpt import Selection
    from ..pruning.statistics import read_blocks
    from .gptq import solve
    from .gptq_format import pack_together

    def change(block: Block) -> Change:
        import torch

        tensors: dict[str, Tensor] = {}
        masks: dict[str, Tensor] = {}
        for precision, names in by_precision(block, settings):
            assert precision is not None
            run.stop_if_asked()
            weights = {name: block.weights[name] for name in names}
            selection = Selection(
                list(weights.values()),
                sparsity=shares[block.index],
                pattern=patterns[block.index],
                masks=[block.masks.get(name) for name in names],
            )
            try:
                solution = solve(
                    torch.cat(list(weights.values())),
                    block.statistics[names[0]].matrix(),
                    **precision._asdict(),
                    symmetric=parameters.symmetric,
                    act_order=False,
                    static_groups=False,
                    damping=parameters.damping,
                    selection=selection,
                )
            except ValueError as error:
                raise StageError(f"SparseGPT with GPTQ failed on {names[0]}: {error}") from error
            tensors.update(pack_together(weights, solution, settings))
            masks.update(zip(names, selection.masks(), strict=True))
        removed = {name: 1 - int(keep.count_nonzero()) / keep.numel() for name, keep in masks.items()}
        return Change(tensors, frozenset(block.weights), masks, block.removal_notes(removed))

    with StoredModel(run, model) as stored:
        shares = parameters.shares(stored.blocks, read_blocks(run.store, measured) if measured else None)
        patterns = parameters.patterns(shares)
        settings = group_settings(run, parameters, stored, sensitivity, act_order=False, damping=parameters.damping)
        return quantized_checkpoint(
            run,
            stored,
            change,
            settings,
            "pruning and quantizing",
            windows=read_windows(run, calibration, stored),
            statistic=Gram,
            dtype=resolve_dtype(parameters.dtype, stored),
        )
