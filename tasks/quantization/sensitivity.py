"""What quantizing each linear layer costs, as a cached artifact, and budgets spent by it.

It does not depend on a budget, so one artifact feeds every stage that asks for the same choices.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from ...storage.artifacts import Artifact, ArtifactReader
from ...storage.store import Store
from ..architectures import linear_parameters
from ..pruning.gradients import Sums, backward
from ..stage import Parameters, Run, StageError, stage
from .precision import GroupParameters, Precision, layer_bytes

if TYPE_CHECKING:
    from torch import Tensor

    from ..blocks import StoredModel


class SensitivityParameters(Parameters):
    """Parameters of the sensitivities."""

    choices: tuple[Precision, ...] = Field(description="bits and group size of each choice")
    symmetric: bool = Field(True, description="the zero point stands in the middle of the codes")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="of both passes; auto is the checkpoint's own, float32 for float16"
    )


@stage(
    "statistics",
    "sensitivity",
    version=1,
    parameters=SensitivityParameters,
    inputs={"model": "checkpoint", "calibration": "tokens"},
    output="statistics",
    paper="the diagonal of the Fisher information, as in Kim et al. 2023 (SqueezeLLM), arXiv:2306.07629",
)
def sensitivity(run: Run, parameters: SensitivityParameters, model: Artifact, calibration: Artifact) -> Artifact:
    """What the loss is to rise by when one layer alone is rounded to each choice: half the sum of E[g^2] (W - Q)^2.

    Stored for each linear layer as "<name>.losses" [choices], in the order of `choices`.
    """

    def sums(stored: StoredModel, index: int, dense: Mapping[str, Tensor]) -> Sums:
        weights = {linear.name: dense[f"{linear.name}.weight"] for linear in stored.family.linears}
        return _Losses(weights, parameters.choices, parameters.symmetric)

    return backward(run, parameters.dtype, model, calibration, sums)


class _Losses:
    """Squared gradients of a block's linear weights, turned into the loss of rounding them."""

    def __init__(self, weights: Mapping[str, Tensor], choices: tuple[Precision, ...], symmetric: bool) -> None:
        import torch

        self.names: Collection[str] = [f"{name}.weight" for name in weights]
        self._weights = weights
        self._choices = choices
        self._symmetric = symmetric
        self._windows = 0
        self._squares = {name: torch.zeros_like(weight, dtype=torch.float32) for name, weight in weights.items()}

    def add(self, gradients: Mapping[str, Tensor]) -> None:
        self._windows += 1
        for name, total in self._squares.items():
            total.add_(gradients[f"{name}.weight"].float().square_())

    def result(self) -> dict[str, Tensor]:
        import torch

        found = {}
        for name, weight in self._weights.items():
            fisher = self._squares[name].div_(self._windows)
            losses = [rounding_loss(weight.float(), fisher, choice, self._symmetric) for choice in self._choices]
            found[f"{name}.losses"] = torch.stack(losses)
        return found


def rounding_loss(weight: Tensor, fisher: Tensor, precision: Precision, symmetric: bool) -> Tensor:
    """Half the sum of fisher * (W - Q)^2 for `weight` [rows, columns] rounded to nearest; a float64 scalar.

    fisher: [rows, columns], mean squares of the loss's gradients.
    """
    from .grid import from_codes, nearest

    codes, grid = nearest(weight, **precision._asdict(), symmetric=symmetric)
    error = from_codes(codes, grid).reshape(weight.shape).sub_(weight)
    return error.square_().mul_(fisher).double().sum() / 2


def plan_for_budget(
    store: Store, sensitivity: Artifact, parameters: GroupParameters, config: Mapping[str, Any]
) -> dict[str, Precision]:
    """{module: its precision} for the linear layers of all blocks: the least total loss that the budget allows."""
    from .bit_allocation import cheapest

    assert parameters.budget is not None
    candidates = parameters.candidates()
    sizes = layer_bytes(config, candidates)
    with ArtifactReader(store, sensitivity) as reader:
        losses = reader.tensors([f"{module}.losses" for module in sizes])
    budget = parameters.budget.bytes(linear_parameters(config))
    try:
        chosen = cheapest([losses[f"{module}.losses"].tolist() for module in sizes], list(sizes.values()), budget)
    except ValueError as error:
        raise StageError(f"no plan for the budget: {error}") from error
    return {module: candidates[number] for module, number in zip(sizes, chosen, strict=True)}
