"""What a run did: how each of its stages ended, the figures of its variants, and the record that the store keeps."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..storage.artifacts import Artifact
from ..storage.store import Action, Store
from ..tasks.reporting.significance import PERPLEXITY
from .budget import used_up
from .recipe import Node, Recipe

if TYPE_CHECKING:
    from prefect.client.schemas.objects import State

PREEMPTED = "Pre-empted"  # the name of the Prefect state
DONE = ("cached", "computed", "resumed")
NOT_COMPUTED = "not computed"  # in a report that computes nothing
_SHOWN = ("started", "device", "host", "versions", "commit", "resumed", "warnings")  # of provenance, by the report


@dataclass
class StageResult:
    """How a node ended.

    state: cached; computed; resumed (computed from where an earlier attempt had ended); pre-empted (asked to stop,
    its work kept); failed; skipped (something before it did not finish); pending (the run hasn't come to it, or died
    before it did); or in a report, which computes nothing, not computed. shares_by_block: of a stage that removes
    weights, the share of each block's linear weights. bits_by_block: of one that gives layers their own precision, the
    mean bits of each block's weights.
    losses: of a stage that trains, the mean loss of each step, in nats per token.
    inputs: names of other nodes by role. parameters: those that are not at their default. provenance: how it came
    about, as far as the report shows it. kind, format: of its artifact; format and base, the artifact that an adapter
    belongs to, are known of variants only.
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
    inputs: dict[str, str] = field(default_factory=dict)
    parameters: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    kind: str | None = None
    format: str | None = None
    base: str | None = None
    error: str | None = None


@dataclass
class RunResult:
    """All that a run did. stopped_by: the signal that asked it to stop; out_of_time: its own, at its deadline.
    out_of_budget: likewise, its device time was used up; device_seconds: of all attempts, {"used": …, "allowed": …},
    where it has a budget. untold: Prefect's server went away, and doesn't know how the run ended.

    metrics: variant -> metric -> value; those of evaluations with names of their own are under "variant/name".
    runtimes: as metrics, evaluation -> what it ran in. differences, indistinguishable: see `significance.compare_all`.
    generations: likewise, what variants made of prompts, [{"prompt": …, "continuation": …}].
    """

    run: str
    recipe: str
    store: str
    variants: tuple[str, ...]
    stages: dict[str, StageResult] = field(default_factory=dict)
    metrics: dict[str, dict[str, Any]] = field(default_factory=dict)
    runtimes: dict[str, dict[str, str]] = field(default_factory=dict)
    differences: dict[str, dict[str, Any]] = field(default_factory=dict)
    indistinguishable: dict[str, list[list[str]]] = field(default_factory=dict)
    generations: dict[str, list[dict[str, str]]] = field(default_factory=dict)
    stopped_by: int | None = None
    attempt: int = 1
    out_of_time: bool = False
    untold: bool = False
    out_of_budget: bool = False
    device_seconds: dict[str, float] | None = None

    @property
    def failed(self) -> bool:
        return any(result.state in ("failed", "skipped") for result in self.stages.values())

    @property
    def unfinished(self) -> list[str]:
        """Stages that have no result."""
        return [name for name, entry in self.stages.items() if entry.state not in DONE]

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
            "runtimes": self.runtimes,
            "differences": self.differences,
            "indistinguishable": self.indistinguishable,
            **({"generations": self.generations} if self.generations else {}),
            **({"device_seconds": self.device_seconds} if self.device_seconds else {}),
        }

    def record(self, node: Node, state: str, action: Action | None = None, error: str | None = None) -> None:
        """Note how a node ended, with what its action says of it."""
        self.stages[node.name] = entry = StageResult(node.name, node.stage.name, state, root=node.root, error=error)
        entry.inputs = dict(node.inputs)
        entry.parameters = node.parameters.model_dump(mode="json", exclude_defaults=True)
        if action is not None:
            entry.key, entry.artifact, entry.kind = action.key, action.artifact, action.artifact.kind
            entry.provenance = {name: action.provenance[name] for name in _SHOWN if name in action.provenance}
            entry.provenance["attempts"] = len(action.provenance.get("attempts", [])) or 1
            entry.seconds = action.provenance.get("seconds")
            entry.peak_memory_bytes = action.provenance.get("peak_memory_bytes")
            entry.linear_weights = action.provenance.get("linear_weights")
            entry.shares_by_block = _by_block(action.provenance.get("share_of_block"))
            entry.bits_by_block = _by_block(action.provenance.get("bits_of_block"))
            entry.losses = action.provenance.get("training", {}).get("losses")


def _by_block(noted: Mapping[str, float] | None) -> list[float] | None:
    return [noted[str(block)] for block in range(len(noted))] if noted else None


def read_items(store: Store, artifact: Artifact, metrics: Mapping[str, Any]) -> dict[str, list[float]]:
    """{metric: its value for each window or question}: perplexity's losses, others' `items.json`; {} without any."""
    found: dict[str, list[float]] = {}
    if "window_losses_nats" in metrics:
        found[PERPLEXITY] = metrics["window_losses_nats"]
    if "items.json" in store.manifest(artifact).files:
        found.update(json.loads(store.read_file(artifact, "items.json")))
    return found


def save_record(recipe: Recipe, store: Store, result: RunResult) -> None:
    """Keep what is known of a run so far, so that it can be explained and gc keeps what it uses."""
    record = {**result.to_json(), "text": recipe.text, "path": recipe.path, "overrides": list(recipe.overrides)}
    store.save_run(result.run, record)


def end_state(result: RunResult) -> State[Any]:
    """The state in which the flow run ends."""
    from prefect.states import Cancelled, Completed, Crashed, Failed

    left = result.unfinished
    if left and result.out_of_budget and result.device_seconds:
        return Cancelled(message=used_up(**result.device_seconds))
    if left and result.stopped_by is not None:
        return Crashed(name=PREEMPTED, message=f"asked to stop; to be done: {', '.join(left)}")
    if left:
        return Failed(message=f"{len(left)} of {len(result.stages)} stages did not finish: {', '.join(left)}")
    return Completed(message="all stages finished")
