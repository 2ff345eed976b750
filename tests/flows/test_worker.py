"""The computing process: answers, errors, death."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from coldpress.flows import worker as worker_module
from coldpress.flows.worker import Worker, WorkerDied
from coldpress.storage.artifacts import Artifact
from coldpress.storage.errors import ColdpressError
from coldpress.storage.store import Store
from coldpress.tasks.catalogue import stage_named
from coldpress.tasks.evaluation import efficiency_stage


@pytest.fixture
def worker() -> Iterator[Worker]:
    worker = Worker("cpu")
    yield worker
    worker.kill()


def test_a_worker_computes_reports_progress_and_passes_errors_on_as_sentences(
    worker: Worker, store: Store, tiny_model_folder: Callable[..., str]
) -> None:
    stage = stage_named("source/model")
    steps: list[tuple[str, int, int]] = []

    def progress(what: str, done: int, total: int) -> None:
        steps.append((what, done, total))

    action = worker.compute(
        store, stage, stage.parameters(source=tiny_model_folder("llama")), {}, {"run": "r1"}, progress
    )
    assert store.holds(action.artifact)
    assert action.provenance["run"] == "r1"
    assert action.provenance["peak_memory_bytes"] > 50e6
    assert steps[-1] == ("reading", 4, 4)
    with pytest.raises(ColdpressError, match="is neither a file nor a folder"):
        worker.compute(store, stage, stage.parameters(source="./nowhere"), {}, {}, progress)
    # it lives on
    again = worker.compute(
        store, stage, stage.parameters(source=tiny_model_folder("llama"), dtype="bfloat16"), {}, {}, progress
    )
    assert again.artifact != action.artifact


def test_parameters_that_exclude_each_other_pass_as_long_as_one_was_left_out(
    worker: Worker, store: Store, import_model: Callable[..., Artifact], text_file: str
) -> None:
    """Values at their defaults are not passed on as if they had been asked for."""
    stage = stage_named("source/tokens")
    parameters = stage.parameters(source=text_file, samples=2, length=16)
    action = worker.compute(store, stage, parameters, {"model": import_model("llama")}, {}, lambda *report: None)
    assert store.holds(action.artifact)


def test_a_killed_worker_is_an_error_and_not_a_hang(
    worker: Worker, store: Store, tiny_model_folder: Callable[..., str]
) -> None:
    stage = stage_named("source/model")
    parameters = stage.parameters(source=tiny_model_folder("llama"))

    def compute_for_ever() -> None:
        while True:
            worker.compute(store, stage, parameters, {}, {}, lambda what, done, total: None)

    threading.Timer(0.5, lambda: os.kill(worker._process.pid, signal.SIGKILL)).start()
    with pytest.raises(WorkerDied, match="killed"):
        compute_for_ever()


def test_what_lies_in_the_users_folder_is_no_module(
    store: Store, tiny_model_folder: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tokenizers.py").write_text("raise SystemExit('the user's own')")
    monkeypatch.chdir(tmp_path)
    worker = Worker("cpu")
    stage = stage_named("source/model")
    parameters = stage.parameters(source=tiny_model_folder("llama"))
    try:
        assert store.holds(worker.compute(store, stage, parameters, {}, {}, lambda *report: None).artifact)
    finally:
        worker.kill()


def test_whatever_libraries_print_a_worker_goes_on(
    store: Store, tiny_model_folder: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # More than a pipe holds, and no UTF-8.
    (tmp_path / "sitecustomize.py").write_text("import os\nos.write(2, b'caf\\xe9\\n' + b'loud\\n' * 50_000)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    worker = Worker("cpu")
    stage = stage_named("source/model")
    parameters = stage.parameters(source=tiny_model_folder("llama"))
    threading.Timer(60, worker.kill).start()
    try:
        assert store.holds(worker.compute(store, stage, parameters, {}, {}, lambda *report: None).artifact)
    finally:
        worker.kill()


def test_settings_of_the_computing_process_are_not_those_of_what_it_measures() -> None:
    assert set(worker_module._ENVIRONMENT) == set(efficiency_stage._NOT_OURS)
