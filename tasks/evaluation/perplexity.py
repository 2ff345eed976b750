"""Perplexity over fixed windows, scored block by block, so that a model larger than memory can be measured."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ...storage.artifacts import Artifact, ArtifactWriter
from ..architectures import widths
from ..formats import FORMATS
from ..stage import ModelFacts, Parameters, Run, StageError, json_file, stage

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from torch import Tensor

    from ..blocks import StoredModel
    from ..skeleton import Skeleton

# Positions whose logits are held at once: 128 x 150,000 words x 4 bytes = 77 MB. More would miss a CPU's caches.
HEAD_CHUNK = 128


class KvCache(BaseModel):
    """How keys and values are cached while decoding: KIVI, Liu et al. 2024, arXiv:2402.02750."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    bits: Literal[2, 4, 8] = Field(description="bits of a cached key's or value's element")
    group_size: int = Field(
        32,
        ge=8,
        multiple_of=8,
        description="what shares a scale: so many tokens of a key's channel, channels of a value",
    )
    residual: int = Field(
        128, ge=8, description="tokens in full precision: values of the last ones, keys until there are so many"
    )

    @model_validator(mode="after")
    def _whole_groups(self) -> KvCache:
        if self.residual % self.group_size:
            raise ValueError(
                f"kv_cache: residual {self.residual} is no multiple of group_size {self.group_size}, and so many keys "
                f"are quantized at once; {-(-self.residual // self.group_size) * self.group_size} would be one"
            )
        return self


class PerplexityParameters(Parameters):
    """Parameters of the perplexity measurement."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="of the forward pass; auto is the checkpoint's own; the loss is in float32"
    )
    activations: Literal["full", "int8"] = Field(
        "full",
        description="int8: models in LLM.int8() round layers' inputs as bitsandbytes does; needs 'dtype: float32'",
    )
    kv_cache: KvCache | None = Field(
        None,
        description="measure decoding with keys and values quantized as KIVI does, and the cache's size: "
        "{bits: 2, 4 or 8, group_size: 32, residual: 128}",
    )

    @model_validator(mode="after")
    def _precise_enough(self) -> PerplexityParameters:
        if self.activations == "int8" and self.dtype != "float32":
            raise ValueError("'activations: int8' needs 'dtype: float32'; others would round inputs once more")
        return self


def check_cache(parameters: PerplexityParameters, facts: ModelFacts) -> Iterator[str]:
    """Groups of values must fill their heads, and tokens be decoded one after the other."""
    cache = parameters.kv_cache
    if cache is None:
        return
    if facts.config.get("use_bidirectional_attention"):
        yield "kv_cache: the model attends to later tokens too (use_bidirectional_attention), so it can't use a cache"
    if (head := widths(facts.config).head) % cache.group_size:
        fitting = [size for size in (8, 16, 32, 64, 128) if head % size == 0]
        advice = f"{' or '.join(map(str, fitting))} would" if fitting else "such a cache is not for this model"
        yield f"kv_cache: group_size {cache.group_size} does not divide the model's head_dim of {head}; {advice}"


@stage(
    "evaluate",
    "perplexity",
    version=2,
    parameters=PerplexityParameters,
    inputs={"model": "checkpoint", "data": "tokens"},
    output="metrics",
    accepts=frozenset((*FORMATS, "adapter")),
    check=check_cache,
    paper="protocol of SparseGPT and Wanda: non-overlapping windows, exp of the mean of window means",
)
def perplexity(run: Run, parameters: PerplexityParameters, model: Artifact, data: Artifact) -> Artifact:
    """exp(mean over windows of the mean cross-entropy of the next token), on the weights as stored.

    Of padded windows (lines, records): per token that counts, and the mean and the median over the windows, which are
    other measures and have other names. Of an adapter: of its checkpoint with the adapter's terms added to the weights.
    With a quantized cache: each token's loss is that of decoding token by token, where it attends to what the cache
    holds at that moment.
    """
    import math

    import torch

    from ..blocks import StoredModel, read_windows, resolve_dtype, stream_hidden
    from ..skeleton import Skeleton

    with StoredModel(run, model) as stored, torch.no_grad():
        windows = read_windows(run, data, stored, padded=True)
        counted = _counted(run, data)
        skeleton = Skeleton(stored.config, resolve_dtype(parameters.dtype, stored), run.device)
        rounding = _round_activations(skeleton, stored, parameters.activations)
        advance, caching = _quantize_cache(skeleton, parameters.kv_cache, int(windows.shape[1]))
        hidden, outer, steps = stream_hidden(run, stored, skeleton, windows, "scoring", advance=advance)
        losses = window_losses(skeleton, outer, windows, hidden, run.device, counted)
    tokens = None if counted is None else counted.sum(1).tolist()
    if tokens is None:
        mean = math.fsum(losses) / len(losses)
    else:
        mean = math.fsum(loss * count for loss, count in zip(losses, tokens, strict=True)) / sum(tokens)
    if not math.isfinite(mean):
        raise StageError("the loss is not a finite number: the model's weights or activations overflow in this dtype")
    with ArtifactWriter(run.store, "metrics") as writer:
        result = {
            **({"perplexity": exp(mean)} if tokens is None else _by_window(mean, losses, tokens)),
            "loss_nats": mean,
            "windows": len(losses),
            "length": int(windows.shape[1]),
            "window_losses_nats": losses,
            "runtime": f"coldpress block loop, {str(skeleton.dtype).removeprefix('torch.')}{rounding}{caching}",
        }
        if parameters.kv_cache is not None:  # of one window, all blocks together
            result |= {key: sum(step[key] for step in steps) for key in ("kv_cache_bytes", "kv_cache_bytes_in_full")}
        writer.add_file("metrics.json", json_file(result))
        return writer.publish()


def exp(loss: float) -> float:
    """The perplexity of a mean loss in nats; what would overflow is cut off at 1e304."""
    import math

    return math.exp(min(loss, 700.0))


def _counted(run: Run, data: Artifact) -> Tensor | None:
    """Which of the tokens 1.. count, bool [windows, length - 1]; None when all do."""
    from ...storage.artifacts import ArtifactReader

    with ArtifactReader(run.store, data) as reader:
        return reader.tensors(["counted"])["counted"].bool() if "counted" in reader.manifest.tensors else None


def _by_window(mean: float, losses: list[float], tokens: list[int]) -> dict[str, Any]:
    """The perplexities of windows of unlike lengths."""
    import statistics

    each = [exp(loss) for loss in losses]
    return {
        "perplexity_per_token": exp(mean),
        "perplexity_mean_of_windows": statistics.fmean(each),
        "perplexity_median_of_windows": statistics.median(each),
        "window_tokens": tokens,
    }


def _round_activations(skeleton: Skeleton, stored: StoredModel, activations: str) -> str:
    """Let layers in LLM.int8() round their inputs, if asked to. Returns what the name of the runtime says of it."""
    from ..quantization.int8_format import packed_modules, round_inputs

    modules = packed_modules(stored.manifest.tensors)
    if not modules:
        return ""
    if activations == "full":
        return ", int8 weights dequantized, activations not rounded"
    settings = stored.manifest.quantization or {}
    threshold = float(settings.get("llm_int8_threshold", 6.0))
    for module in modules:
        index = stored.family.block_of(module)
        assert index is not None
        layer = module.removeprefix(stored.family.block_prefix(index))
        skeleton.change_inputs(lambda inputs: round_inputs(inputs, threshold), index, [layer])
    return f", LLM.int8() activations with outliers from {threshold:g}"


def _quantize_cache(
    skeleton: Skeleton, cache: KvCache | None, length: int
) -> tuple[Callable[[int, dict[str, Tensor], Tensor], dict[str, int]] | None, str]:
    """Let blocks attend as with this cache, if there is one. Returns how blocks are advanced, and what the name of the
    runtime says of it.
    """
    if cache is None:
        return None, ""
    from .packed_cache import CachedAttention

    window = getattr(skeleton.model.config, "sliding_window", None)
    if window is not None and window < length:
        raise StageError(
            f"kv_cache: the model attends to the last {window} tokens only, and a packed cache keeps all {length}; "
            f"set the data's length to {window} or less"
        )
    attention = CachedAttention(skeleton, **cache.model_dump())
    how = f", KV cache in {cache.bits} bits, groups of {cache.group_size}, {cache.residual} tokens in full"
    return attention.advance, how


def window_losses(
    skeleton: Skeleton,
    outer: Mapping[str, Tensor],
    windows: Tensor,
    hidden: Tensor,
    device: str,
    counted: Tensor | None = None,
) -> list[float]:
    """`window_loss` of each window [windows, length], given the last block's outputs [windows, length, hidden].

    counted: which of the tokens 1.. count, bool [windows, length - 1]; None: all.
    """
    losses = []
    for number, (window, outputs) in enumerate(zip(windows, hidden, strict=True)):
        features, targets = skeleton.finish(outer, outputs[None].to(device))[0, :-1], window[1:].to(device)
        if counted is not None:
            kept = counted[number].to(device)
            features, targets = features[kept], targets[kept]
        losses.append(window_loss(skeleton, outer, features, targets))
    return losses


def window_loss(skeleton: Skeleton, outer: Mapping[str, Tensor], features: Tensor, targets: Tensor) -> float:
    """Mean cross-entropy in nats of targets [positions], given head inputs [positions, features] of those before."""
    import torch
    from torch.nn.functional import cross_entropy

    total = torch.zeros((), dtype=torch.float64)
    for start in range(0, len(targets), HEAD_CHUNK):
        stop = min(start + HEAD_CHUNK, len(targets))
        logits = skeleton.logits(outer, features[start:stop])
        total += cross_entropy(logits, targets[start:stop], reduction="sum").double().cpu()
    return float(total) / len(targets)
