"""Running a recipe: each node a Prefect task, Prefect's graph the recipe's DAG.

Prefect has the graph, the states and the scheduling; lookup, computing and publishing are ours. What passes between
tasks is an artifact reference. A run that is wholly cached answers without Prefect, unless a server is configured.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import logging
import os
import secrets
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..storage.artifacts import Artifact
from ..storage.digests import digest_of
from ..storage.errors import ColdpressError, DamagedBlob
from ..storage.journal import unfinished
from ..storage.leases import Claim, Heartbeat, Lease, LeaseLost
from ..storage.store import Action, Store
from ..tasks.stage import Preempted, lookup, preimage
from .plan import Planned, check_disk, compare, prepare
from .prefect_server import configure_prefect, reach_server, server_configured
from .provenance import provenance_markdown, resumed_from
from .recipe import Node, Recipe
from .terminal import Pace, Terminal
from .worker import InProcess, Worker

if TYPE_CHECKING:
    from prefect import Flow, Task
    from prefect.client.schemas.objects import State

logger = logging.getLogger("coldpress")

PREEMPTED = "Pre-empted"  # the name of the Prefect state
SECONDS_BETWEEN_LOOKS = 2.0  # at another job's lease
REPAIRS = 3  # of a stage's inputs, before it fails


@dataclass
class StageResult:
    """How a node ended.

    state: cached; computed; resumed (computed from where an earlier attempt had ended); pre-empted (asked to stop,
    its work kept); failed; skipped (something before it did not finish); or pending (the run hasn't come to it, or
    died before it did).
    """

    name: str
    stage: str
    state: str
    key: str | None = None
    artifact: Artifact | None = None
    seconds: float | None = None  # of computing it, now or when it was computed
    peak_memory_bytes: int | None = None
    error: str | None = None


@dataclass(frozen=True)
class Attempt:
    """A flow run that is going on already: the id of the run, which all its attempts share, and which one this is."""

    run: str
    number: int


@dataclass
class RunResult:
    """All that a run did. metrics: variant -> metric -> value. stopped_by: the signal that asked it to stop."""

    run: str
    recipe: str
    store: str
    variants: tuple[str, ...]
    stages: dict[str, StageResult] = field(default_factory=dict)
    metrics: dict[str, dict[str, Any]] = field(default_factory=dict)
    stopped_by: int | None = None
    attempt: int = 1

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


def new_run_id() -> str:
    """Sorted by time, unique without asking anyone."""
    return f"{datetime.datetime.now(datetime.UTC):%Y%m%dT%H%M%S}-{secrets.token_hex(3)}"


def run_recipe(
    recipe: Recipe,
    store: Store,
    terminal: Terminal,
    *,
    device: str = "auto",
    slots: int = 1,
    within: Attempt | None = None,
) -> RunResult:
    """Check, plan and run a recipe; failed branches don't stop the others. Raises RecipeError before anything runs.

    `within`: the flow run in which this is called, whose tasks the stages become; without it the run makes its own.
    """
    plan = prepare(recipe, store)
    check_disk(plan, store)
    attempt = within or Attempt(new_run_id(), 1)
    result = RunResult(attempt.run, recipe.name, store.url, recipe.variants, attempt=attempt.number)
    for planned in plan.values():
        _record(result, planned.node, "pending", planned.action)
    _save(recipe, store, result)
    everything_cached = all(planned.action for planned in plan.values())
    if everything_cached and within is None and not server_configured():
        for planned in plan.values():
            assert planned.action is not None
            _record(result, planned.node, "cached", planned.action)
            terminal.finish(planned.node.name, "cached", 0)
    else:
        _run_on_prefect(recipe, store, terminal, plan, result, device=device, slots=slots, within=within)
    for node in recipe.nodes:
        artifact = result.stages[node.name].artifact
        if artifact is not None:
            store.set_ref(f"{recipe.name}/{node.name}", artifact)
    try:
        _collect_metrics(recipe, store, result)
    finally:
        _save(recipe, store, result)
    return result


def _save(recipe: Recipe, store: Store, result: RunResult) -> None:
    """Keep what is known of a run so far, so that it can be explained and gc keeps what it uses."""
    record = {**result.to_json(), "text": recipe.text, "path": recipe.path, "overrides": list(recipe.overrides)}
    store.save_run(result.run, record)


def _record(result: RunResult, node: Node, state: str, action: Action | None) -> None:
    if action is None:
        result.stages[node.name] = StageResult(node.name, node.stage.name, state)
        return
    result.stages[node.name] = StageResult(
        node.name,
        node.stage.name,
        state,
        action.key,
        action.artifact,
        action.provenance.get("seconds"),
        action.provenance.get("peak_memory_bytes"),
    )


def _collect_metrics(recipe: Recipe, store: Store, result: RunResult) -> None:
    for variant in recipe.variants:
        values: dict[str, Any] = {}
        for name in recipe.evaluations.get(variant, ()):
            artifact = result.stages[name].artifact
            if artifact is not None:
                found = json.loads(store.read_file(artifact, "metrics.json"))
                values.update({key: value for key, value in found.items() if not isinstance(value, list)})
        result.metrics[variant] = values


def _run_on_prefect(
    recipe: Recipe,
    store: Store,
    terminal: Terminal,
    plan: Mapping[str, Planned],
    result: RunResult,
    *,
    device: str,
    slots: int,
    within: Attempt | None,
) -> None:
    workers: list[Worker | InProcess] = []
    if not all(planned.action for planned in plan.values()):
        kind = InProcess if store.url.startswith("memory://") else Worker
        workers = [kind(device) for _ in range(slots)]  # their slow imports run while Prefect starts
    try:
        if within is not None:
            _Execution(recipe, store, terminal, result, workers).run()
            return
        configure_prefect()
        import prefect
        from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings

        reach_server()
        execution = _Execution(recipe, store, terminal, result, workers)
        flow: Flow[Any, Any] = prefect.flow(
            name=recipe.name,
            flow_run_name=result.run,
            task_runner=_task_runner(slots),
            persist_result=False,
            validate_parameters=False,
        )(execution.flow)
        # A run that only looks things up needs no heartbeat, whose thread takes a second to join.
        settings = {} if workers else {PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}
        with temporary_settings(settings):
            flow(recipe=recipe.path, store=store.url, overrides=list(recipe.overrides), return_state=True)
    finally:
        for worker in workers:
            worker.kill()


def _task_runner(slots: int) -> Any:
    from prefect.task_runners import ThreadPoolTaskRunner

    # One thread a worker: what waits for a device shows as pending. Nodes are submitted in an order in which inputs
    # come first, so a full pool never waits for a queued node.
    return ThreadPoolTaskRunner(max_workers=slots)


def end_state(result: RunResult) -> State[Any]:
    """The state in which the flow run ends."""
    from prefect.states import Completed, Crashed, Failed

    done = ("cached", "computed", "resumed")
    left = [name for name, entry in result.stages.items() if entry.state not in done]
    if left and result.stopped_by is not None:
        return Crashed(name=PREEMPTED, message=f"asked to stop; to be done: {', '.join(left)}")
    if left:
        return Failed(message=f"{len(left)} of {len(result.stages)} stages did not finish: {', '.join(left)}")
    return Completed(message="all stages finished")


class _Execution:
    """One run: the flow's body and the body of its tasks, which share the store, the workers and the result."""

    def __init__(
        self,
        recipe: Recipe,
        store: Store,
        terminal: Terminal,
        result: RunResult,
        workers: Sequence[Worker | InProcess],
    ) -> None:
        self.recipe = recipe
        self.store = store
        self.terminal = terminal
        self.result = result
        self._workers = workers
        self._free = list(workers)
        self._condition = threading.Condition()
        self._saving = threading.Lock()
        self._stopping = False

    def flow(self, recipe: str, store: str, overrides: list[str]) -> State[Any]:
        """The flow's body; its parameters are there to be seen on the dashboard."""
        self.run()
        return end_state(self.result)

    def run(self) -> None:
        """Submit all nodes to the task runner of the present flow run, and wait for them."""
        futures: dict[str, Any] = {}
        try:
            with self._heeding_signals():
                self._run_all(futures)
        except BaseException:  # threads that wait for a worker must come free at once
            for worker in self._workers:
                worker.kill()
            raise

    def _run_all(self, futures: dict[str, Any]) -> None:
        for node in self.recipe.nodes:
            inputs = {role: futures[name] for role, name in node.inputs.items()}
            futures[node.name] = self._task(node).submit(node.name, **inputs)
        for node in self.recipe.nodes:
            futures[node.name].wait()
            if self.result.stages[node.name].state == "pending":
                self.result.stages[node.name] = StageResult(node.name, node.stage.name, "skipped")
                why = "the run was asked to stop" if self._stopping else "something before it failed"
                self.terminal.finish(node.name, "skipped", 0, why)

    @contextlib.contextmanager
    def _heeding_signals(self) -> Iterator[None]:
        """SIGTERM and Ctrl-C ask the running stages to stop, their work kept; the second time they end at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        first = 0.0

        def stop(number: int, frame: Any) -> None:
            nonlocal first
            if self._stopping and time.monotonic() - first < 1.0:
                return  # one request that came twice: to the process, and to its group
            if self._stopping:
                raise KeyboardInterrupt
            self._stopping, first = True, time.monotonic()
            self.result.stopped_by = number
            self.terminal.say(f"asked to stop: finishing what is at hand, for at most {grace:g} s (again: at once)")
            timer.start()
            for worker in self._workers:
                worker.preempt()
            with self._condition:
                self._condition.notify_all()

        grace = grace_seconds()
        timer = threading.Timer(grace, lambda: [worker.kill() for worker in self._workers])
        timer.daemon = True
        before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            timer.cancel()
            for number, handler in before.items():
                signal.signal(number, handler)

    def _task(self, node: Node) -> Task[Any, Any]:
        import prefect

        return prefect.task(
            name=node.stage.name,
            task_run_name=node.name,
            tags=[node.stage.use],
            persist_result=False,
            cache_policy=prefect.cache_policies.NO_CACHE,
        )(self._run_node)

    def _run_node(self, stage_name: str, **inputs: Any) -> Any:
        """A task's body: look up, else compute; returns the artifact's kind and id."""
        from prefect.states import Completed, Crashed

        node = self.recipe.node(stage_name)
        artifacts = {role: Artifact(*reference) for role, reference in inputs.items()}
        began = time.perf_counter()
        try:
            action, state = self._obtain_on_sound_inputs(node, artifacts)
        except Preempted as error:
            self.result.stages[node.name] = StageResult(node.name, node.stage.name, "pre-empted", error=str(error))
            self.terminal.finish(node.name, "pre-empted", 0, str(error))
            return Crashed(name=PREEMPTED, message=str(error))
        except Exception as error:
            self.result.stages[node.name] = StageResult(node.name, node.stage.name, "failed", error=str(error))
            self.terminal.finish(node.name, "failed", 0, _with_line(self.recipe, node, error))
            raise
        self._finish(node, action, state, time.perf_counter() - began)
        reference = list(action.artifact)
        return Completed(name="Cached", data=reference) if state == "cached" else reference

    def _finish(self, node: Node, action: Action, state: str, seconds: float) -> None:
        """Make a stage's result known: to the run's record, by a name in the store, on the dashboard and terminal."""
        _record(self.result, node, state, action)
        if state != "cached":
            with self._saving:
                self.store.set_ref(f"{self.recipe.name}/{node.name}", action.artifact)
                _save(self.recipe, self.store, self.result)
        self._show_artifact(node, action, state)
        self.terminal.finish(node.name, state, seconds, resumed_from(action) if state == "resumed" else "")

    def _obtain_on_sound_inputs(self, node: Node, artifacts: Mapping[str, Artifact]) -> tuple[Action, str]:
        """As `_obtain`; when an input turns out to be damaged it is computed again first."""
        for _ in range(REPAIRS):
            try:
                return self._obtain(node, artifacts)
            except DamagedBlob as error:
                self.terminal.say(f"  {node.name}: {error}; computing again what is damaged")
                artifacts = {role: self._repaired(self.recipe.node(name)) for role, name in node.inputs.items()}
        return self._obtain(node, artifacts)

    def _repaired(self, node: Node) -> Artifact:
        """A node's artifact, computed again if it is damaged, and before it whatever that needs."""
        began = time.perf_counter()
        before = self.result.stages[node.name].artifact
        inputs = {role: self._repaired(self.recipe.node(name)) for role, name in node.inputs.items()}
        action, state = self._obtain(node, inputs)
        if state != "cached":
            self._finish(node, action, state, time.perf_counter() - began)
        if before is not None and action.artifact != before:
            self.terminal.say(f"  {node.name}: computed again it has other content; what follows is computed anew")
        return action.artifact

    def _obtain(self, node: Node, artifacts: Mapping[str, Artifact]) -> tuple[Action, str]:
        """The result of a stage and how it was come by: cached, computed or resumed. One job computes, others wait."""
        if action := lookup(self.store, node.stage, node.parameters, artifacts):
            return action, "cached"
        shown = _ProgressArtifact(self.recipe.name, node.name)
        image = preimage(node.stage, node.parameters, artifacts)
        about = {"run": self.result.run, "recipe": self.recipe.name, "node": node.name, "inputs": image["inputs"]}
        self._name_journals_that_do_not_fit(node, image)
        claim = Claim(self.store, digest_of(image), about)
        while True:
            lease = claim.acquire()
            if lease is None:
                self._wait_for(node, claim, shown)
                if action := lookup(self.store, node.stage, node.parameters, artifacts):
                    return action, "cached"
                continue
            with Heartbeat(self.store, lease, about) as heartbeat:
                # Between the last look-up and the lease another job may have finished.
                if action := lookup(self.store, node.stage, node.parameters, artifacts):
                    return action, "cached"
                try:
                    action = self._compute(node, artifacts, lease, heartbeat, shown)
                    return action, "resumed" if "resumed" in action.provenance else "computed"
                except LeaseLost as error:
                    self.terminal.say(f"  {node.name}: {error}")

    def _wait_for(self, node: Node, claim: Claim, shown: _ProgressArtifact) -> None:
        """Wait a moment for another job, showing which. Raises Preempted."""
        holder = claim.holder
        if holder:
            text = f"waiting for run {holder['run']} on {holder['host']} (process {holder['pid']})"
            self.terminal.wait(node.name, text, holder["doing"])
            shown.describe(f"{text} {holder['doing']}")
        with self._condition:
            if not self._stopping:
                self._condition.wait(SECONDS_BETWEEN_LOOKS)
            if self._stopping:
                raise Preempted("was waiting for another job when the run was asked to stop")

    def _compute(
        self,
        node: Node,
        artifacts: Mapping[str, Artifact],
        lease: Lease,
        heartbeat: Heartbeat,
        shown: _ProgressArtifact,
    ) -> Action:
        pace = Pace()

        def progress(what: str, done: int, total: int) -> None:
            self.terminal.advance(node.name, what, done, total)
            heartbeat.doing = pace.describe(what, done, total)
            shown.update(100.0 * done / total, heartbeat.doing)

        context = {
            "run": self.result.run,
            "attempt": self.result.attempt,
            "recipe": self.recipe.name,
            "node": node.name,
        }
        worker = self._take_worker()
        try:
            return worker.compute(self.store, node.stage, node.parameters, artifacts, context, progress, lease)
        finally:
            self._give_back(worker)

    def _name_journals_that_do_not_fit(self, node: Node, image: Mapping[str, Any]) -> None:
        """Say of earlier unfinished attempts at this node why they are of no use now."""
        for journal in unfinished(self.store):
            context, then = journal["context"], journal["preimage"]
            if (context.get("recipe"), context.get("node")) == (self.recipe.name, node.name) and then != image:
                fields = ", ".join(f"{d.field} was {d.then!r}, is {d.now!r}" for d in compare(image, then))
                self.terminal.say(f"  {node.name}: an unfinished attempt of an earlier run does not fit: {fields}")

    def _take_worker(self) -> Worker | InProcess:
        with self._condition:
            while not self._free and not self._stopping:
                self._condition.wait()
            if self._stopping:
                raise Preempted("not begun when the run was asked to stop")
            return self._free.pop()

    def _give_back(self, worker: Worker | InProcess) -> None:
        with self._condition:
            self._free.append(worker)
            self._condition.notify()

    def _show_artifact(self, node: Node, action: Action, state: str) -> None:
        from prefect.artifacts import create_markdown_artifact

        create_markdown_artifact(
            markdown=provenance_markdown(node, action, state),
            key=artifact_key(f"{self.recipe.name}-{node.name}"),
            description=f"{node.name} ({state})",
        )


class _ProgressArtifact:
    """A stage's progress on the dashboard."""

    def __init__(self, recipe: str, node: str) -> None:
        self._key = artifact_key(f"{recipe}-{node}-progress")
        self._node = node
        self._id: Any = None
        self._described = ""

    def update(self, percent: float, text: str) -> None:
        from prefect.artifacts import create_progress_artifact, update_progress_artifact

        self._described = text
        if self._id is None:
            self._id = create_progress_artifact(percent, key=self._key, description=f"{self._node}: {text}")
        else:
            update_progress_artifact(self._id, percent, description=f"{self._node}: {text}")

    def describe(self, text: str) -> None:
        """What the stage waits for; told once."""
        if text != self._described:
            self.update(0.0, text)


def grace_seconds() -> float:
    """How long stages may take to stop: $COLDPRESS_GRACE_SECONDS, 20 by default."""
    text = os.environ.get("COLDPRESS_GRACE_SECONDS", "20")
    try:
        return float(text)
    except ValueError as error:
        raise ColdpressError(f"COLDPRESS_GRACE_SECONDS is {text!r}; write a number of seconds") from error


def _with_line(recipe: Recipe, node: Node, error: Exception) -> str:
    return f"{error} ({recipe.path}:{node.line})" if node.line else str(error)


def artifact_key(text: str) -> str:
    """The text as a Prefect artifact key: small letters, digits and dashes."""
    kept = "".join(letter if letter.isalnum() and letter.isascii() else "-" for letter in text.lower())
    return "-".join(part for part in kept.split("-") if part)
