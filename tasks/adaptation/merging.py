"""Adapters into their checkpoint's weights, where that loses nothing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from ...storage.artifacts import Artifact, ArtifactWriter
from ..formats import FORMATS
from ..stage import ModelFacts, Parameters, Run, stage


class MergeParameters(Parameters):
    """Merging has no parameters."""


def check_merge(parameters: MergeParameters, facts: ModelFacts) -> Iterator[str]:
    """A term of low rank is dense: it would fill what pruning emptied, and packed weights have no room for it."""
    if facts.format != "dense":
        yield (
            f"weights packed as {facts.format} can't take up an adapter; evaluate and export it beside its checkpoint, "
            "or train one for the model from before it was quantized, merge that and quantize last"
        )
    elif facts.masked:
        yield (
            "merging would make the pruned weights dense again; evaluate and export the adapter beside its checkpoint, "
            "or train with method sparse-lora, whose result is merged and keeps every zero"
        )


@stage(
    "merge",
    "lora",
    version=1,
    parameters=MergeParameters,
    inputs={"model": "adapter"},
    output="checkpoint",
    accepts=frozenset({*FORMATS, "adapter"}),
    paper="Hu et al. 2021, section 4.1, arXiv:2106.09685",
    check=check_merge,
    after=lambda parameters, facts: replace(facts, format="dense"),
)
def merge(run: Run, parameters: MergeParameters, model: Artifact) -> Artifact:
    """W + B A, summed in float32 and rounded to the checkpoint's dtype."""
    from ..blocks import Block, Change, StoredModel, run_blocks

    with StoredModel(run, model) as stored, ArtifactWriter(run.store, "checkpoint") as writer:

        def change(block: Block) -> Change:
            tensors = {name: weight.to(stored.dtype) for name, weight in block.weights.items()}
            return Change(tensors, frozenset(block.weights))

        run_blocks(run, stored, "merging", change=change, writer=writer)
        writer.share_files(stored.manifest)
        return writer.publish()
