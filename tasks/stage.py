"""What a stage is: artifacts in, parameters in, one artifact out.

`@stage(...)` puts a function into the catalogue with everything needed to check, key and run it. The key of a
stage is SHA-256 over: the stage's name, its own version, its parameters (those at their default left out), the
content ids of its inputs by role, and, for a source, the content id of what it reads; for a measurement of the
machine, its hardware and library versions. Device, worker count and progress stay out. The function itself is plain:
`flows` turns it into a Prefect task.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import platform
import resource
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict

from ..storage.artifacts import Artifact, Kind
from ..storage.digests import digest_of
from ..storage.errors import ColdpressError
from ..storage.journal import Journal
from ..storage.leases import Lease
from ..storage.store import Action, Store
from .device_lock import device_lock
from .hardware import hardware_id

logger = logging.getLogger("coldpress")


class StageError(ColdpressError):
    """A stage that can't do what it was asked."""


class Preempted(ColdpressError):
    """A stage that ended because it was asked to stop; the next attempt goes on where its journal ends."""


class Parameters(BaseModel):
    """Base of all stage parameters. Field descriptions are what `coldpress stages` prints."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    # Fields that say where something is rather than what it is; the content id stands in the key for them.
    location: ClassVar[frozenset[str]] = frozenset()

    def for_key(self) -> dict[str, Any]:
        """The parameters that differ from their defaults, as JSON values."""
        return self.model_dump(mode="json", exclude_defaults=True, exclude=set(self.location))


@dataclass(frozen=True)
class ModelFacts:
    """What is known of a checkpoint before it is loaded: its config.json, format, and whether it has masks.

    original: the facts of the model that a stage compares it with, its input `original` or `teacher`, where they are
    known.
    """

    config: Mapping[str, Any]
    format: str = "dense"
    masked: bool = False
    original: ModelFacts | None = None


def facts_of(store: Store, checkpoint: Artifact) -> ModelFacts:
    """The facts of a checkpoint in the store; of an adapter, those of its checkpoint."""
    manifest = store.manifest(checkpoint)
    if manifest.base is not None:
        checkpoint = Artifact("checkpoint", manifest.base)
        manifest = store.manifest(checkpoint)
    return ModelFacts(json.loads(store.read_file(checkpoint, "config.json")), manifest.format, bool(manifest.masks))


@dataclass(frozen=True)
class Run:
    """What a stage function may use besides its inputs.

    device: "cpu", "cuda", "cuda:1" …; progress(what, done, total) is called once a block or so; `note` adds a
    JSON value to the provenance. stop_asked: whether the stage is to end soon, its work kept for the next attempt.
    journal: what earlier attempts did; `compute` opens it. has_device: whether a stage that computes this one within
    itself holds the device already.
    """

    store: Store
    device: str = "cpu"
    progress: Callable[[str, int, int], None] = lambda what, done, total: None
    notes: dict[str, Any] = field(default_factory=dict)
    stop_asked: Callable[[], bool] = lambda: False
    journal: Journal | None = None
    has_device: bool = False

    def stop_if_asked(self) -> None:
        """Raises Preempted when the stage is to end."""
        if self.stop_asked():
            raise Preempted("stopped before it was done; the next run goes on from here")

    def note(self, name: str, value: Any) -> None:
        self.notes[name] = value

    def merge_notes(self, notes: Mapping[str, Mapping[str, Any]]) -> None:
        """Add to notes that are made piece by piece, {name: {layer: value}}."""
        for name, values in notes.items():
            self.notes.setdefault(name, {}).update(values)


@dataclass(frozen=True)
class Stage:
    """An entry of the catalogue.

    use, method: how recipes name it. version: raised when its results change. inputs: role -> kind of artifact.
    paper: where the method comes from. check: errors that can be known from parameters and model facts alone.
    after: the facts of the checkpoint it makes. accepts: checkpoint formats it can read, and "adapter" if it takes a
    checkpoint with its adapter, as `StoredModel` opens them, for a checkpoint; a teacher may always be one.
    passed_on: those of its inputs that it does not read itself, only what it derives; a recipe gives them when
    something is derived. bits_written: how many for each weight of the model, where neither the kind of its output nor
    a parameter `bits` says so. alone: it measures the machine: no other stage uses the device meanwhile, and its key
    holds the hardware.
    content: for a source, the content id of what its parameters point at. derived: further inputs that the parameters
    ask for, role -> (stage that makes it, its parameters); that stage takes the same model and calibration, or, for an
    evaluation, the first model of the variant's branch, which is also what an input `reference` is.
    on_device: whether it computes on the run's device; what only reads and writes doesn't take one.
    """

    use: str
    method: str
    version: int
    parameters: type[Parameters]
    inputs: Mapping[str, Kind]
    output: Kind
    function: Callable[..., Artifact]
    summary: str
    paper: str
    check: Callable[[Any, ModelFacts], Iterator[str]]
    after: Callable[[Any, ModelFacts], ModelFacts]
    accepts: frozenset[str]
    content: Callable[[Any], dict[str, Any]] | None
    derived: Callable[[Any], Mapping[str, tuple[str, dict[str, Any]]]]
    passed_on: frozenset[str]
    bits_written: float | None
    alone: bool
    on_device: bool

    @property
    def name(self) -> str:
        """ "prune/wanda": names the stage in keys, in the store and on the dashboard."""
        return f"{self.use}/{self.method}"

    def refusal(self, inputs: Mapping[str, Kind]) -> str | None:
        """Why it can't work on inputs of these kinds, by role; None if it can."""
        for role, kind in inputs.items():
            if self.inputs.get(role) == "adapter" and kind != "adapter":
                return f"{self.name} needs an adapter as '{role}', what adapt or compensate made"
            takes_it = "adapter" in self.accepts or role == "teacher"
            if kind == "adapter" and self.inputs.get(role) == "checkpoint" and not takes_it:
                return f"{self.name} can't take an adapter as '{role}'; name the checkpoint that the adapter belongs to"
        return None


CATALOGUE: dict[str, Stage] = {}


def _no_errors(parameters: Any, facts: ModelFacts) -> Iterator[str]:
    return iter(())


def _same_facts(parameters: Any, facts: ModelFacts) -> ModelFacts:
    return facts


def stage(
    use: str,
    method: str,
    *,
    version: int,
    parameters: type[Parameters],
    output: Kind,
    inputs: Mapping[str, Kind] | None = None,
    paper: str = "",
    check: Callable[[Any, ModelFacts], Iterator[str]] = _no_errors,
    after: Callable[[Any, ModelFacts], ModelFacts] = _same_facts,
    accepts: frozenset[str] = frozenset({"dense"}),
    content: Callable[[Any], dict[str, Any]] | None = None,
    derived: Callable[[Any], Mapping[str, tuple[str, dict[str, Any]]]] = lambda parameters: {},
    passed_on: frozenset[str] = frozenset(),
    bits_written: float | None = None,
    alone: bool = False,
    on_device: bool = True,
) -> Callable[[Callable[..., Artifact]], Stage]:
    """Register `function(run, parameters, **inputs) -> Artifact` as a stage; see `Stage` for the arguments."""

    def register(function: Callable[..., Artifact]) -> Stage:
        summary = " ".join((function.__doc__ or "").split("\n\n")[0].split())
        entry = Stage(
            use, method, version, parameters, inputs or {}, output, function, summary, paper, check, after, accepts,
            content, derived, passed_on, bits_written, alone, on_device,
        )  # fmt: skip
        assert entry.name not in CATALOGUE, f"two stages are called {entry.name}"
        CATALOGUE[entry.name] = entry
        return entry

    return register


def preimage(
    entry: Stage, parameters: Parameters, inputs: Mapping[str, Artifact], device: str = "auto"
) -> dict[str, Any]:
    """Everything a stage's result depends on; its digest is the key. device: what a measurement is made on."""
    image: dict[str, Any] = {
        "stage": entry.name,
        "version": entry.version,
        "parameters": parameters.for_key(),
        "inputs": {role: artifact.id for role, artifact in inputs.items()},
    }
    if entry.content is not None:
        image["content"] = entry.content(parameters)
    if entry.alone:
        image["hardware"] = hardware_id(device)
    return image


def lookup(
    store: Store, entry: Stage, parameters: Parameters, inputs: Mapping[str, Artifact], device: str = "auto"
) -> Action | None:
    """The proven cached result of a stage, or None. Imports nothing heavy."""
    return store.lookup(entry.name, digest_of(preimage(entry, parameters, inputs, device)))


def impossible(store: Store, entry: Stage, parameters: Parameters, inputs: Mapping[str, Artifact]) -> Iterator[str]:
    """Why a stage can't do what it was asked with the model at hand: what planning may not have known of it."""
    model = inputs.get("model")
    if model is None or model.kind not in ("checkpoint", "adapter"):
        return
    facts = facts_of(store, model)
    other = inputs.get("original") or inputs.get("teacher")
    if other is not None and other.kind in ("checkpoint", "adapter"):
        facts = replace(facts, original=facts_of(store, other))
    if facts.format not in entry.accepts:
        takes = ", ".join(sorted(entry.accepts))
        advice = (
            "; take the model before it was quantized, or quantize last"
            if entry.accepts <= {"dense", "adapter"}
            else ""
        )
        yield f"{entry.name} can't read a checkpoint in the format '{facts.format}'; it takes {takes}{advice}"
    else:
        yield from entry.check(parameters, facts)


def compute(
    run: Run,
    entry: Stage,
    parameters: Parameters,
    inputs: Mapping[str, Artifact],
    context: Mapping[str, Any] | None = None,
    lease: Lease | None = None,
) -> Action:
    """Run a stage now and publish its action. `context` (run id, recipe, …) goes into the provenance.

    lease: the right to compute it; raises LeaseLost at the first commit to the journal after it was taken over.
    """
    if refusal := entry.refusal({role: artifact.kind for role, artifact in inputs.items()}):
        raise StageError(refusal)
    for problem in impossible(run.store, entry, parameters, inputs):
        raise StageError(problem)
    image = preimage(entry, parameters, inputs, run.device)
    key = digest_of(image)
    if lease is not None and lease.key != key:
        raise StageError(
            f"{entry.name} was planned for other hardware than {run.device}, which it would run on; name the device "
            "(--device)"
        )
    with _device(run, alone=entry.alone):
        started = time.time()
        clock = time.perf_counter()
        memory = PeakMemory(run.device)
        began = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started))
        journal = Journal(run.store, image, {**(context or {}), "started": began, "host": socket.gethostname()}, lease)
        with _recorded_warnings() as said:
            artifact = entry.function(replace(run, journal=journal, has_device=True), parameters, **inputs)
        seconds = time.perf_counter() - clock
        peaks = memory.reading()
    before = run.notes.get("resumed", {}).get("seconds_before", 0.0)
    provenance = {
        "seconds": round(before + seconds, 3),
        "started": began,
        **peaks,
        "device": run.device,
        "host": socket.gethostname(),
        "python": platform.python_version(),
        "versions": _library_versions(),
        "commit": _commit(),
        "warnings": said,
        "attempts": journal.attempts,
        **run.notes,
        **(context or {}),
    }
    action = run.store.record(Action(entry.name, key, artifact, image, provenance))
    journal.discard()
    return action


def _device(run: Run, *, alone: bool) -> contextlib.AbstractContextManager[None]:
    """The right to use the run's device, waited for. A stage within a stage has it, for sharing."""
    if run.has_device:
        assert not alone, "a stage can't measure the machine while another one computes around it"
        return contextlib.nullcontext()

    def waiting() -> None:
        run.stop_if_asked()
        run.progress("waiting until the device is free", 0, 1)

    return device_lock(run.device, alone=alone, waiting=waiting)


def obtain(run: Run, name: str, inputs: Mapping[str, Artifact], **settings: Any) -> Artifact:
    """The result of another stage that a running one needs: from the store, or computed now and recorded there.

    What that stage derives is obtained, too; it gets those of the inputs that it takes.
    """
    entry = CATALOGUE[name]
    parameters = entry.parameters(**settings)
    taken = {role: artifact for role, artifact in inputs.items() if role in entry.inputs}
    for role, (asked, further) in entry.derived(parameters).items():
        taken[role] = obtain(run, asked, inputs, **further)
    for role in entry.passed_on:
        taken.pop(role, None)
    found = lookup(run.store, entry, parameters, taken, run.device)
    return (found or compute(replace(run, notes={}), entry, parameters, taken)).artifact


class PeakMemory:
    """Peak memory since construction: resident bytes of this process, and on CUDA bytes allocated and reserved.

    A stage within a stage has one of its own, which sets the counters back; the outer one remembers what they were.
    """

    _newest: ClassVar[PeakMemory | None] = None

    def __init__(self, device: str) -> None:
        self._device = device
        self._resettable = True
        self._until_set_back: dict[str, int] = {}
        self._outer = PeakMemory._newest
        if self._outer is not None:
            self._outer._until_set_back = self._outer._peaks()
        PeakMemory._newest = self
        try:
            with open("/proc/self/clear_refs", "w") as file:
                file.write("5")  # resets VmHWM to the present size
        except OSError:
            self._resettable = False
        if device.startswith("cuda"):
            import torch

            torch.cuda.reset_peak_memory_stats(device)

    def reading(self) -> dict[str, Any]:
        """{"peak_memory_bytes": …, "peak_memory_of": "stage" or "process"} and, on CUDA, the device's counters."""
        PeakMemory._newest = self._outer
        return {**self._peaks(), "peak_memory_of": "stage" if self._resettable else "process"}

    def _peaks(self) -> dict[str, int]:
        found = {"peak_memory_bytes": self._high_water()}
        if self._device.startswith("cuda"):
            import torch

            found["peak_device_bytes"] = torch.cuda.max_memory_allocated(self._device)
            found["peak_device_reserved_bytes"] = torch.cuda.max_memory_reserved(self._device)
        return {name: max(peak, self._until_set_back.get(name, 0)) for name, peak in found.items()}

    @staticmethod
    def _high_water() -> int:
        if sys.platform == "linux":
            with open("/proc/self/status") as file:
                for line in file:
                    if line.startswith("VmHWM:"):
                        return int(line.split()[1]) * 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


class _recorded_warnings(list[str]):
    """Collects the text of Python warnings, each once, and passes them on to the log."""

    def __enter__(self) -> _recorded_warnings:
        self._catcher = warnings.catch_warnings()
        self._catcher.__enter__()
        warnings.simplefilter("default")
        warnings.showwarning = self._show  # type: ignore[assignment]
        return self

    def __exit__(self, *details: Any) -> None:
        self._catcher.__exit__(*details)

    def _show(self, message: Warning | str, category: type[Warning], *place: Any) -> None:
        text = f"{category.__name__}: {message}"
        if text not in self:
            self.append(text)
            logger.warning(text)


@functools.cache
def _commit() -> str | None:
    """The git commit of coldpress when it runs from a checkout, with a "+" when files were changed since."""
    folder = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    if not os.path.exists(os.path.join(folder, ".git")):
        return None
    try:
        asked = ["git", "-C", folder, "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+"]
        return subprocess.run(asked, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None  # no git here


@functools.cache
def _library_versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in ("coldpress", "torch", "transformers", "bitsandbytes", "tokenizers", "safetensors", "datasets"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def json_file(value: Any) -> bytes:
    """A config or metrics file as all of them are written: sorted keys, so that equal values are equal bytes."""
    return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()
