"""The body of a run: each node a task, its stage looked up, waited for, computed or resumed, and what may go wrong.

Between tasks pass artifact references. A stage that is not cached is computed by whoever gets its lease; other runs
wait for the result, and meanwhile go on with what nobody computes: so do several runs of one recipe share its
branches. Signals ask the computing processes to stop; an input that turns out to be damaged is computed again first.
"""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from ..storage.artifacts import Artifact
from ..storage.digests import digest_of
from ..storage.errors import ColdpressError, DamagedBlob
from ..storage.journal import unfinished
from ..storage.leases import Claim, Heartbeat, LeaseLost
from ..storage.store import Action, Store
from ..tasks.stage import Preempted, lookup, preimage
from .budget import Budget
from .device_limits import device_note
from .plan import compare
from .provenance import Dashboard, artifact_key, provenance_markdown, resumed_from
from .recipe import Node, Recipe
from .result import PREEMPTED, RunResult, end_state, save_record
from .slots import Slots
from .terminal import Pace, Terminal
from .worker import WorkerDied

if TYPE_CHECKING:
    from prefect import Task
    from prefect.client.schemas.objects import State

SECONDS_BETWEEN_LOOKS = 2.0  # at another job's lease
REPAIRS = 3  # of a stage's inputs, before it fails
DEATHS = 1  # of a stage's computing process, which it survives: it goes on in a new one


class _Elsewhere(Exception):
    """Another job computes, or has computed, the stage that was waiting for a device."""


class Execution:
    """One run: the flow's body and the body of its tasks, which share the store, the workers and the result."""

    def __init__(
        self,
        recipe: Recipe,
        store: Store,
        terminal: Terminal,
        result: RunResult,
        slots: Slots,
        device: str,
        seconds: float | None = None,
        budget: Budget | None = None,
    ) -> None:
        self.dashboard = Dashboard()
        self.device = device
        self.recipe = recipe
        self.store = store
        self.terminal = terminal
        self.result = result
        self._slots = slots
        self._seconds = seconds
        self._budget = budget
        self._saving = threading.Lock()
        self._elsewhere: set[str] = set()  # nodes that another job computes
        self._moved = threading.Event()

    def flow(self, recipe: str, store: str, overrides: list[str]) -> State[Any]:
        """The flow's body; its parameters are there to be seen on the dashboard."""
        self.run()
        return end_state(self.result)

    def run(self) -> None:
        """Submit all nodes to the task runner of the present flow run as they can begin, and wait for them."""
        futures: dict[str, Any] = {}
        try:
            with self._heeding_signals(), self._heeding_deadline(), self._heeding_budget():
                self._run_all(futures)
        except BaseException:  # threads that wait for a worker must come free at once
            self._slots.kill()
            raise

    def _run_all(self, futures: dict[str, Any]) -> None:
        from prefect.context import TagsContext

        # Tags of a task, the flow run's among them, are looked up at the server before it begins, for limits that go by
        # tags: a stage would wait for a server that is busy, and fail with one that is away.
        with TagsContext(current_tags=set()):
            self._submit_all(futures)
        for node in self.recipe.nodes:
            futures[node.name].wait()
            if self.result.stages[node.name].state == "pending":
                self.result.record(node, "skipped")
                why = "the run was asked to stop" if self._slots.stopping else "something before it failed"
                self.terminal.finish(node.name, "skipped", 0, why)

    def _submit_all(self, futures: dict[str, Any]) -> None:
        """Submit each node when its inputs have ended and a slot may be free for it; first come those written first."""
        from prefect import allow_failure

        left, ended = list(self.recipe.nodes), set[str]()

        def end(name: str) -> None:
            ended.add(name)
            self._moved.set()

        while left:
            self._moved.clear()
            under_way = len(futures.keys() - ended - self._elsewhere)
            ready = [node for node in left if ended.issuperset(node.inputs.values())]
            for node in ready[: max(0, self._slots.threads - under_way)]:
                # A failed input comes as no reference, so that the stage can say that it was skipped, and why.
                inputs = {role: allow_failure(futures[name]) for role, name in node.inputs.items()}
                futures[node.name] = self._task(node).submit(node.name, **inputs)
                futures[node.name].add_done_callback(lambda _, name=node.name: end(name))
                left.remove(node)
            if left:
                self._moved.wait()

    @contextlib.contextmanager
    def _heeding_signals(self) -> Iterator[None]:
        """SIGTERM and Ctrl-C ask the running stages to stop, their work kept; the second time they end at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        # A handler runs in the midst of whatever the main thread does, another handler included: it takes no lock, and
        # leaves the work to a thread.
        asked: queue.SimpleQueue[bool] = queue.SimpleQueue()
        ended = threading.Event()
        grace = grace_seconds()
        first: float | None = None

        def heed(number: int, frame: Any) -> None:
            nonlocal first
            now = time.monotonic()
            if first is None:
                first = now
                self.result.stopped_by = number
                asked.put(True)
            elif now - first >= 1.0:  # sooner it is one request that came twice: to the process, and to its group
                raise KeyboardInterrupt

        def stop() -> None:
            if not asked.get():
                return
            self._slots.stop()
            self.terminal.say(f"asked to stop: finishing what is at hand, for at most {grace:g} s (again: at once)")
            if not ended.wait(grace):
                self._slots.kill()

        threading.Thread(target=stop, daemon=True).start()
        before = {number: signal.signal(number, heed) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            ended.set()
            asked.put(False)
            for number, handler in before.items():
                # What stops has little left to do, and Prefect would take one more SIGTERM for a crash.
                late = first is not None and number == signal.SIGTERM
                signal.signal(number, signal.SIG_IGN if late else handler)

    @contextlib.contextmanager
    def _heeding_deadline(self) -> Iterator[None]:
        """When its seconds are over the run asks itself to stop, as SIGTERM would."""
        if self._seconds is None:
            yield
            return

        def over() -> None:
            self.result.out_of_time = True
            self._stop_by_itself("the deadline has come")

        timer = threading.Timer(self._seconds, over)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    @contextlib.contextmanager
    def _heeding_budget(self) -> Iterator[None]:
        """When its device time is used up the run asks itself to stop, as SIGTERM would."""
        if self._budget is None:
            yield
            return

        budget = self._budget

        def over() -> None:
            self.result.out_of_budget = True
            self._stop_by_itself("the budget is used up")

        try:
            with budget.watched(over):
                yield
        finally:
            self.result.device_seconds = {"used": round(budget.used, 3), "allowed": budget.allowed}

    def _stop_by_itself(self, why: str) -> None:
        if not self._slots.stopping:  # a second signal would end it at once
            self.terminal.say(why)
            os.kill(os.getpid(), signal.SIGTERM)

    def _task(self, node: Node) -> Task[Any, Any]:
        import prefect

        return prefect.task(
            name=node.stage.name,
            task_run_name=node.name,
            persist_result=False,
            cache_policy=prefect.cache_policies.NO_CACHE,
        )(self._run_node)

    def _run_node(self, stage_name: str, **inputs: Any) -> Any:
        """A task's body: look up, else compute; returns the artifact's kind and id."""
        from prefect.states import Completed, Crashed, Failed

        node = self.recipe.node(stage_name)
        if lacking := [node.inputs[role] for role, reference in inputs.items() if not isinstance(reference, list)]:
            return Failed(name="Skipped", message=f"without {', '.join(dict.fromkeys(lacking))}, which did not finish")
        artifacts = {role: Artifact(*reference) for role, reference in inputs.items()}
        began = time.perf_counter()
        try:
            action, state = self._obtain_on_sound_inputs(node, artifacts)
        except Preempted as error:
            self.result.record(node, "pre-empted", error=str(error))
            self.terminal.finish(node.name, "pre-empted", 0, str(error))
            return Crashed(name=PREEMPTED, message=str(error))
        except Exception as error:
            self.result.record(node, "failed", error=str(error))
            self.terminal.finish(node.name, "failed", 0, _with_line(self.recipe, node, error))
            raise
        self._finish(node, action, state, time.perf_counter() - began)
        reference = list(action.artifact)
        if state == "resumed":
            return Completed(name="Resumed", message=resumed_from(action), data=reference)
        return Completed(name="Cached", data=reference) if state == "cached" else reference

    def _finish(self, node: Node, action: Action, state: str, seconds: float) -> None:
        """Make a stage's result known: to the run's record, by a name in the store, on the dashboard and terminal."""
        self.result.record(node, state, action)
        if state != "cached":
            with self._saving:
                self.store.set_ref(f"{self.recipe.name}/{node.name}", action.artifact)
                save_record(self.recipe, self.store, self.result)
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
        if action := lookup(self.store, node.stage, node.parameters, artifacts, self.device):
            return action, "cached"
        shown = _ProgressArtifact(self.dashboard, self.recipe.name, node.name)
        image = preimage(node.stage, node.parameters, artifacts, self.device)
        about = {"run": self.result.run, "recipe": self.recipe.name, "node": node.name, "inputs": image["inputs"]}
        self._name_journals_that_do_not_fit(node, image)
        claim = Claim(self.store, digest_of(image), about)
        deaths = 0
        while True:
            action = None
            if claim.is_taken():
                self._wait_for(node, claim, shown)
            else:
                self._elsewhere.discard(node.name)
                try:
                    action = self._compute(node, artifacts, claim, about, shown)
                except LeaseLost as error:
                    self.terminal.say(f"  {node.name}: {error}")
                except WorkerDied as error:
                    deaths += 1
                    if deaths > DEATHS:
                        raise
                    self.terminal.say(f"  {node.name}: {error}; going on in a new one")
            if action is not None:
                return action, "resumed" if "resumed" in action.provenance else "computed"
            if action := lookup(self.store, node.stage, node.parameters, artifacts, self.device):
                return action, "cached"

    def _wait_for(self, node: Node, claim: Claim, shown: _ProgressArtifact) -> None:
        """Wait a moment for another job, showing which. Raises Preempted."""
        holder = claim.holder
        if holder:
            text = f"waiting for run {holder['run']} on {holder['host']} (process {holder['pid']})"
            self.terminal.wait(node.name, text, holder["doing"])
            shown.describe(f"{text} {holder['doing']}")
        self._elsewhere.add(node.name)
        self._moved.set()
        self._slots.pause(SECONDS_BETWEEN_LOOKS)
        if self._slots.stopping:
            raise Preempted("was waiting for another job when the run was asked to stop")

    def _compute(
        self,
        node: Node,
        artifacts: Mapping[str, Artifact],
        claim: Claim,
        about: Mapping[str, Any],
        shown: _ProgressArtifact,
    ) -> Action | None:
        """Compute a stage on a slot, or None when another job was first. A lease is taken only with a slot at hand:
        who waits for a device must not keep the stage from others who have one.
        """
        pace, place = Pace(), ""

        def waiting(text: str) -> None:
            self.terminal.wait(node.name, text, "")
            shown.describe(text)
            if claim.is_taken() or lookup(self.store, node.stage, node.parameters, artifacts, self.device):
                raise _Elsewhere

        context = {
            "run": self.result.run,
            "attempt": self.result.attempt,
            "recipe": self.recipe.name,
            "node": node.name,
        }
        try:
            with self._slots.taken(node.stage, waiting) as worker:
                lease = claim.acquire()
                if lease is None:
                    return None
                with Heartbeat(self.store, lease, about) as heartbeat:
                    # Between the last look-up and the lease another job may have finished.
                    if lookup(self.store, node.stage, node.parameters, artifacts, self.device):
                        return None

                    def progress(what: str, done: int, total: int) -> None:
                        self.terminal.advance(node.name, what, done, total)
                        heartbeat.doing = f"{pace.describe(what, done, total)}{place}"
                        shown.update(100.0 * done / total, heartbeat.doing)

                    if worker.visible:
                        place = f", on device {worker.visible}"
                        context["visible_device"] = worker.visible
                        heartbeat.doing = f"beginning{place}"
                        shown.take(worker.visible, heartbeat.doing)
                    budget = self._budget if node.stage.on_device else None
                    with budget.metered() if budget else contextlib.nullcontext():
                        return worker.compute(
                            self.store, node.stage, node.parameters, artifacts, context, progress, lease
                        )
        except _Elsewhere:
            return None

    def _name_journals_that_do_not_fit(self, node: Node, image: Mapping[str, Any]) -> None:
        """Say of earlier unfinished attempts at this node why they are of no use now."""
        for journal in unfinished(self.store):
            context, then = journal["context"], journal["preimage"]
            if (context.get("recipe"), context.get("node")) == (self.recipe.name, node.name) and then != image:
                fields = ", ".join(f"{d.field} was {d.then!r}, is {d.now!r}" for d in compare(image, then))
                self.terminal.say(f"  {node.name}: an unfinished attempt of an earlier run does not fit: {fields}")

    def _show_artifact(self, node: Node, action: Action, state: str) -> None:
        from prefect.artifacts import create_markdown_artifact

        def show() -> None:
            create_markdown_artifact(
                markdown=provenance_markdown(node, action, state),
                key=artifact_key(f"{self.recipe.name}-{node.name}"),
                description=f"{node.name} ({state})",
            )

        self.dashboard.show(f"the provenance of {node.name}", show)


class _ProgressArtifact:
    """A stage's progress on the dashboard."""

    def __init__(self, dashboard: Dashboard, recipe: str, node: str) -> None:
        self._dashboard = dashboard
        self._key = artifact_key(f"{recipe}-{node}-progress")
        self._node = node
        self._id: Any = None
        self._described = ""
        self._has_device = False

    def update(self, percent: float, text: str) -> None:
        from prefect.artifacts import create_progress_artifact, update_progress_artifact

        self._described = text

        def show() -> None:
            if self._id is None:
                self._id = create_progress_artifact(percent, key=self._key, description=f"{self._node}: {text}")
            else:
                update_progress_artifact(self._id, percent, description=f"{self._node}: {text}")

        self._dashboard.show(f"the progress of {self._node}", show)

    def describe(self, text: str) -> None:
        """What the stage waits for; told once."""
        if text != self._described:
            self.update(0.0, text)
            if self._has_device:  # it has lost it
                self._note({})

    def take(self, device: str, text: str) -> None:
        """Say which device the stage has from now on, for `coldpress status`."""
        self.update(0.0, text)
        self._note(device_note(device))

    def _note(self, about: dict[str, str]) -> None:
        from prefect.client.orchestration import get_client
        from prefect.client.schemas.actions import ArtifactUpdate

        self._has_device = bool(about)
        if self._id is None:  # the server was away when it was to be made
            return

        def show() -> None:
            with get_client(sync_client=True) as client:
                client.update_artifact(self._id, ArtifactUpdate(metadata_=about))

        self._dashboard.show(f"the device of {self._node}", show)


def grace_seconds() -> float:
    """How long stages may take to stop: $COLDPRESS_GRACE_SECONDS, 20 by default."""
    text = os.environ.get("COLDPRESS_GRACE_SECONDS", "20")
    try:
        return float(text)
    except ValueError as error:
        raise ColdpressError(f"COLDPRESS_GRACE_SECONDS is {text!r}; write a number of seconds") from error


def _with_line(recipe: Recipe, node: Node, error: Exception) -> str:
    return f"{error} ({recipe.path}:{node.line})" if node.line else str(error)
