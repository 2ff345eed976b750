"""From heads and channels under masks to a narrower model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from ...storage.artifacts import Artifact, ArtifactWriter
from ..architectures import narrowed_config, widths
from ..stage import ModelFacts, Run, json_file, stage
from .wanda_sp_stage import left_by_masks
from .width import Counts, Left, narrow, share_left
from .width_stage import NarrowingParameters, allowed_counts

if TYPE_CHECKING:
    from ..blocks import Block, StoredModel


class SliceParameters(NarrowingParameters):
    """Parameters of slicing."""


def check_slice(parameters: SliceParameters, facts: ModelFacts) -> Iterator[str]:
    """There must be something under masks."""
    if not facts.masked:
        yield "the model has no masks, so there is nothing to slice; name one that wanda-sp made with 'masked: true'"


@stage(
    "prune",
    "slice",
    version=1,
    parameters=SliceParameters,
    inputs={"model": "checkpoint"},
    output="checkpoint",
    paper="the end of structured LoSA, Huang et al. 2025, arXiv:2501.07668",
    check=check_slice,
    after=lambda parameters, facts: replace(facts, masked=True),
)
def slice_masked(run: Run, parameters: SliceParameters, model: Artifact) -> Artifact:
    """Width: heads and FFN channels that are wholly masked go, as far as blocks stay as wide as the widest of them."""
    from ..blocks import Change, StoredModel, run_blocks

    with StoredModel(run, model) as stored, ArtifactWriter(run.store, "checkpoint") as writer:
        before = widths(stored.config)
        left = [_left(stored, index) for index in range(stored.blocks)]
        widest = Counts(max(len(one.groups) for one in left), max(len(one.channels) for one in left))
        padded = allowed_counts(stored.config, widest, before, parameters)

        def change(block: Block) -> Change:
            one = left[block.index]
            narrowed = narrow({**block.weights, **block.rest}, block.linears, before, one, padded)
            masks = narrow(block.masks, block.linears, before, one, padded)
            if all(bool(mask.all()) for mask in masks.values()):
                masks = {}
            removed = {name: 1 - share_left(linear, before, one) for name, linear in block.linears.items()}
            return Change(narrowed, frozenset(narrowed), masks, block.removal_notes(removed))

        run_blocks(run, stored, "slicing", change=change, writer=writer)
        run.note("left", {"groups": padded.groups, "channels": padded.channels})
        writer.share_files(stored.manifest)
        writer.add_file("config.json", json_file(narrowed_config(stored.config, *padded)))
        return writer.publish()


def _left(stored: StoredModel, index: int) -> Left:
    """What masks leave of a block."""
    masks = stored.reader.masks(stored.linear_shapes(index))
    return left_by_masks(masks, stored.linears(index), widths(stored.config))
