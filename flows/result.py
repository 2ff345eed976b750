"""What a run did: how each of its stages ended, the figures of its variants, and the record that the store keeps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..storage.artifacts import Artifact
from ..storage.store import Action, Store
from .recipe import Node, Recipe

if TYPE_CHECKING:
    from prefect.client.schemas.objects import State

PREEMPTED = "Pre-empted"  # the name of the Prefect state
DONE = ("cached", "computed", "resumed")


@dataclass
class StageResult:
    """How a node ended.

    state: cached; computed; resumed (computed from where an earlier attempt had ended); pre-empted (asked to stop,
    its work kept); failed; skipped (something before it did not finish); or pending (the run hasn't come to it, or
    died before it did). shares_by_block: of a stage that removes weights, the share of each block's linear weights.
    bits_by_block: of one that gives layers their own precision, the mean bits of each block's weights.
    losses: of a stage that trains, the mean loss of each step, in nats per token.
    """

    name: str
    stage: str
    state: str
    key: str | None = None
    artifact: Artifact | None = None
    root: str | None = None  # the model at the beginning of its branch
    linear_weights: int | None = None  # of a model: how many its blocks have
    seconds: float | None = None  # of computing it, now or when it was computed
    peak_memory_bytes: int | None = None
    shares_by_block: list[float] | None = None
    bits_by_block: list[float] | None = None
    losses: list[float] | None = None
    error: str | None = None


@dataclass
class RunResult:
    """All that a run did. stopped_by: the signal that asked it to stop; out_of_time: its own, at its deadline.

    metrics: variant -> metric -> value; those of evaluations with names of their own are under "variant/name".
    """

    run: str
    recipe: str
    store: str
    variants: tuple[str, ...]
    stages: dict[str, StageResult] = field(default_factory=dict)
    metrics: dict[str, dict[str, Any]] = field(default_factory=dict)
    stopped_by: int | None = None
    attempt: int = 1
    out_of_time: bool = False

    @property
    def failed(self) -> bool:
        return any(result.state in ("failed", "skipped") for result in self.stages.values())

    def to_json(self) -> dict[str, Any]:
        """The document of `run --json`."""
        stages = [
            {**vars(result), "artifact": result.artifact.id if result.artifact else None}
            for result in self.stages.values()
        ]
        return {
            "run": self.run,
            "recipe": self.recipe,
            "store": self.store,
            "stages": stages,
            "variants": list(self.variants),
            "metrics": self.metrics,
        }

    def record(self, node: Node, state: str, action: Action | None = None, error: str | None = None) -> None:
        """Note how a node ended, with what its action says of it."""
        self.stages[node.name] = entry = StageResult(node.name, node.stage.name, state, root=node.root, error=error)
        if action is not None:
            entry.key, entry.artifact = action.key, action.artifact
            entry.seconds = action.provenance.get("seconds")
            entry.peak_memory_bytes = action.provenance.get("peak_memory_bytes")
            entry.linear_weights = action.provenance.get("linear_weights")
            entry.shares_by_block = _by_block(action.provenance.get("share_of_block"))
            entry.bits_by_block = _by_block(action.provenance.get("bits_of_block"))
            entry.losses = action.provenance.get("training", {}).get("losses")


def _by_block(noted: Mapping[str, float] | None) -> list[float] | None:
    return [noted[str(block)] for block in range(len(noted))] if noted else None


def save_record(recipe: Recipe, store: Store, result: RunResult) -> None:
    """Keep what is known of a run so far, so that it can be explained and gc keeps what it uses."""
    record = {**result.to_json(), "text": recipe.text, "path": recipe.path, "overrides": list(recipe.overrides)}
    store.save_run(result.run, record)


def end_state(result: RunResult) -> State[Any]:
    """The state in which the flow run ends."""
    from prefect.states import Completed, Crashed, Failed

    left = [name for name, entry in result.stages.items() if entry.state not in DONE]
    if left and result.stopped_by is not None:
        return Crashed(name=PREEMPTED, message=f"asked to stop; to be done: {', '.join(left)}")
    if left:
        return Failed(message=f"{len(left)} of {len(result.stages)} stages did not finish: {', '.join(left)}")
    return Completed(message="all stages finished")
