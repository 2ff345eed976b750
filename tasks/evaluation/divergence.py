"""How far a model's predictions are from those of the model it was made of: damage that perplexity alone can hide."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ...storage.artifacts import Artifact, ArtifactReader, ArtifactWriter
from ..formats import FORMATS
from ..pruning.statistics import StreamParameters
from ..stage import Run, StageError, json_file, stage

if TYPE_CHECKING:
    from torch import Tensor

# Positions whose logits, of two models, are held at once: 2 x 256 x 150,000 words x 4 bytes = 0.3 GB.
HEAD_CHUNK = 256

_ANY = frozenset((*FORMATS, "adapter"))


@stage(
    "statistics",
    "outputs",
    version=1,
    parameters=StreamParameters,
    inputs={"model": "checkpoint", "data": "tokens"},
    output="statistics",
    accepts=_ANY,
)
def outputs(run: Run, parameters: StreamParameters, model: Artifact, data: Artifact) -> Artifact:
    """What the head reads, [windows, length, features], for windows sent through the whole model."""
    import torch

    from ..blocks import StoredModel, read_windows, resolve_dtype, stream_hidden
    from ..skeleton import Skeleton

    with StoredModel(run, model) as stored, torch.no_grad(), ArtifactWriter(run.store, "statistics") as writer:
        windows = read_windows(run, data, stored)
        skeleton = Skeleton(stored.config, resolve_dtype(parameters.dtype, stored), run.device)
        hidden, outer, _ = stream_hidden(run, stored, skeleton, windows, "running")
        for number, window in enumerate(hidden):
            writer.add_tensors({f"{number:05}": skeleton.finish(outer, window[None].to(run.device))[0].cpu()})
        return writer.publish()


@stage(
    "evaluate",
    "divergence",
    version=1,
    parameters=StreamParameters,
    inputs={"model": "checkpoint", "data": "tokens", "reference": "checkpoint"},
    output="metrics",
    accepts=_ANY,
    derived=lambda parameters: {"expected": ("statistics/outputs", parameters.for_key())},
)
def divergence(
    run: Run, parameters: StreamParameters, model: Artifact, data: Artifact, reference: Artifact, expected: Artifact
) -> Artifact:
    """Against the first model of the branch: mean KL(reference || model) of the next token, and how often another
    token is the likeliest.
    """
    import math

    import torch

    from ..blocks import StoredModel, read_windows, resolve_dtype, stream_hidden
    from ..skeleton import Skeleton

    with StoredModel(run, model) as stored, StoredModel(run, reference) as other, torch.no_grad():
        if stored.config["vocab_size"] != other.config["vocab_size"]:
            raise StageError(
                f"the model has {stored.config['vocab_size']} words and the reference {other.config['vocab_size']}: "
                "their predictions can't be compared"
            )
        windows = read_windows(run, data, stored)
        dtype = resolve_dtype(parameters.dtype, stored)
        skeleton = Skeleton(stored.config, dtype, run.device)
        hidden, outer, _ = stream_hidden(run, stored, skeleton, windows, "scoring")
        theirs = Skeleton(other.config, dtype, run.device)
        their_outer = other.outer(dtype)
        losses, flips = [], []
        with ArtifactReader(run.store, expected) as reader:
            for number, window in enumerate(hidden):
                found = skeleton.finish(outer, window[None].to(run.device))[0]
                name = f"{number:05}"
                there = reader.tensors([name])[name].to(run.device, dtype)
                kl, other_first = 0.0, 0
                for start in range(0, len(found), HEAD_CHUNK):
                    part = slice(start, start + HEAD_CHUNK)
                    one, two = compare(theirs.logits(their_outer, there[part]), skeleton.logits(outer, found[part]))
                    kl, other_first = kl + one, other_first + two
                losses.append(kl / len(found))
                flips.append(other_first / len(found))
    if not math.isfinite(sum(losses)):
        raise StageError("the divergence is not a finite number: predictions overflow in this dtype")
    result: dict[str, Any] = {
        "kl_nats": math.fsum(losses) / len(losses),
        "top1_changed": math.fsum(flips) / len(flips),
        "windows": len(losses),
        "length": int(windows.shape[1]),
        "runtime": f"coldpress block loop, {str(dtype).removeprefix('torch.')}",
    }
    with ArtifactWriter(run.store, "metrics") as writer:
        writer.add_file("metrics.json", json_file(result))
        writer.add_file("items.json", json_file({"kl_nats": losses, "top1_changed": flips}))
        return writer.publish()


def compare(reference: Tensor, found: Tensor) -> tuple[float, int]:
    """The sum of KL(reference || found) in nats over logits [positions, vocabulary], and of how many the most likely
    token differs.
    """
    expected, predicted = reference.log_softmax(-1), found.log_softmax(-1)
    kl = (expected.exp() * (expected - predicted)).sum(-1).double().sum()
    return float(kl), int((reference.argmax(-1) != found.argmax(-1)).sum())
