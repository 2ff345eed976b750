"""LoSA as a stage: rounds of pruning a little more and training what stays, ranks going where pruning hurt most.

Each round prunes the model that the last one left, by a stage of `pruning`, whose result is in the store like any
other; so a variant of LoSA finds there what it has in common with another, and a killed one what it had finished.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from ...storage.artifacts import Artifact
from ..architectures import block_count
from ..pruning.selection import parse_pattern
from ..pruning.stage import PruneParameters, check_pruning
from ..pruning.statistics import StreamParameters, read_blocks, write_blocks
from ..pruning.wanda_sp_stage import WandaSpParameters
from ..pruning.width_stage import check_width, facts_after
from ..stage import ModelFacts, Run, StageError, facts_of, obtain, stage
from .lora_stage import (
    LoraParameters,
    check_lora,
    modules_named,
    note_training,
    publish_merged,
    relative,
    training_dtype,
)
from .losa import allocate_ranks, relative_error, resize, round_rank, round_sparsity

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from .layers import Frozen


class LosaParameters(LoraParameters):
    """Parameters of LoSA."""

    sparsity: float | None = Field(None, gt=0, lt=1, description="share of the weights removed in the end")
    pattern: str | None = Field(None, description="N:M sparsity instead: '2:8' keeps two in each eight inputs")
    criterion: Literal["wanda", "sparsegpt", "magnitude", "pruner-zero", "gblm", "alps", "wanda-sp"] = Field(
        "wanda", description="by which each round prunes; wanda-sp: heads and FFN channels, sliced off in the end"
    )
    rounds: int = Field(5, ge=1, description="of pruning and training")
    sparsity_schedule: Literal["cubic", "linear"] = Field("cubic", description="of the share removed, over the rounds")
    last_round: float = Field(0.6, gt=0, le=1, description="share of all steps that are trained in the last round")
    max_rank: int = Field(16, ge=1, description="of any block")
    layer_rates: bool = Field(True, description="blocks lose more where they resemble others (LSR); else all the same")
    rank_allocation: bool = Field(True, description="ranks by reconstruction errors (SRA); else all the same")
    gradual: bool = Field(True, description="sparsity and ranks rise over the rounds (DSA); else one round does it all")
    rank_truncation: bool = Field(False, description="ranks above `rank` count as it: what LoSA's code does")
    rmi_solver: Literal["exact", "slsqp"] = Field("exact", description="of the rates by block; slsqp as in LoSA's code")
    rmi_beta: float = Field(1.0, gt=0, description="for slsqp: LoSA's code has 1 for Wanda, 100 for SparseGPT")

    @model_validator(mode="after")
    def _checked(self) -> LosaParameters:
        if self.structured and self.pattern is not None:
            raise ValueError(
                "pattern is for weights, but wanda-sp removes heads and channels; write 'sparsity' instead"
            )
        if self.structured and self.sparsity is None:
            raise ValueError("say how much of the blocks' weights wanda-sp is to remove: 'sparsity: 0.2'")
        if self.structured and self.rmi_solver != "exact":
            raise ValueError("rmi_solver slsqp is for weights; leave it out with wanda-sp")
        self.pruning(self.count)
        if self.rank_allocation and self.max_rank < round_rank(self.count, self.count, self.rank):
            raise ValueError(f"max_rank {self.max_rank} leaves no room above rank {self.rank}; write {2 * self.rank}")
        return self

    @property
    def count(self) -> int:
        """The number of rounds."""
        return self.rounds if self.gradual else 1

    @property
    def structured(self) -> bool:
        """Whether heads and channels go rather than weights."""
        return self.criterion == "wanda-sp"

    def pruning(self, number: int) -> dict[str, Any]:
        """The settings of the pruning stage in round 1..count."""
        settings: dict[str, Any] = {"dtype": self.dtype}
        if self.structured:
            settings |= {"masked": True, "allocation": "rmi" if self.layer_rates else "uniform"}
            share = WandaSpParameters.model_validate({**settings, "sparsity": self.sparsity}).sparsity
            return {**settings, "sparsity": round_sparsity(number, self.count, share, self.sparsity_schedule)}
        if self.layer_rates:
            settings |= {"allocation": "rmi", "rmi_solver": self.rmi_solver, "rmi_beta": self.rmi_beta}
        if self.pattern is None:
            whole = PruneParameters.model_validate({**settings, "sparsity": self.sparsity})
            return {**settings, "sparsity": round_sparsity(number, self.count, whole.mean, self.sparsity_schedule)}
        pattern = parse_pattern(self.pattern)
        share = round_sparsity(number, self.count, 1 - pattern.kept / pattern.group, self.sparsity_schedule)
        kept = pattern.group - max(1, round(share * pattern.group))
        if not 2 <= kept <= pattern.group - 2:  # no room for blocks that keep one more and one less
            settings = {"dtype": self.dtype}
        PruneParameters.model_validate({"pattern": self.pattern, "sparsity": self.sparsity})
        return {**settings, "pattern": f"{kept}:{pattern.group}"}


def check_losa(parameters: LosaParameters, facts: ModelFacts) -> Iterator[str]:
    """Ranks must fit into each layer, N:M groups fill the rows, rounds have a step each."""
    yield from check_lora(parameters.model_copy(update={"rank": max(parameters.rank, parameters.max_rank)}), facts)
    if parameters.steps is not None and parameters.steps < parameters.count:
        yield (
            f"{parameters.steps} training steps are too few for {parameters.count} rounds; give as many steps or more, "
            "or fewer rounds"
        )
    settings = parameters.pruning(parameters.count)
    if parameters.structured:
        yield from check_width(WandaSpParameters(**settings), facts)
    else:
        yield from check_pruning(PruneParameters(**settings), facts)


def facts_after_losa(parameters: LosaParameters, facts: ModelFacts) -> ModelFacts:
    """Masked; narrower where heads and channels go, unless each block loses a share of its own, then not known yet."""
    if parameters.structured and not parameters.layer_rates:
        settings = parameters.pruning(parameters.count)
        return facts_after(WandaSpParameters(**{**settings, "masked": False}), facts)
    return replace(facts, masked=True)


@stage(
    "statistics",
    "reconstruction",
    version=1,
    parameters=StreamParameters,
    inputs={"model": "checkpoint", "original": "checkpoint", "calibration": "tokens"},
    output="statistics",
    paper="Huang et al. 2025 (LoSA), section 3.3, arXiv:2501.07668",
)
def reconstruction(
    run: Run, parameters: StreamParameters, model: Artifact, original: Artifact, calibration: Artifact
) -> Artifact:
    """How far each block's outputs are from those of the original model, each feature relative to its energy there."""
    import torch

    from ..blocks import StoredModel, not_finite, read_windows, resolve_dtype
    from ..skeleton import Skeleton

    errors = []
    with StoredModel(run, model) as sparse, StoredModel(run, original) as dense, torch.no_grad():
        windows = read_windows(run, calibration, sparse)
        dtype = resolve_dtype(parameters.dtype, sparse)
        sides = [(one, Skeleton(one.config, dtype, run.device)) for one in (dense, sparse)]
        states = [skeleton.embed(one.outer(dtype), windows) for one, skeleton in sides]
        for index in range(sparse.blocks):
            for (one, skeleton), hidden in zip(sides, states, strict=True):
                one.prefetch(index + 1)
                skeleton.advance(index, one.dense(index, dtype), hidden)
            errors.append(relative_error(*states))
            if not math.isfinite(errors[-1]):
                raise not_finite(f"the outputs of block {index}", dtype)
            run.progress("comparing", index + 1, sparse.blocks)
            run.stop_if_asked()
    return write_blocks(run, errors)


@stage(
    "adapt",
    "losa",
    version=1,
    parameters=LosaParameters,
    inputs={"model": "checkpoint", "calibration": "tokens", "data": "tokens"},
    output="checkpoint",
    paper="Huang et al. 2025, arXiv:2501.07668",
    check=check_losa,
    after=facts_after_losa,
)
def losa(run: Run, parameters: LosaParameters, model: Artifact, calibration: Artifact, data: Artifact) -> Artifact:
    """Prune a little more each round, by rates that fit the blocks; train masked terms whose ranks fit the damage."""
    rounds = _Rounds(run, parameters, model, calibration, data)
    for number in range(rounds.first, parameters.count):
        rounds.train(number, *rounds.prune(number))
    note_training(run, parameters, rounds.losses, rounds.learned_parameters)
    run.merge_notes({"ranks": rounds.ranks})
    note_sparsity(run, rounds.current)
    return rounds.sliced() if parameters.structured else rounds.current


class _Rounds:
    """Where LoSA is: the model after the last round, its terms, and what the journal knows of rounds before.

    A round is committed to the journal when it begins, with its pruned model, its ranks and the losses of the round
    before; the training of each keeps its own state there, and at its end too, since the next one begins with it.
    """

    def __init__(
        self, run: Run, parameters: LosaParameters, model: Artifact, calibration: Artifact, data: Artifact
    ) -> None:
        assert run.journal is not None
        self.run, self.parameters = run, parameters
        self.journal, self.state = run.journal, run.journal.state()
        self.model, self.calibration, self.data = model, calibration, data
        self.begun = {step["round"]: step for step in self.journal.steps if "round" in step}
        self.first = 0 if self.state is None else int(self.state.record["phase"])
        self.losses: list[float] = [loss for number in range(self.first + 1) for loss in self._losses_before(number)]
        self.ranks = {f"round {number + 1}": self.begun[number]["ranks"] for number in range(self.first)}
        self.current = model
        self.learned_parameters = 0
        self._terms: dict[str, tuple[Tensor, Tensor]] = {}  # A and B of the last round
        self._last: list[float] = []

    def prune(self, number: int) -> tuple[Artifact, list[int]]:
        """The pruned model of a round (from 0), and the rank of each block in it."""
        if self.state is not None and number == self.first:
            return Artifact("checkpoint", self.begun[number]["artifacts"][0]), self.begun[number]["ranks"]
        inputs = {"model": self.current, "calibration": self.calibration}
        settings = self.parameters.pruning(number + 1)
        pruned = self._obtain(number, f"prune/{self.parameters.criterion}", inputs, **settings)
        ranks = self._allocate(number, pruned)
        kept = {"artifacts": [pruned.id, self.current.id], "ranks": ranks, "losses": self._last}
        self.journal.commit({"round": number, **kept, "seconds": 0.0})
        return pruned, ranks

    def train(self, number: int, pruned: Artifact, ranks: list[int]) -> None:
        """Train a round's terms and merge them; `current` is the result."""
        import torch

        from ..blocks import StoredModel
        from .layers import MaskedLora
        from .network import Network
        from .training import read_examples, step_count, train

        parameters = self.parameters
        self.ranks[f"round {number + 1}"] = ranks
        generator = torch.Generator().manual_seed(parameters.seed * 1_000_003 + number)
        torch.manual_seed(parameters.seed + number)
        with StoredModel(self.run, pruned) as stored:
            wanted = modules_named(stored.config, parameters.modules)

            def make(name: str, frozen: Frozen, shape: tuple[int, int], mask: Tensor | None) -> nn.Module:
                index = stored.family.block_of(name)
                if relative(stored, name) not in wanted or mask is None or index is None:
                    return frozen
                start = self._start(number, name, ranks[index], generator)
                scale = parameters.alpha / parameters.rank
                return MaskedLora(frozen, mask, shape, ranks[index], scale, parameters.dropout, start)

            examples = read_examples(self.run, self.data, stored)
            steps = share_steps(step_count(parameters, len(examples)), parameters.count, parameters.last_round)
            dtype = training_dtype(parameters.dtype, stored)
            checkpointing = parameters.gradient_checkpointing
            network = Network(self.run, stored, dtype, make, gradient_checkpointing=checkpointing)
            layers = {name: layer for name, layer in network.layers.items() if isinstance(layer, MaskedLora)}
            learned = network.learned()
            self.learned_parameters = sum(parameter.numel() for parameter in learned.values())
            self._last = train(
                self.run,
                learned,
                parameters.model_copy(update={"steps": steps[number]}),
                examples,
                network.loss,
                phase=number,
                what=self._said(number, "training"),
                memory={
                    f"{name}.{which}": tensor
                    for name, layer in layers.items()
                    for which, tensor in (("a", layer.start_a), ("b", layer.start_b))
                    if tensor is not None
                },
                save_at_end=number + 1 < parameters.count,
            )
            self.losses += self._last
            self._terms = {name: (layer.a.detach(), layer.b.detach()) for name, layer in layers.items()}
            self.current = publish_merged(self.run, stored, {name: layer.merged() for name, layer in layers.items()})

    def sliced(self) -> Artifact:
        """The last round's model without the heads and channels that are masked."""
        return self._obtain(self.parameters.count - 1, "prune/slice", {"model": self.current})

    def _allocate(self, number: int, pruned: Artifact) -> list[int]:
        """The rank of each block in a round."""
        parameters = self.parameters
        if not parameters.rank_allocation:
            return [parameters.rank] * block_count(facts_of(self.run.store, pruned).config)
        compared = {"model": pruned, "original": self.model, "calibration": self.calibration}
        errors = self._obtain(number, "statistics/reconstruction", compared, dtype=parameters.dtype)
        mean = round_rank(number + 1, parameters.count, parameters.rank)
        ranks = allocate_ranks(read_blocks(self.run.store, errors), mean, parameters.max_rank)
        return [min(rank, parameters.rank) for rank in ranks] if parameters.rank_truncation else ranks

    def _start(self, number: int, name: str, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor] | None:
        """A and B that a layer's training begins with in a round; None for new ones."""
        if self.state is not None and number == self.first:
            kept = self.state.tensors
            return (kept[f"memory.{name}.a"], kept[f"memory.{name}.b"]) if f"memory.{name}.a" in kept else None
        return resize(*self._terms[name], rank, generator) if name in self._terms else None

    def _losses_before(self, number: int) -> list[float]:
        """The losses of the round before one."""
        losses: list[float] = self.begun[number]["losses"] if number in self.begun else []
        return losses

    def _obtain(self, number: int, name: str, inputs: dict[str, Artifact], **settings: Any) -> Artifact:
        def progress(what: str, done: int, total: int) -> None:
            self.run.progress(self._said(number, what), done, total)

        return obtain(replace(self.run, progress=progress), name, inputs, **settings)

    def _said(self, number: int, what: str) -> str:
        return f"round {number + 1} of {self.parameters.count}, {what}"


def share_steps(steps: int, rounds: int, last: float) -> list[int]:
    """The steps of each round, at least one: a share `last` in the last one, the others alike."""
    if steps < rounds:
        raise StageError(f"{steps} training steps are too few for {rounds} rounds; give more steps, epochs or data")
    if rounds == 1:
        return [steps]
    before = min(max(round(steps * (1 - last)), rounds - 1), steps - 1)
    even, more = divmod(before, rounds - 1)
    return [even + (number < more) for number in range(rounds - 1)] + [steps - before]


def note_sparsity(run: Run, artifact: Artifact) -> None:
    """The share of each weight that masks removed, for the provenance."""
    from ..blocks import StoredModel

    with StoredModel(run, artifact) as stored:
        for index in range(stored.blocks):
            shapes = stored.linear_shapes(index)
            masks = stored.reader.masks(shapes)
            removed = {name: 1 - int(mask.count_nonzero()) / mask.numel() for name, mask in masks.items()}
            gone = sum(removed[name] * mask.numel() for name, mask in masks.items())
            whole = sum(rows * columns for rows, columns in shapes.values())
            run.merge_notes({"sparsity": removed, "share_of_block": {str(index): gone / whole}})
