"""Distillation: a compressed model is trained to predict what a teacher predicts, or to compute what it computes.

The teacher is any checkpoint of the same vocabulary, packed or with an adapter too. It is in memory beside the student,
frozen, and runs on the windows at hand: nothing of what it says is stored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from ...storage.artifacts import Artifact
from ..architectures import block_count
from ..pruning.order import parse_order
from ..stage import ModelFacts, Run, StageError, stage
from .lora_stage import LoraParameters, check_lora, modules_named, note_training, publish_merged, training_dtype

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ..blocks import StoredModel
    from .layers import Frozen
    from .network import Network


class DistillationParameters(LoraParameters):
    """Parameters of distillation."""

    train: Literal["lora", "full"] = Field(
        "lora", description="low-rank terms, merged when trained, or all weights of the blocks; masks are kept by both"
    )
    teacher_weight: float = Field(
        0.5, ge=0, le=1, description="a in (1 - a) cross-entropy with the text + a temperature^2 KL with the teacher"
    )
    temperature: float = Field(1.0, gt=0, description="both models' logits are divided by it in the KL")

    @model_validator(mode="after")
    def _only_what_is_trained(self) -> DistillationParameters:
        fields = ((name, type(self).model_fields[name]) for name in ("rank", "alpha", "dropout", "modules"))
        unused = [name for name, field in fields if getattr(self, name) != field.default]
        if self.train == "full" and unused:
            raise ValueError(f"'{unused[0]}' is of 'train: lora', and 'train: full' has none; drop it")
        return self


class HiddenParameters(DistillationParameters):
    """Parameters of distillation from block outputs."""

    distance: Literal["mse", "cosine"] = Field(
        "cosine", description="of two blocks' outputs: 1 - cos, or mse, which few very large features decide"
    )
    hidden_weight: float = Field(1.0, gt=0, description="the mean distance is multiplied by it and added to the loss")
    blocks: str | tuple[int, ...] | None = Field(
        None,
        description="the teacher's block for each of the student's, as '0-19 26-29'; left out: the one it came from",
    )

    @model_validator(mode="after")
    def _readable_blocks(self) -> HiddenParameters:
        if isinstance(self.blocks, str):
            parse_order(self.blocks)
        return self

    def counterparts(self) -> list[int] | None:
        """The teacher's block for each of the student's, where they are given."""
        if self.blocks is None:
            return None
        return parse_order(self.blocks) if isinstance(self.blocks, str) else list(self.blocks)


def check_distillation(parameters: DistillationParameters, facts: ModelFacts) -> Iterator[str]:
    """Student and teacher must share a vocabulary, and low-rank terms must fit."""
    if parameters.train == "lora":
        yield from check_lora(parameters, facts)
    if facts.original is None:
        return
    mine, theirs = facts.config.get("vocab_size"), facts.original.config.get("vocab_size")
    if mine != theirs:
        yield (
            f"the student's vocabulary has {mine} tokens and the teacher's {theirs}, but both must read the same "
            "tokens; name a teacher of the student's own family"
        )


def check_hidden(parameters: HiddenParameters, facts: ModelFacts) -> Iterator[str]:
    """Blocks must be there, and their outputs as wide as each other."""
    yield from check_distillation(parameters, facts)
    blocks, count = parameters.counterparts(), block_count(facts.config)
    if blocks is not None and len(blocks) != count:
        yield f"blocks names {len(blocks)} of the teacher's blocks, but the student has {count}, and each needs one"
    if facts.original is None:
        return
    there = block_count(facts.original.config)
    wrong = [block for block in blocks or () if not 0 <= block < there]
    if wrong:
        yield f"blocks: the teacher has no block {wrong[0]}; it has blocks 0 to {there - 1}"
    mine, theirs = facts.config["hidden_size"], facts.original.config["hidden_size"]
    if mine != theirs:
        yield (
            f"the student's blocks put out {mine} features and the teacher's {theirs}, which can't be compared; "
            "use method kl, which compares predictions"
        )


_DISTILL: dict[str, Any] = {
    "version": 1,
    "inputs": {"model": "checkpoint", "teacher": "checkpoint", "data": "tokens"},
    "output": "checkpoint",
}


@stage(
    "distill",
    "kl",
    parameters=DistillationParameters,
    paper="Hinton et al. 2015, arXiv:1503.02531",
    check=check_distillation,
    **_DISTILL,
)
def kl(run: Run, parameters: DistillationParameters, model: Artifact, teacher: Artifact, data: Artifact) -> Artifact:
    """The student is trained on the text and on the teacher's probabilities of each next token."""
    from . import distillation

    return _distill(run, parameters, model, teacher, data, distillation.forward_kl)


@stage(
    "distill",
    "reverse-kl",
    parameters=DistillationParameters,
    paper="Gu et al. 2023 (MiniLLM), arXiv:2306.08543; over given text, not over what the student writes",
    check=check_distillation,
    **_DISTILL,
)
def reverse(
    run: Run, parameters: DistillationParameters, model: Artifact, teacher: Artifact, data: Artifact
) -> Artifact:
    """As kl, but what counts is that the student says nothing the teacher would not."""
    from . import distillation

    return _distill(run, parameters, model, teacher, data, distillation.reverse_kl)


@stage(
    "distill",
    "hidden",
    parameters=HiddenParameters,
    paper="Romero et al. 2014 (FitNets), arXiv:1412.6550, from block to block",
    check=check_hidden,
    **_DISTILL,
)
def hidden(run: Run, parameters: HiddenParameters, model: Artifact, teacher: Artifact, data: Artifact) -> Artifact:
    """As kl, and each of the student's blocks is to put out what the teacher's block that it came from does."""
    from . import distillation

    distance = distillation.squared_distance if parameters.distance == "mse" else distillation.cosine_distance
    return _distill(run, parameters, model, teacher, data, distillation.forward_kl, distance)


def _distill(
    run: Run,
    parameters: DistillationParameters,
    model: Artifact,
    teacher: Artifact,
    data: Artifact,
    divergence: Callable[[Tensor, Tensor, float], Tensor],
    distance: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Artifact:
    """The student after training: with distance, also on what the blocks put out."""
    import torch

    from ..blocks import StoredModel, read_windows, resolve_dtype
    from .layers import Lora, MaskedWeight
    from .network import Network
    from .training import read_examples, train

    with StoredModel(run, model) as stored, StoredModel(run, teacher) as stored_teacher:
        pairs: list[tuple[int, int]] = []
        if isinstance(parameters, HiddenParameters):
            pairs = list(enumerate(parameters.counterparts() or origins(stored, stored_teacher)))
            run.note("blocks", [block for _, block in pairs])
        examples = read_examples(run, data, stored)
        read_windows(run, data, stored_teacher, padded=True)
        torch.manual_seed(parameters.seed)
        student = Network(
            run,
            stored,
            training_dtype(parameters.dtype, stored),
            _learning(stored, parameters),
            gradient_checkpointing=parameters.gradient_checkpointing,
        )
        frozen = Network(
            run, stored_teacher, resolve_dtype("auto", stored_teacher), lambda name, layer, shape, mask: layer
        )
        learned = student.learned()
        loss = objective(parameters, student, frozen, divergence, pairs, distance)
        losses = train(run, learned, parameters, examples, loss, what="distilling")
        note_training(run, parameters, losses, sum(parameter.numel() for parameter in learned.values()))
        layers = student.layers.items()
        return publish_merged(
            run, stored, {name: layer.merged() for name, layer in layers if isinstance(layer, Lora | MaskedWeight)}
        )


def _learning(
    stored: StoredModel, parameters: DistillationParameters
) -> Callable[[str, Frozen, tuple[int, int], Tensor | None], nn.Module]:
    """What makes the student's layers."""
    from .layers import Lora, MaskedLora, MaskedWeight

    wanted = tuple(f".{name}.weight" for name in modules_named(stored.config, parameters.modules))
    low_rank = (parameters.rank, parameters.alpha / parameters.rank, parameters.dropout)

    def make(name: str, frozen: Frozen, shape: tuple[int, int], mask: Tensor | None) -> nn.Module:
        if parameters.train == "full":
            return MaskedWeight(frozen, mask)
        if not name.endswith(wanted):
            return frozen
        return Lora(frozen, shape, *low_rank) if mask is None else MaskedLora(frozen, mask, shape, *low_rank)

    return make


def objective(
    parameters: DistillationParameters,
    student: Network,
    teacher: Network,
    divergence: Callable[[Tensor, Tensor, float], Tensor],
    pairs: Sequence[tuple[int, int]] = (),
    distance: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Callable[[Tensor, Tensor], Tensor]:
    """The loss that `train` takes, summed over the tokens that count.

    divergence: of the student's logits, the teacher's, and the temperature. pairs: (the student's block, the teacher's)
    whose outputs, where the tokens that count are predicted, are compared by distance.
    """
    import torch
    from torch.nn.functional import cross_entropy

    share = parameters.teacher_weight

    def of_logits(logits: Tensor, features: Tensor, targets: Tensor) -> Tensor:
        loss = (1 - share) * cross_entropy(logits, targets, reduction="sum")
        if share == 0:
            return loss
        with torch.no_grad():
            expected = teacher.logits(features)
        return loss + share * divergence(logits, expected, parameters.temperature)

    def loss(windows: Tensor, counted: Tensor) -> Tensor:
        with torch.no_grad(), block_outputs(teacher, {block for _, block in pairs}) as wanted:
            theirs = teacher.features(windows)[:, :-1][counted]
        with block_outputs(student, {block for block, _ in pairs}) as found:
            mine = student.features(windows)[:, :-1][counted]
        total = student.over_tokens(of_logits, mine, theirs, windows[:, 1:][counted])
        if not isinstance(parameters, HiddenParameters) or distance is None or not pairs:
            return total
        apart = torch.zeros((), device=total.device)
        for block, counterpart in pairs:
            apart = apart + distance(found[block][:, :-1][counted], wanted[counterpart][:, :-1][counted])
        return total + parameters.hidden_weight * apart / len(pairs)

    return loss


@contextmanager
def block_outputs(network: Network, blocks: Iterable[int]) -> Iterator[dict[int, Tensor]]:
    """{block: its output [windows, length, hidden]} of the forward pass made inside."""
    found: dict[int, Tensor] = {}

    def keep(number: int) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: object, output: Tensor | tuple[Tensor, ...]) -> None:
            found[number] = output[0] if isinstance(output, tuple) else output

        return hook

    handles = [network.blocks[number].register_forward_hook(keep(number)) for number in blocks]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def origins(student: StoredModel, teacher: StoredModel) -> list[int]:
    """The teacher's block that each of the student's came from: the one it shares the most tensors with.

    Compression leaves norms as they are, and what is equal is one blob in the store. Raises StageError where nothing
    is shared, or as much with several blocks.
    """
    blocks = []
    for index in range(student.blocks):
        mine = _contents(student, index)
        shared = [len(mine & _contents(teacher, block)) for block in range(teacher.blocks)]
        best = [block for block, count in enumerate(shared) if count == max(shared)]
        if max(shared) == 0 or len(best) > 1:
            why = "no tensor" if max(shared) == 0 else f"as much with the teacher's blocks {best[0]} and {best[1]}"
            raise StageError(
                f"block {index} of the student shares {why}{' with the teacher' if max(shared) == 0 else ''}, so which "
                "one it came from can't be told; say it for each block, as blocks: '0-19 26-29'"
            )
        blocks.append(best[0])
    return blocks


def _contents(stored: StoredModel, index: int) -> set[tuple[str, str]]:
    """Where a block's tensors are; equal ones of one origin are in the same place."""
    entries = (stored.manifest.tensors[name] for name in stored.names(index))
    return {(entry.blob, entry.name) for entry in entries}
