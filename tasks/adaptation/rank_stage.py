"""Stages that learn, with LoRA's terms, how many directions each weight's term gets: AdaLoRA and SoRA."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from pydantic import Field

from ...storage.artifacts import Artifact
from ..formats import FORMATS
from ..stage import ModelFacts, Run, stage
from .lora_stage import LoraParameters, check_lora, modules_named, note_training, publish_adapter, training_dtype

if TYPE_CHECKING:
    from torch import Tensor, nn

    from .diagonal import DiagonalLora
    from .layers import Frozen


class AdaLoraParameters(LoraParameters):
    """Parameters of AdaLoRA."""

    rank: int = Field(8, ge=1, description="of what is added to each weight in the end, in the mean over all weights")
    alpha: float = Field(16.0, gt=0, description="what is added is multiplied by alpha / initial_rank")
    initial_rank: int = Field(12, ge=1, description="of what is added to each weight at first")
    t_init: float = Field(0.1, ge=0, lt=1, description="share of the steps before ranks begin to fall")
    t_final: float = Field(0.3, ge=0, lt=1, description="share of the steps in which ranks fall no more")
    interval: int = Field(1, ge=1, description="steps from one choice of what is kept to the next")
    orthogonality: float = Field(0.1, ge=0, description="weight in the loss of how far P and Q are from orthogonal")
    beta1: float = Field(0.85, gt=0, lt=1, description="of the average of sensitivities")
    beta2: float = Field(0.85, gt=0, lt=1, description="of the average of their uncertainties")


class SoraParameters(LoraParameters):
    """Parameters of SoRA."""

    rank: int = Field(8, ge=1, description="of what is added to each weight at first")
    threshold: float = Field(
        3e-4, gt=0, description="what every update takes off the magnitude of each gate, which begin as N(0, 1)"
    )


def check_adalora(parameters: AdaLoraParameters, facts: ModelFacts) -> Iterator[str]:
    """Ranks must fall, and have time to."""
    if parameters.rank > parameters.initial_rank:
        yield (
            f"rank {parameters.rank} is above initial_rank {parameters.initial_rank}, but AdaLoRA only takes away; "
            "raise initial_rank"
        )
    if parameters.t_init + parameters.t_final >= 1:
        yield (
            f"t_init {parameters.t_init:g} and t_final {parameters.t_final:g} leave no steps in which ranks fall; "
            "their sum must be below 1"
        )
    yield from check_lora(parameters, facts, "initial_rank")


@stage(
    "adapt",
    "adalora",
    version=1,
    parameters=AdaLoraParameters,
    inputs={"model": "checkpoint", "data": "tokens"},
    output="adapter",
    accepts=frozenset(FORMATS),
    paper="Zhang et al. 2023 (AdaLoRA), arXiv:2303.10512",
    check=check_adalora,
)
def adalora(run: Run, parameters: AdaLoraParameters, model: Artifact, data: Artifact) -> Artifact:
    """LoRA that moves its ranks to the weights where they matter: the least important directions go while it trains."""
    import torch

    from . import adalora as maths
    from .diagonal import SingularLora

    def make(frozen: Frozen, shape: tuple[int, int]) -> DiagonalLora:
        rank = parameters.initial_rank
        return SingularLora(frozen, shape, rank, parameters.alpha / rank, parameters.dropout)

    def watch(layers: list[DiagonalLora], steps: int) -> dict[str, Any]:
        t_init, t_final = int(parameters.t_init * steps), int(parameters.t_final * steps)
        of_model = parameters.initial_rank * len(layers), parameters.rank * len(layers)
        terms = [(layer.b, layer.diagonal, layer.a) for layer in layers]
        importance = maths.Importance(terms)
        kept = torch.ones(len(layers), parameters.initial_rank, dtype=torch.bool, device=run.device)

        def before_update(step: int) -> None:
            with torch.enable_grad():
                penalty = maths.orthogonality([(p, q) for p, _, q in terms])
                (parameters.orthogonality * penalty).backward()
            if step + 1 < steps - t_final:
                importance.observe(parameters.beta1, parameters.beta2)

        def after_update(step: int, rate: float) -> None:
            done = step + 1
            chosen = t_init < done < steps - t_final and done % parameters.interval == 0
            if chosen or done == steps - t_final:
                budget = maths.budget_after(done, steps, *of_model, t_init, t_final)
                kept.copy_(maths.most_important(importance.scores(), budget))
            if chosen or done >= steps - t_final:
                for layer, mask in zip(layers, kept, strict=True):
                    layer.diagonal.data.mul_(mask)

        memory = {**importance.tensors, "kept": kept}
        return {"memory": memory, "before_update": before_update, "after_update": after_update}

    return _adapter(run, parameters, model, data, make, watch)


@stage(
    "adapt",
    "sora",
    version=1,
    parameters=SoraParameters,
    inputs={"model": "checkpoint", "data": "tokens"},
    output="adapter",
    accepts=frozenset(FORMATS),
    paper="Ding et al. 2023 (SoRA), arXiv:2311.11696",
    check=check_lora,
)
def sora(run: Run, parameters: SoraParameters, model: Artifact, data: Artifact) -> Artifact:
    """LoRA with a gate on each direction that every update pulls towards zero; directions whose gate is shut go."""
    from .diagonal import GatedLora, soft_threshold

    def make(frozen: Frozen, shape: tuple[int, int]) -> DiagonalLora:
        return GatedLora(frozen, shape, parameters.rank, parameters.alpha / parameters.rank, parameters.dropout)

    def watch(layers: list[DiagonalLora], steps: int) -> dict[str, Any]:
        def after_update(step: int, rate: float) -> None:
            for layer in layers:
                layer.diagonal.data.copy_(soft_threshold(layer.diagonal.data, parameters.threshold))

        return {"after_update": after_update}

    return _adapter(run, parameters, model, data, make, watch)


def _adapter(
    run: Run,
    parameters: LoraParameters,
    model: Artifact,
    data: Artifact,
    make: Callable[[Frozen, tuple[int, int]], DiagonalLora],
    watch: Callable[[list[DiagonalLora], int], Mapping[str, Any]],
) -> Artifact:
    """The adapter of what training leaves of the layers that `make` makes.

    watch: further arguments of `train`, for these layers and the number of steps.
    """
    import torch

    from ..blocks import StoredModel
    from .network import Network
    from .training import read_examples, step_count, train

    with StoredModel(run, model) as stored:
        wanted = {
            f"{stored.family.block_prefix(index)}{name}.weight"
            for index in range(stored.blocks)
            for name in modules_named(stored.config, parameters.modules)
        }

        def replace(name: str, frozen: Frozen, shape: tuple[int, int], mask: Tensor | None) -> nn.Module:
            return make(frozen, shape) if name in wanted else frozen

        torch.manual_seed(parameters.seed)
        examples = read_examples(run, data, stored)
        dtype = training_dtype(parameters.dtype, stored)
        network = Network(run, stored, dtype, replace, gradient_checkpointing=parameters.gradient_checkpointing)
        layers: dict[str, Any] = {name: layer for name, layer in network.layers.items() if name in wanted}
        learned = network.learned()
        further = watch(list(layers.values()), step_count(parameters, len(examples)))
        losses = train(run, learned, parameters, examples, network.loss, **further)
        note_training(run, parameters, losses, sum(parameter.numel() for parameter in learned.values()))
        run.note("ranks", {name: layer.rank() for name, layer in layers.items()})
        return publish_adapter(run, stored, model, {name: layer.factors() for name, layer in layers.items()})
