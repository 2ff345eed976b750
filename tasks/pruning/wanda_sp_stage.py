"""Wanda-sp: heads and FFN channels go by Wanda's scores, or stay as zeros under masks for training to follow.

Under masks every block may lose its own share without being stored wider than the others, and positions stay, so that
low-rank terms trained on one round's model fit the next one's; `slice` makes a narrower model of the last.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from ...storage.artifacts import Artifact, ArtifactWriter
from ..architectures import Linear, Widths, block_count, widths
from ..stage import Run, stage
from .allocation import rmi_shares
from .selection import apply_mask
from .width import Counts, Left, features_left, group_scores, uniform_counts, wanda_sp_score
from .width_stage import (
    CALIBRATED,
    CalibratedWidthParameters,
    allowed_counts,
    best_left,
    config_of,
    narrow_blocks,
    written_layers,
)

if TYPE_CHECKING:
    from torch import Tensor

    from ..blocks import Block


class WandaSpParameters(CalibratedWidthParameters):
    """Parameters of Wanda-sp."""

    allocation: Literal["uniform", "rmi"] = Field(
        "uniform", description="share of each block: uniform, or by its redundancy (rmi, of LoSA)"
    )
    spread: float | None = Field(None, gt=0, lt=0.5, description="how far rmi goes from the mean: 0.01 to 0.03")
    masked: bool = Field(
        False, description="heads and channels become zeros under masks, which training keeps; `slice` removes them"
    )

    @model_validator(mode="after")
    def _spread_of_rmi(self) -> WandaSpParameters:
        if self.spread is not None and self.allocation != "rmi":
            raise ValueError("spread is for 'allocation: rmi'")
        return self

    @property
    def uniform(self) -> bool:
        return self.allocation == "uniform" and not self.masked

    def statistics(self) -> dict[str, tuple[str, dict[str, Any]]]:
        """The input that the allocation asks for."""
        return {"measured": ("statistics/rmi", {"dtype": self.dtype})} if self.allocation == "rmi" else {}

    def counts_by_block(self, before: Widths, blocks: int, redundancy: Sequence[float] | None) -> list[Counts]:
        """How many groups and channels each block keeps. redundancy: of each block, for rmi."""
        shares = [self.sparsity] * blocks
        if redundancy is not None:
            shares = rmi_shares(redundancy, self.sparsity, self.spread)
        return [uniform_counts(before, share, self.parts, self.multiple_of) for share in shares]


@stage("prune", "wanda-sp", version=1, parameters=WandaSpParameters, derived=WandaSpParameters.statistics,
       paper="Sun et al. 2023, as An et al. 2023 apply it, arXiv:2312.11983", **CALIBRATED)  # fmt: skip
def wanda_sp(
    run: Run, parameters: WandaSpParameters, model: Artifact, calibration: Artifact, measured: Artifact | None = None
) -> Artifact:
    """Width: heads and FFN channels with the lowest sums of mean_i |W_ij| ||X_j||_2 over their columns go."""
    from .statistics import read_blocks

    config = config_of(run, model)
    before = widths(config)
    redundancy = read_blocks(run.store, measured) if measured else None
    counts = parameters.counts_by_block(before, block_count(config), redundancy)

    def choose(block: Block) -> Left:
        layers = written_layers(block)

        def score(word: str) -> Tensor:
            name = layers[word]
            return wanda_sp_score(block.weights[name], block.statistics[name].norm()).cpu()

        there = left_by_masks(block.masks, block.linears, before)
        # What went before goes first, and does not come back where a block is to lose less than it has lost.
        heads = _lowered(group_scores(score("query"), before), there.groups) if before.groups else None
        left = best_left(heads, _lowered(score("width"), there.channels), counts[block.index], before)
        return Left(_both(left.groups, there.groups), _both(left.channels, there.channels))

    if parameters.masked:
        return _mask(run, parameters, model, calibration, choose)
    widest = Counts(max(count.groups for count in counts), max(count.channels for count in counts))
    padded = widest if parameters.uniform else allowed_counts(config, widest, before, parameters)
    return narrow_blocks(run, parameters, model, choose, padded=padded, calibration=calibration, dtype=parameters.dtype)


def _mask(run: Run, parameters: WandaSpParameters, model: Artifact, calibration: Artifact, choose: Any) -> Artifact:
    """The block loop; what is not chosen becomes zeros under masks."""
    from ..blocks import Change, StoredModel, read_windows, resolve_dtype, run_blocks
    from .criteria import InputNorm

    with StoredModel(run, model) as stored, ArtifactWriter(run.store, "checkpoint") as writer:
        before = widths(stored.config)

        def change(block: Block) -> Change:
            masks = masks_of(choose(block), block, before)
            tensors = {name: apply_mask(weight, masks[name]) for name, weight in block.weights.items()}
            removed = {name: 1 - int(mask.count_nonzero()) / mask.numel() for name, mask in masks.items()}
            return Change(tensors, frozenset(tensors), masks, block.removal_notes(removed))

        run_blocks(
            run,
            stored,
            "pruning",
            change=change,
            writer=writer,
            windows=read_windows(run, calibration, stored),
            statistic=InputNorm,
            dtype=resolve_dtype(parameters.dtype, stored),
        )
        writer.share_files(stored.manifest)
        return writer.publish()


def masks_of(left: Left, block: Block, before: Widths) -> dict[str, Tensor]:
    """Keep-masks [out_features, in_features] of a block's weights, by name: what is `left`, under earlier masks."""
    import torch

    masks = {}
    for name, weight in block.weights.items():
        keep = torch.ones(weight.shape, dtype=torch.bool)
        for dim, word in enumerate((block.linears[name].outputs, block.linears[name].inputs)):
            features = features_left(word, before, left)
            if features is not None:
                there = torch.zeros(weight.shape[dim], dtype=torch.bool)
                there[features] = True
                keep &= there[:, None] if dim == 0 else there
        keep = keep.to(weight.device)
        masks[name] = keep & block.masks[name] if name in block.masks else keep
    return masks


def left_by_masks(masks: Mapping[str, Tensor], linears: Mapping[str, Linear], before: Widths) -> Left:
    """The groups and channels of which masks leave something, in the layers that write to the residual stream."""
    import torch

    groups, channels = torch.arange(before.groups), torch.arange(before.channels)
    for name, linear in linears.items():
        if name not in masks or linear.inputs not in ("query", "width"):
            continue
        there = masks[name].any(0).cpu()
        if linear.inputs == "width":
            channels = there.nonzero()[:, 0]
        elif before.groups:
            groups = there.view(before.groups, -1).any(1).nonzero()[:, 0]
    return Left(groups, channels)


def _lowered(score: Tensor, there: Tensor) -> Tensor:
    """Scores, below all others where nothing is there any more."""
    lowered = score.new_full(score.shape, -1.0)
    lowered[there] = score[there]
    return lowered


def _both(one: Tensor, other: Tensor) -> Tensor:
    import torch

    return one[torch.isin(one, other)]
