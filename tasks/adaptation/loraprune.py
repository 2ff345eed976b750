"""LoRAPrune: which heads and FFN channels the loss needs least, estimated from the gradients of LoRA's factors alone.

Zhang et al. 2023 (LoRAPrune), arXiv:2305.18403. The state of a pruning is four tensors, importance averages and what is
kept of the key-value groups and FFN channels of every block; training changes them in place and its journal keeps them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..architectures import Linear, Widths
from ..pruning.gradients import parts_of
from ..pruning.width import Counts, Left

# Of the average of importance, how much is kept at an update.
MOMENTUM = 0.9
# The share of the steps in which nothing is removed yet.
BEGIN = 0.1


def weight_gradient(a: Tensor, b: Tensor, gradient_a: Tensor, gradient_b: Tensor, scale: float) -> Tensor:
    """What stands for the gradient of W + scale B A, [out_features, in_features]: scale (g_B A + B g_A - g_B g_A).

    It is what a step of length one against the gradients of A [rank, in_features] and B [out_features, rank] takes away
    from the sum; of the gradients before they are clipped, whose length decides how much their product counts.
    Zhang et al. 2023, section 3.2.
    """
    # g_B A + (B - g_B) g_A: two products instead of three.
    return (gradient_b @ a).addmm_(b - gradient_b, gradient_a).mul_(scale)


def sensitivity(weight: Tensor, a: Tensor, b: Tensor, gradient_a: Tensor, gradient_b: Tensor, scale: float) -> Tensor:
    """|g (W + scale B A)| of each weight, [out_features, in_features], g being `weight_gradient`.

    weight: of any floating dtype; the result has that of the factors. The paper squares; its code takes the magnitude,
    as here.
    """
    merged = torch.addmm(weight.to(a.dtype), b, a, alpha=scale)
    return merged.mul_(weight_gradient(a, b, gradient_a, gradient_b, scale)).abs_()


def part_scores(linear: Linear, sensitive: Tensor, widths: Widths) -> dict[str, Tensor]:
    """{"group" or "channel": [how many] float32, of length one}: sums over the weights that go with each part.

    sensitive: of a layer's weights, [out_features, in_features]. A key-value head is summed with its query heads.
    """
    scores = {}
    for part, count, dim in parts_of(linear, widths):
        if count:
            summed = sensitive.sum(dim).view(count, -1).sum(1)
            scores[part] = summed / (summed.norm() + 1e-8)
    return scores


def share_of_removal(updates: int, steps: int, every: int, until: float) -> float | None:
    """How much of what is to go is gone after so many updates, 0 to 1; None when nothing is pruned then.

    Nothing goes in the first tenth of the steps; then a cubic curve is followed, every so many updates, until after
    a share `until` of the steps (0.9 as published) a last pruning takes exactly the rest.
    """
    begin, end = BEGIN * steps, math.ceil(round(until * steps, 6))
    if updates == end:
        return 1.0
    if updates % every or not begin < updates < end:
        return None
    return 1 - (1 - (updates - begin) / ((until - BEGIN) * steps)) ** 3


def drop_least(kept: Tensor, importance: Tensor, removed: int) -> None:
    """Take the least important parts out of `kept` [parts], in place, until `removed` are out; none comes back.

    Of equally important ones the first go.
    """
    order = torch.argsort(importance.masked_fill(~kept, -1.0), stable=True)  # importance is never negative
    kept[order[:removed]] = False


@dataclass(frozen=True)
class Parts:
    """Importance (float32) and what is kept (bool) of all key-value groups and FFN channels, [blocks, parts] each."""

    importance: Mapping[str, Tensor]
    kept: Mapping[str, Tensor]

    @classmethod
    def whole(cls, blocks: int, widths: Widths, device: str) -> Parts:
        """Nothing is removed or known yet."""
        counts = {"group": widths.groups, "channel": widths.channels}
        return cls(
            {part: torch.zeros(blocks, count, device=device) for part, count in counts.items()},
            {part: torch.ones(blocks, count, dtype=torch.bool, device=device) for part, count in counts.items()},
        )

    def tensors(self) -> dict[str, Tensor]:
        """All of it, by name."""
        named = {"importance": self.importance, "kept": self.kept}
        return {f"{kind}.{part}": tensor for kind, parts in named.items() for part, tensor in parts.items()}

    def average(self, block: int, scores: Mapping[str, Tensor]) -> None:
        """Let new scores [parts] count for a tenth of a block's importance; those that are not finite do not count."""
        for part, score in scores.items():
            if bool(score.isfinite().all()):
                self.importance[part][block].mul_(MOMENTUM).add_(score, alpha=1 - MOMENTUM)

    def prune(self, block: int, removed: Counts) -> None:
        """Remove the least important of a block until so many are gone."""
        for part, count in zip(("group", "channel"), removed, strict=True):
            drop_least(self.kept[part][block], self.importance[part][block], count)

    def left(self, block: int) -> Left:
        """What is kept of a block, on the CPU."""
        return Left(*(self.kept[part][block].nonzero()[:, 0].cpu() for part in ("group", "channel")))


class MaskedInputs(nn.Module):
    """A layer without some of its inputs, as if whatever makes them were gone.

    kept: bool [parts], each of equally many inputs; it may change.
    """

    def __init__(self, layer: nn.Module, kept: Tensor) -> None:
        super().__init__()
        self.layer = layer
        self.kept = kept

    def forward(self, inputs: Tensor) -> Tensor:
        mask = self.kept.repeat_interleave(inputs.shape[-1] // len(self.kept))
        result: Tensor = self.layer(inputs * mask)
        return result
