"""Width pruning: which heads and FFN channels go, and a block without them. Pure maths over tensors.

Attention loses key-value groups: a key-value head goes with all query heads that read it. Scores are for the input
features of the two layers that write to the residual stream, `o_proj` and `down_proj` or what a family calls them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

from ..architectures import Linear, Widths

if TYPE_CHECKING:
    from torch import Tensor


class Left(NamedTuple):
    """What stays of a block: indices, ascending, of its key-value groups and of its FFN channels, int64."""

    groups: Tensor
    channels: Tensor


class Counts(NamedTuple):
    """How many key-value groups and FFN channels stay."""

    groups: int
    channels: int


def magnitude_sp_score(weight: Tensor) -> Tensor:
    """||W_:j||_2 of each input, [in_features] float32."""
    return weight.float().norm(dim=0)


def wanda_sp_score(weight: Tensor, input_norm: Tensor) -> Tensor:
    """mean_i |W_ij| * ||X_j||_2 of each input, [in_features] float32. Sun et al. 2023, as An et al. 2023 apply it."""
    return weight.float().abs().mean(0) * input_norm


class Moments:
    """Mean, variance and norm of each input feature over all calibration tokens, in float64."""

    def __init__(self, in_features: int) -> None:
        import torch

        self._tokens = 0
        self._mean = torch.zeros(in_features, dtype=torch.float64)
        self._squares = torch.zeros(in_features, dtype=torch.float64)  # of the differences from the mean

    def add(self, inputs: Tensor) -> None:
        """Add inputs [tokens, in_features] of any floating dtype."""
        inputs = inputs.double()
        tokens, mean = len(inputs), inputs.mean(0)
        squares = (inputs - mean).square_().sum(0).cpu()
        apart, total = mean.cpu() - self._mean, self._tokens + tokens
        self._squares += squares + apart.square() * (self._tokens * tokens / total)
        self._mean += apart * (tokens / total)
        self._tokens = total

    def finite(self) -> bool:
        """Whether all inputs seen were finite numbers."""
        return bool(self._squares.isfinite().all())

    def mean(self) -> Tensor:
        """[in_features], float32."""
        return self._mean.float()

    def variance(self) -> Tensor:
        """The unbiased variance, [in_features], float32."""
        return (self._squares / (self._tokens - 1)).float()

    def norm(self) -> Tensor:
        """||X_j||_2, [in_features], float32."""
        return (self._squares + self._tokens * self._mean.square()).sqrt().float()


def fluctuation_score(weight: Tensor, moments: Moments, metric: str) -> Tensor:
    """FLAP's score of each input, [in_features] float32. An et al. 2023 (arXiv:2312.11983), section 3.2.

    metric: WIFV is the variance of the input times the sum of its squared weights, IFV the variance alone, WIFN the
    mean of |W_ij| ||X_j||_2.
    """
    match metric:
        case "WIFV":
            return moments.variance() * weight.float().square().sum(0).cpu()
        case "IFV":
            return moments.variance()
    return wanda_sp_score(weight.cpu(), moments.norm())


def uniform_counts(widths: Widths, sparsity: float, parts: str = "all", multiple_of: int = 1) -> Counts:
    """How many groups and channels of every block stay.

    parts: "all" removes int(share * groups) groups and so many channels that the share of the block's linear weights
    is met within one channel; "attention" and "ffn" remove the share of the groups, or channels, alone. multiple_of:
    the number of channels that stay is rounded up to a multiple of it.
    """
    groups = 0 if parts == "ffn" else int(widths.groups * sparsity)
    if parts == "attention":
        return Counts(widths.groups - groups, widths.channels)
    channels = int(widths.channels * sparsity)
    if parts == "all":
        weights = sparsity * widths.weights - groups * widths.group_weights
        channels = min(int(weights / widths.channel_weights + 1e-9), widths.channels)
    left = max(1, widths.channels - channels)
    return Counts(widths.groups - groups, min(-(-left // multiple_of) * multiple_of, widths.channels))


def group_scores(score: Tensor, widths: Widths) -> Tensor:
    """The sum of the scores of each group's query features, [groups], for [query features]."""
    return score.view(widths.groups, -1).sum(1)


def highest(score: Tensor, count: int) -> Tensor:
    """Indices, ascending, of the `count` highest scores; of equal ones the last stay."""
    import torch

    order = torch.argsort(score, stable=True)
    return order[len(order) - count :].sort().values


def best_by_weight(score: Tensor, weights: Tensor, share: float) -> Tensor:
    """Keep-mask [parts]: the highest scores whose weights together come nearest to `share` of all. weights: float64.

    Infinite scores stay in any case.
    """
    import torch

    order = torch.argsort(score, descending=True, stable=True)
    filled = weights[order].cumsum(0)
    count = int((filled - share * filled[-1]).abs().argmin()) + 1
    count = max(count, int(score.isposinf().sum()))
    keep = torch.zeros(len(score), dtype=torch.bool)
    keep[order[:count]] = True
    return keep


def best_of_structure(
    attention: Tensor, ffn: Tensor, widths: Widths, sparsity: float, structure: str, multiple_of: int = 1
) -> list[Left]:
    """What stays of each block by FLAP's scores of the inputs of `o_proj` [blocks, query features] and `down_proj`
    [blocks, channels]; no scores [blocks, 0] for attention that loses nothing. An et al. 2023, section 3.3.

    structure: UL-UM removes the same of every block; in AL-MM the heads of all blocks compete, and the channels of all
    blocks; in AL-AM everything. Where they compete, scores are standardized in each block, and a group counts as the
    channels that have as many weights. At least one group and one channel of each block stay. As in the published
    code, scores of heads are squared before they are summed.
    """
    import torch

    blocks, per_group = len(ffn), max(1, attention.shape[1] // widths.groups) if widths.groups else 1
    if structure == "UL-UM":
        counts = uniform_counts(widths, sparsity, "all" if attention.shape[1] else "ffn", multiple_of)
        return [
            Left(
                highest(group_scores(heads.square(), widths), counts.groups)
                if len(heads)
                else torch.arange(widths.groups),
                highest(channels, counts.channels),
            )
            for heads, channels in zip(attention, ffn, strict=True)
        ]
    heads = _standardized(attention.square()).view(blocks, -1, per_group).mean(2)
    channels = _standardized(ffn)
    for score in (heads, channels):  # the best of each block stays
        if score.shape[1]:
            score[torch.arange(blocks), score.argmax(1)] = torch.inf
    ratio = widths.group_weights / widths.channel_weights
    weights = torch.cat([torch.full(heads.shape, ratio), torch.ones(channels.shape)], 1).double()
    scores = torch.cat([heads, channels], 1)
    if structure == "AL-MM":
        kinds = [kind for kind in (heads, channels) if kind.shape[1]]
        kept = [best_by_weight(k.flatten(), torch.ones(k.numel()).double(), 1 - sparsity).view(k.shape) for k in kinds]
        keep = torch.cat(kept, 1)
    else:
        keep = best_by_weight(scores.flatten(), weights.flatten(), 1 - sparsity).view(scores.shape)
    every = torch.arange(widths.groups)
    return [
        Left(row[: heads.shape[1]].nonzero()[:, 0] if heads.shape[1] else every, row[heads.shape[1] :].nonzero()[:, 0])
        for row in keep
    ]


def _standardized(score: Tensor) -> Tensor:
    """Each row minus its mean, over its unbiased standard deviation."""
    if not score.shape[1]:
        return score
    centred = score - score.mean(1, keepdim=True)
    spread: Tensor = centred / score.std(1, keepdim=True).clamp(min=1e-30)
    return spread


def narrow(
    tensors: Mapping[str, Tensor], linears: Mapping[str, Linear], widths: Widths, left: Left, padded: Counts
) -> dict[str, Tensor]:
    """Weights, biases or masks of a block's linear layers without the removed parts, by full name.

    tensors: those there are of the weights that `linears` names, [out_features, in_features], and of their biases
    [out_features]. Where fewer groups or channels are left than in `padded`, zeros (False in masks) fill the width up.
    """
    result = {}
    for weight, linear in linears.items():
        for name, words in ((weight, (linear.outputs, linear.inputs)), (bias_of(weight), (linear.outputs,))):
            if name not in tensors:
                continue
            tensor = tensors[name]
            for dim, word in enumerate(words):
                features = features_left(word, widths, left)
                if features is not None:
                    size = padded.channels if word == "width" else padded.groups * _group_features(word, widths)
                    tensor = _taken(tensor, dim, features, size)
            result[name] = tensor.contiguous()
    return result


def bias_of(weight: str) -> str:
    """The name of the bias of the layer that has this weight."""
    return f"{weight.removesuffix('weight')}bias"


def features_left(word: str, widths: Widths, left: Left) -> Tensor | None:
    """Which features of a dimension ("query", "key", "width") stay, as indices; None for others, which stay whole."""
    import torch

    match word:
        case "query" | "key":
            size = _group_features(word, widths)
            return (left.groups[:, None] * size + torch.arange(size)).flatten()
        case "width":
            return left.channels
    return None


def share_left(linear: Linear, before: Widths, left: Left) -> float:
    """What stays of a layer's weights."""
    share = 1.0
    for word in (linear.outputs, linear.inputs):
        if word in ("query", "key"):
            share *= len(left.groups) / before.groups
        elif word == "width":
            share *= len(left.channels) / before.channels
    return share


def _group_features(word: str, widths: Widths) -> int:
    return widths.head * (widths.heads_per_group if word == "query" else 1)


def _taken(tensor: Tensor, dim: int, features: Tensor, size: int) -> Tensor:
    import torch

    taken = tensor.index_select(dim, features.to(tensor.device))
    if len(features) == size:
        return taken
    shape = list(taken.shape)
    shape[dim] = size - len(features)
    return torch.cat([taken, taken.new_zeros(shape)], dim)


def removed_output(weight: Tensor, mean: Tensor, left: Tensor) -> Tensor:
    """What the removed inputs contribute on average, [out_features] float32: the bias that makes up for them.

    weight: [out_features, in_features] before narrowing; mean: [in_features]; left: indices of the inputs that stay.
    An et al. 2023, section 3.4.
    """
    gone = mean.float().clone()
    gone[left] = 0
    return weight.float() @ gone.to(weight.device)
