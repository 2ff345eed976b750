"""Stages that train: LoRA beside a checkpoint, masked LoRA within a pruned one, and all its surviving weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from ...storage.artifacts import Artifact, ArtifactWriter
from ..architectures import family_of
from ..formats import FORMATS
from ..stage import ModelFacts, Parameters, Run, StageError, json_file, stage
from . import peft_format

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from ..blocks import StoredModel
    from .layers import Frozen


class TrainingParameters(Parameters):
    """Parameters of everything that is trained."""

    steps: int | None = Field(None, ge=1, description="updates of the weights; left out: as many as the epochs have")
    epochs: float = Field(1.0, gt=0, description="how often the data is gone through")
    batch_size: int = Field(16, ge=1, description="windows of one update")
    micro_batch_size: int = Field(4, ge=1, description="windows that go through the model together")
    learning_rate: float = Field(2e-4, gt=0, description="at its peak")
    schedule: Literal["linear", "cosine", "constant"] = Field("linear", description="of the learning rate")
    warmup: float = Field(0.03, ge=0, le=1, description="share of the steps in which the learning rate rises")
    weight_decay: float = Field(0.0, ge=0, description="of AdamW")
    max_grad_norm: float = Field(1.0, ge=0, description="longer gradients are shortened to it; 0: never")
    optimizer: Literal["adamw", "paged-adamw-8bit"] = Field("adamw", description="the latter needs a CUDA device")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="of the frozen weights and the passes; auto is the checkpoint's own, float32 for float16"
    )
    gradient_checkpointing: bool = Field(False, description="run blocks again instead of keeping their activations")
    seed: int = Field(0, ge=0, description="of the order of the data, the first weights and dropout")


class LoraParameters(TrainingParameters):
    """Parameters of LoRA."""

    rank: int = Field(8, ge=1, description="of what is added to each weight")
    alpha: float = Field(16.0, gt=0, description="what is added is multiplied by alpha / rank")
    dropout: float = Field(0.0, ge=0, lt=1, description="share of the inputs that what is added does not see")
    modules: tuple[str, ...] | None = Field(
        None, description="which layers, as [q_proj, v_proj]; left out: all linear layers of the blocks"
    )


def modules_named(config: Any, wanted: tuple[str, ...] | None) -> set[str]:
    """Names, relative to the block, of the linear layers that are wanted by the last part of their name."""
    names = {linear.name for linear in family_of(config).linears}
    return names if wanted is None else {name for name in names if name.rpartition(".")[2] in wanted}


def check_lora(parameters: LoraParameters, facts: ModelFacts, field: str = "rank") -> Iterator[str]:
    """The rank, which stands in the field, must fit into each layer, and the layers must be there."""
    rank = getattr(parameters, field)
    weights = family_of(facts.config).linear_weights(facts.config)
    last = {name.removesuffix(".weight").rpartition(".")[2]: shape for name, shape in weights.items()}
    for name in parameters.modules or ():
        if name not in last:
            yield f"modules: the blocks have no layer '{name}'; there is {', '.join(last)}"
            return
    for name, (rows, columns) in last.items():
        if rank > min(rows, columns):
            yield f"{field} {rank} is more than {name} of {rows} x {columns} has; at most {min(rows, columns)}"
            return


def check_masked(parameters: LoraParameters, facts: ModelFacts) -> Iterator[str]:
    """There must be masks."""
    if not facts.masked:
        yield "the model has no masks, since nothing pruned it; use method lora, or name a pruned checkpoint"
    yield from check_lora(parameters, facts)


def training_dtype(name: str, stored: StoredModel) -> torch.dtype:
    """The dtype of the passes; gradients underflow in float16."""
    import torch

    from ..blocks import resolve_dtype

    dtype = resolve_dtype(name, stored)
    return torch.float32 if dtype == torch.float16 else dtype


@stage(
    "adapt",
    "lora",
    version=1,
    parameters=LoraParameters,
    inputs={"model": "checkpoint", "data": "tokens"},
    output="adapter",
    accepts=frozenset(FORMATS),
    paper="Hu et al. 2021, arXiv:2106.09685; over packed weights Dettmers et al. 2023 (QLoRA), arXiv:2305.14314",
    check=check_lora,
)
def lora(run: Run, parameters: LoraParameters, model: Artifact, data: Artifact) -> Artifact:
    """A low-rank term beside each weight, trained on text; the weights stay as they are, packed ones packed (QLoRA)."""
    from ..blocks import StoredModel
    from .layers import Lora

    with StoredModel(run, model) as stored:
        wanted = modules_named(stored.config, parameters.modules)

        def make(name: str, frozen: Frozen, shape: tuple[int, int], mask: Tensor | None) -> nn.Module:
            if relative(stored, name) not in wanted:
                return frozen
            return Lora(frozen, shape, parameters.rank, parameters.alpha / parameters.rank, parameters.dropout)

        layers = _trained(run, parameters, stored, data, make)
        terms = {name: layer.factors() for name, layer in layers.items() if isinstance(layer, Lora)}
        return publish_adapter(run, stored, model, terms)


@stage(
    "adapt",
    "sparse-lora",
    version=1,
    parameters=LoraParameters,
    inputs={"model": "checkpoint", "data": "tokens"},
    output="checkpoint",
    paper="Huang et al. 2025 (LoSA), section 3, arXiv:2501.07668",
    check=check_masked,
)
def sparse_lora(run: Run, parameters: LoraParameters, model: Artifact, data: Artifact) -> Artifact:
    """A low-rank term under each pruned weight's mask, merged when trained: what was pruned stays zero."""
    from ..blocks import StoredModel
    from .layers import MaskedLora

    with StoredModel(run, model) as stored:
        wanted = modules_named(stored.config, parameters.modules)
        scale = parameters.alpha / parameters.rank

        def make(name: str, frozen: Frozen, shape: tuple[int, int], mask: Tensor | None) -> nn.Module:
            import torch

            if relative(stored, name) not in wanted:
                return frozen
            whole = torch.ones(shape, dtype=torch.bool) if mask is None else mask
            return MaskedLora(frozen, whole, shape, parameters.rank, scale, parameters.dropout)

        layers = _trained(run, parameters, stored, data, make)
        merged = {name: layer.merged() for name, layer in layers.items() if isinstance(layer, MaskedLora)}
        return publish_merged(run, stored, merged)


@stage(
    "adapt",
    "full",
    version=1,
    parameters=TrainingParameters,
    inputs={"model": "checkpoint", "data": "tokens"},
    output="checkpoint",
    paper="Sun et al. 2023 (Wanda), which fine-tunes under fixed masks, arXiv:2306.11695",
)
def full(run: Run, parameters: TrainingParameters, model: Artifact, data: Artifact) -> Artifact:
    """All weights of the linear layers are trained, in float32; those that were pruned stay zero."""
    from ..blocks import StoredModel
    from .layers import MaskedWeight

    def make(name: str, frozen: Frozen, shape: tuple[int, int], mask: Tensor | None) -> nn.Module:
        return MaskedWeight(frozen, mask)

    with StoredModel(run, model) as stored:
        layers = _trained(run, parameters, stored, data, make)
        merged = {name: layer.merged() for name, layer in layers.items() if isinstance(layer, MaskedWeight)}
        return publish_merged(run, stored, merged)


def _trained(
    run: Run,
    parameters: TrainingParameters,
    stored: StoredModel,
    data: Artifact,
    make: Callable[[str, Frozen, tuple[int, int], Tensor | None], nn.Module],
) -> dict[str, nn.Module]:
    """Train the layers that `make` makes on the loss of the data's next tokens."""
    import torch

    from .network import Network
    from .training import read_examples, train

    torch.manual_seed(parameters.seed)
    examples = read_examples(run, data, stored)
    dtype = training_dtype(parameters.dtype, stored)
    network = Network(run, stored, dtype, make, gradient_checkpointing=parameters.gradient_checkpointing)
    learned = network.learned()
    losses = train(run, learned, parameters, examples, network.loss)
    note_training(run, parameters, losses, sum(parameter.numel() for parameter in learned.values()))
    return network.layers


def note_training(run: Run, parameters: TrainingParameters, losses: list[float], learned: int) -> None:
    """Losses of all steps in nats, and how much was learned, for the provenance."""
    note = {"losses": [round(loss, 5) for loss in losses], "learned_parameters": learned}
    run.note("training", {**note, "windows": len(losses) * parameters.batch_size})


def relative(stored: StoredModel, weight: str) -> str:
    """A layer's name within its block."""
    index = stored.family.block_of(weight)
    assert index is not None
    return weight.removeprefix(stored.family.block_prefix(index)).removesuffix(".weight")


def publish_adapter(run: Run, stored: StoredModel, base: Artifact, terms: dict[str, tuple[Tensor, Tensor]]) -> Artifact:
    """The adapter {weight name: (A [rank, in_features], B [out_features, rank])} of a checkpoint, in float32."""
    with ArtifactWriter(run.store, "adapter") as writer:
        for index in range(stored.blocks):
            tensors: dict[str, Tensor] = {}
            for name in stored.linear_shapes(index):
                if name in terms:
                    a, b = terms[name]
                    tensors.update(peft_format.pack(name, a.float().cpu(), b.float().cpu()))
            writer.add_tensors(tensors, stored.family.block_prefix(index))
        ranks = {name.removesuffix(".weight"): len(a) for name, (a, _) in terms.items()}
        writer.add_file(peft_format.CONFIG, json_file(peft_format.adapter_config(stored.family, stored.blocks, ranks)))
        return writer.publish(base=base.id)


def publish_merged(run: Run, stored: StoredModel, weights: dict[str, Tensor]) -> Artifact:
    """The checkpoint with other weights [out_features, in_features], in its own dtype, and the masks that it has."""
    with ArtifactWriter(run.store, "checkpoint") as writer:
        writer.share(stored.manifest, stored.names(None))
        writer.share_masks(stored.manifest)
        for index in range(stored.blocks):
            names = stored.names(index)
            mine = {name: weights[name].to(stored.dtype).cpu() for name in names if name in weights}
            for name, weight in mine.items():
                if not bool(weight.isfinite().all()):
                    raise StageError(f"{name} is not finite in {stored.dtype}; lower learning_rate")
            writer.share(stored.manifest, [name for name in names if name not in mine])
            writer.add_tensors(mine, stored.family.block_prefix(index))
        writer.share_files(stored.manifest)
        return writer.publish()
