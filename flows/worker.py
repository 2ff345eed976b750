"""The process that computes: one for each device slot; a stage runs in its main thread, and torch lives there only.

`python -m coldpress.flows.worker` reads one JSON request a line from standard input and answers with JSON lines: any
number of `{"progress": …}`, then `{"done": …}`, `{"error": …}`, or the message of one of `_OUTCOMES`. `Worker` is the
other end. What libraries print goes to standard error, which `Worker` passes on to the log. When the other end dies,
even by `kill -9`, the process ends at once, in the middle of a stage too: its journal has what was committed.
"""

from __future__ import annotations

import collections
import gc
import json
import logging
import os
import select
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from typing import Any

from ..storage.artifacts import Artifact
from ..storage.errors import ColdpressError, DamagedBlob
from ..storage.leases import Lease, LeaseLost
from ..storage.store import Action, Store
from ..tasks.catalogue import stage_named
from ..tasks.stage import Parameters, Preempted, Run, Stage, StageError, compute

logger = logging.getLogger("coldpress")

Progress = Callable[[str, int, int], None]


# For the GNU C library, which others ignore: what a block needed goes back to the system when the block is done
# instead of lying in pieces in heaps, of which each thread would have its own, while the activations of calibration
# (smaller than this) are not mapped anew for each operation. For GNU's OpenMP, which torch computes with on a CPU: a
# thread that waits for work sleeps after a tenth of a millisecond or so instead of several, and leaves its core to
# threads that hash, write or select. What is measured elsewhere is rid of them: `efficiency_stage.py`.
_ENVIRONMENT = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(8 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(256 << 20),
    "GOMP_SPINCOUNT": "10000",
}


# Ends of a stage that the run has its own answers to.
_OUTCOMES: dict[str, type[ColdpressError]] = {kind.__name__: kind for kind in (Preempted, LeaseLost, DamagedBlob)}


class WorkerDied(StageError):
    """The worker process ended without an answer."""


class Worker:
    """A computing process, started at construction and used by one caller at a time.

    visible: the only CUDA device that it sees, or "" for none. share: how many processes share the machine's cores.
    """

    def __init__(self, device: str, *, visible: str | None = None, share: int = 1) -> None:
        self.device, self.visible = device, visible
        self._lock = threading.Lock()
        self._last_words: collections.deque[str] = collections.deque(maxlen=30)
        self._asked_to_stop = False
        # A session of its own, so that Ctrl-C reaches the run first and it decides what happens here.
        self._process = subprocess.Popen(
            # -P: modules come from where coldpress has them, never from a file in the user's folder.
            [sys.executable, "-P", "-m", "coldpress.flows.worker", device, str(share)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            errors="backslashreplace",  # libraries print what they like, and must be read
            env={**_ENVIRONMENT, **os.environ, **({} if visible is None else {"CUDA_VISIBLE_DEVICES": visible})},
            start_new_session=True,
        )
        threading.Thread(target=self._listen, daemon=True).start()

    def compute(
        self,
        store: Store,
        stage: Stage,
        parameters: Parameters,
        inputs: Mapping[str, Artifact],
        context: Mapping[str, Any],
        progress: Progress,
        lease: Lease | None = None,
    ) -> Action:
        """Run a stage there.

        Raises StageError with what the stage raised; Preempted when it was asked to stop; LeaseLost; DamagedBlob.
        """
        request = {
            "store": store.url,
            "stage": stage.name,
            "parameters": parameters.model_dump(mode="json", exclude_unset=True),
            "inputs": {role: list(artifact) for role, artifact in inputs.items()},
            "context": dict(context),
            "lease": list(lease) if lease else None,
        }
        with self._lock:
            assert self._process.stdin is not None
            assert self._process.stdout is not None
            try:
                self._process.stdin.write(json.dumps(request) + "\n")
                self._process.stdin.flush()
            except BrokenPipeError as error:
                raise self._obituary() from error
            for line in self._process.stdout:
                answer = json.loads(line)
                if "progress" in answer:
                    progress(*answer["progress"])
                elif outcome := _OUTCOMES.keys() & answer.keys():
                    (name,) = outcome
                    raise _OUTCOMES[name](answer[name])
                elif "error" in answer:
                    logger.debug("%s", answer["traceback"])
                    raise StageError(answer["error"])
                else:
                    return store.action(stage.name, answer["done"])
            raise self._obituary()

    def preempt(self) -> None:
        """Ask the process to end its stage soon, with its work kept in the stage's journal."""
        self._asked_to_stop = True
        if self._process.poll() is None:
            self._process.terminate()

    def kill(self) -> None:
        """End the process at once. The stage's journal keeps what it had committed."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()

    def _listen(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            if line.strip():
                self._last_words.append(line.rstrip())
                logger.info("%s", line.rstrip())

    def _obituary(self) -> WorkerDied | Preempted:
        code = self._process.wait()
        if self._asked_to_stop:
            return Preempted("ended where its journal ends; the next run goes on from there")
        if code == -signal.SIGKILL:
            return WorkerDied("the computing process was killed (by hand, or for lack of memory)")
        last = "; its last words: " + " | ".join(list(self._last_words)[-3:]) if self._last_words else ""
        return WorkerDied(f"the computing process ended with status {code}{last}")


class InProcess:
    """For `memory://` stores, which no other process can see: computes where it is called."""

    visible: str | None = None

    def __init__(self, device: str) -> None:
        self.device = device
        self._lock = threading.Lock()
        self._stop = threading.Event()

    def compute(
        self,
        store: Store,
        stage: Stage,
        parameters: Parameters,
        inputs: Mapping[str, Artifact],
        context: Mapping[str, Any],
        progress: Progress,
        lease: Lease | None = None,
    ) -> Action:
        """As `Worker.compute`."""
        with self._lock:
            run = Run(store, _resolve_device(self.device), progress, stop_asked=self._stop.is_set)
            return compute(run, stage, parameters, inputs, context, lease)

    def preempt(self) -> None:
        """As `Worker.preempt`."""
        self._stop.set()

    def kill(self) -> None:
        """Nothing to end."""


def _resolve_device(device: str) -> str:
    """ "auto" is CUDA where there is some, else the CPU. Raises StageError where CUDA is asked for and not there."""
    if device != "auto" and not device.startswith("cuda"):
        return device
    import torch

    there = torch.cuda.is_available()
    if device != "auto" and not there:
        seen = os.environ.get("CUDA_VISIBLE_DEVICES")
        raise StageError(f"there is no CUDA device here{'' if seen is None else f' called {seen}'}; see nvidia-smi")
    return device if device != "auto" else "cuda" if there else "cpu"


def _answer(stream: Any, **message: Any) -> None:
    stream.write(json.dumps(message) + "\n")
    stream.flush()


def _end_with_parent() -> None:
    """End this process when the other end of standard input is gone; the parent writes there as long as it lives."""
    poll = select.poll()
    poll.register(sys.stdin.fileno(), 0)  # asks for nothing but what is always told: POLLHUP
    poll.poll()
    os._exit(1)


def _serve(device: str, share: int) -> None:
    # Before anything slow: the parent may die while torch is imported.
    threading.Thread(target=_end_with_parent, daemon=True).start()
    asked: list[int] = []  # an Event has a lock, which a handler in the midst of a handler would wait for for ever
    signal.signal(signal.SIGTERM, lambda number, _: asked.append(number))
    # Answers get a descriptor of their own; whatever else is printed goes to standard error.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    gc.disable()  # while libraries make a million objects that stay: to look through them takes a tenth of a start
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(max(1, cores // share))
    torch.backends.cuda.matmul.allow_tf32 = False
    # The slow imports of stages, done while the server starts.
    import accelerate  # noqa: F401
    import transformers.modeling_layers
    import transformers.models.auto.modeling_auto  # noqa: F401

    gc.freeze()
    gc.enable()

    stores: dict[str, Store] = {}
    for line in sys.stdin:
        request = json.loads(line)
        store = stores.setdefault(request["store"], Store(request["store"]))
        stage = stage_named(request["stage"])

        def progress(what: str, done: int, total: int) -> None:
            _answer(answers, progress=[what, done, total])

        try:
            run = Run(store, _resolve_device(device), progress, stop_asked=lambda: bool(asked))
            parameters = stage.parameters.model_validate(request["parameters"])
            inputs = {role: Artifact(*artifact) for role, artifact in request["inputs"].items()}
            lease = Lease(*request["lease"]) if request["lease"] else None
            action = compute(run, stage, parameters, inputs, request["context"], lease)
            answer = {"done": action.key}
        except tuple(_OUTCOMES.values()) as error:
            answer = {type(error).__name__: str(error)}
        except ColdpressError as error:
            answer = {"error": str(error), "traceback": traceback.format_exc()}
        except Exception as error:  # noqa: BLE001 (the process boundary: everything is reported, with its traceback)
            trace = traceback.format_exc()
            sys.stderr.write(trace)
            sys.stderr.flush()
            answer = {"error": f"{type(error).__name__}: {error}", "traceback": trace}
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()  # others may compute on it before this process does again
        _answer(answers, **answer)


if __name__ == "__main__":
    _serve(sys.argv[1], int(sys.argv[2]))
