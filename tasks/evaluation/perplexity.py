"""Perplexity over fixed windows, scored block by block, so that a model larger than memory can be measured."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from ...storage.artifacts import Artifact, ArtifactWriter
from ..formats import FORMATS
from ..stage import Parameters, Run, StageError, json_file, stage

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from ..blocks import StoredModel
    from ..skeleton import Skeleton

# Positions whose logits are held at once: 512 x 150,000 words x 4 bytes = 0.3 GB.
HEAD_CHUNK = 512


class PerplexityParameters(Parameters):
    """Parameters of the perplexity measurement."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="of the forward pass; auto is the checkpoint's own; the loss is in float32"
    )
    activations: Literal["full", "int8"] = Field(
        "full",
        description="int8: models in LLM.int8() round layers' inputs as bitsandbytes does; needs 'dtype: float32'",
    )

    @model_validator(mode="after")
    def _precise_enough(self) -> PerplexityParameters:
        if self.activations == "int8" and self.dtype != "float32":
            raise ValueError("'activations: int8' needs 'dtype: float32'; others would round inputs once more")
        return self


@stage(
    "evaluate",
    "perplexity",
    version=1,
    parameters=PerplexityParameters,
    inputs={"model": "checkpoint", "data": "tokens"},
    output="metrics",
    accepts=frozenset((*FORMATS, "adapter")),
    paper="protocol of SparseGPT and Wanda: non-overlapping windows, exp of the mean of window means",
)
def perplexity(run: Run, parameters: PerplexityParameters, model: Artifact, data: Artifact) -> Artifact:
    """exp(mean over windows of the mean cross-entropy of the next token), on the weights as stored.

    Of an adapter: of its checkpoint with the adapter's terms added to the weights.
    """
    import math

    import torch

    from ..blocks import StoredModel, read_windows, resolve_dtype, stream_hidden
    from ..skeleton import Skeleton

    with StoredModel(run, model) as stored, torch.no_grad():
        windows = read_windows(run, data, stored)
        skeleton = Skeleton(stored.config, resolve_dtype(parameters.dtype, stored), run.device)
        rounding = _round_activations(skeleton, stored, parameters.activations)
        hidden, outer, _ = stream_hidden(run, stored, skeleton, windows, "scoring")
        losses = window_losses(skeleton, outer, windows, hidden, run.device)
    mean = math.fsum(losses) / len(losses)
    if not math.isfinite(mean):
        raise StageError("the loss is not a finite number: the model's weights or activations overflow in this dtype")
    with ArtifactWriter(run.store, "metrics") as writer:
        result = {
            "perplexity": math.exp(min(mean, 700.0)),
            "loss_nats": mean,
            "windows": len(losses),
            "length": int(windows.shape[1]),
            "window_losses_nats": losses,
            "runtime": f"coldpress block loop, {str(skeleton.dtype).removeprefix('torch.')}{rounding}",
        }
        writer.add_file("metrics.json", json_file(result))
        return writer.publish()


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


def window_losses(
    skeleton: Skeleton, outer: Mapping[str, Tensor], windows: Tensor, hidden: Tensor, device: str
) -> list[float]:
    """`window_loss` of each window [windows, length], given the last block's outputs [windows, length, hidden]."""
    losses = []
    for window, outputs in zip(windows, hidden, strict=True):
        features = skeleton.finish(outer, outputs[None].to(device))[0]
        losses.append(window_loss(skeleton, outer, features, window.to(device)))
    return losses


def window_loss(skeleton: Skeleton, outer: Mapping[str, Tensor], features: Tensor, window: Tensor) -> float:
    """Mean cross-entropy in nats of tokens 1.. of a window [length], given head inputs [length, features]."""
    import torch
    from torch.nn.functional import cross_entropy

    total = torch.zeros((), dtype=torch.float64)
    targets = window[1:]
    for start in range(0, len(targets), HEAD_CHUNK):
        stop = min(start + HEAD_CHUNK, len(targets))
        logits = skeleton.logits(outer, features[start:stop])
        total += cross_entropy(logits, targets[start:stop], reduction="sum").double().cpu()
    return float(total) / len(targets)
