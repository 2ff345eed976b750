"""Scores on lm-eval's tasks, by lm-eval itself: those that its command line gives for the exported folder."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import random
import warnings
from collections.abc import Iterator, Mapping
from numbers import Real
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from ...storage.artifacts import Artifact, ArtifactWriter
from ..formats import FORMATS
from ..stage import Parameters, Run, StageError, json_file, stage
from .lm_eval_tasks import ALLOW_CODE, Definitions, code_is_allowed, content, define, refusals, version

# lm-eval's own seeds: of Python's, NumPy's and torch's generators, and of the few-shot examples.
SEEDS = (0, 1234, 1234, 1234)


class LmEvalParameters(Parameters):
    """Which tasks, and how they are put to the model."""

    location = frozenset({"include_path"})

    tasks: tuple[str, ...] = Field(min_length=1, description="names of lm-eval's tasks, groups or tags")
    limit: int | None = Field(None, ge=1, description="only the first so many questions of each task")
    share: float | None = Field(None, gt=0, le=1, description="a random share of each task's questions, by the seed")
    num_fewshot: int | None = Field(None, ge=0, description="examples before a question; left out: the task's own")
    batch_size: int = Field(1, ge=1, description="requests at once; scores may differ in the last digits")
    include_path: str | None = Field(None, description="folder with task files of your own, searched besides lm-eval's")
    seed: int | None = Field(
        None, ge=0, description="of few-shot examples, sampling and the share; left out: lm-eval's own, 0 for the share"
    )
    chat_template: bool = Field(False, description="put questions in the model's chat template")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="of the forward pass; auto is the checkpoint's own"
    )

    @field_validator("tasks")
    @classmethod
    def _each_once(cls, tasks: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(sorted(set(tasks)))  # in any order they are the same measurement

    @model_validator(mode="after")
    def _one_way_to_choose(self) -> LmEvalParameters:
        if self.limit is not None and self.share is not None:
            raise ValueError("'limit' takes the first questions and 'share' random ones; give one of them")
        return self


@stage(
    "evaluate",
    "lm-eval",
    version=1,
    parameters=LmEvalParameters,
    inputs={"model": "checkpoint"},
    output="metrics",
    accepts=frozenset((*FORMATS, "adapter")),
    content=lambda parameters: content(parameters.tasks, parameters.include_path),
    paper="Gao et al., the Language Model Evaluation Harness, zenodo.org/records/12608602",
)
def lm_eval(run: Run, parameters: LmEvalParameters, model: Artifact) -> Artifact:
    """Scores on tasks of lm-eval (arc_easy, mmlu, …), equal to those of its command line on the exported folder.

    Metrics are `<task>.<metric>`, with `,<filter>` where a task has several ways to read an answer, its standard error
    `…_stderr`, and `<task>.n` questions; groups have them too. items.json has the scores of each question.
    """
    definitions = define(parameters.tasks, parameters.include_path)
    for problem in refusals(definitions):
        raise StageError(problem)
    run.progress("loading tasks", 0, 1)

    import torch
    from lm_eval.evaluator import evaluate

    from ..blocks import StoredModel, resolve_dtype
    from .lm_eval_model import JournaledModel
    from .whole_model import tokenizer_of, whole_model

    seeds = SEEDS if parameters.seed is None else (parameters.seed,) * 4
    with _heard(), _no_foreign_code(definitions):
        loaded = _load_tasks(parameters, definitions, seeds)
        tokenizer = tokenizer_of(run, model)
        if parameters.chat_template and not tokenizer.chat_template:
            raise StageError("chat_template: the model's tokenizer has none; leave it out")
        with StoredModel(run, model) as stored:
            dtype = resolve_dtype(parameters.dtype, stored)
            network = whole_model(run, stored, dtype)
        with _quiet():  # it remarks that the model was made elsewhere
            answering = JournaledModel(run, network, tokenizer, parameters.batch_size)
        torch.manual_seed(seeds[2])
        found = evaluate(
            lm=answering,
            task_dict=loaded,
            limit=parameters.limit,
            samples=_drawn(loaded["tasks"], parameters),
            apply_chat_template=parameters.chat_template,
            fewshot_as_multiturn=parameters.chat_template,
        )
    assert found is not None
    _note_resumed(run, answering.taken_over, answering.taken_over + answering.asked)
    how = f"{str(dtype).removeprefix('torch.')}, batch size {parameters.batch_size}"
    runtime = f"lm-eval {version()} with transformers, {how}"
    with ArtifactWriter(run.store, "metrics") as writer:
        writer.add_file("metrics.json", json_file({**metrics_of(found), "runtime": runtime}))
        writer.add_file("items.json", json_file(items_of(found)))
        return writer.publish()


def metrics_of(found: Mapping[str, Any]) -> dict[str, float]:
    """Flat metrics of lm-eval's results; a standard error that it could not give is left out."""
    metrics: dict[str, float] = {}
    for task, values in found["results"].items():
        for name, value in values.items():
            metric, separator, kind = name.partition(",")
            if not separator or not isinstance(value, Real):
                continue
            error = metric.endswith("_stderr")
            label = _label(task, metric.removesuffix("_stderr"), kind) + ("_stderr" if error else "")
            if math.isfinite(value):
                metrics[label] = float(value)
            else:
                warnings.warn(f"lm-eval gave no finite number for {label}", stacklevel=2)
        count = found["n-samples"].get(task, {}).get("effective", values.get("sample_len"))
        if count is not None:
            metrics[f"{task}.n"] = int(count)
    return metrics


def items_of(found: Mapping[str, Any]) -> dict[str, list[float]]:
    """{metric: [value of each question]} in the order of the questions, for metrics that have one number for each."""
    items: dict[str, list[float]] = {}
    for task, samples in found["samples"].items():
        for sample in sorted(samples, key=lambda sample: int(sample["doc_id"])):
            for metric in sample["metrics"]:
                if isinstance(value := sample[metric], Real) and math.isfinite(value):
                    items.setdefault(_label(task, metric, sample["filter"]), []).append(float(value))
    return items


def _label(task: str, metric: str, kind: str) -> str:
    """ "arc_easy.acc", or "gsm8k.exact_match,strict-match" where answers are filtered."""
    return f"{task}.{metric}" if kind == "none" else f"{task}.{metric},{kind}"


def _load_tasks(parameters: LmEvalParameters, definitions: Definitions, seeds: tuple[int, ...]) -> dict[str, Any]:
    """The tasks and groups as lm-eval builds them, with their data. Raises StageError when these can't be had."""
    import numpy
    import torch
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HfHubHTTPError
    from lm_eval.tasks import TaskManager

    # The error for "no connection" belongs to whatever HTTP library this version of the Hub client is built on.
    http_error: type[BaseException] = HfHubHTTPError.__bases__[0]
    random.seed(seeds[0])
    numpy.random.seed(seeds[1])
    torch.manual_seed(seeds[2])
    manager = TaskManager(include_path=list(definitions.folders), include_defaults=False)
    loaded: dict[str, Any] = {"tasks": {}, "groups": {}}
    for name in parameters.tasks:
        try:
            part = manager.load([name])
        except (OSError, ValueError, ImportError, RuntimeError, DatasetsError, http_error) as error:
            data_sets = define([name], parameters.include_path).data_sets()
            sets = ", ".join(f"'{one}'" for one in data_sets)
            said = (str(error).strip() or type(error).__name__).splitlines()[0]
            offline = [name for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE") if os.environ.get(name) == "1"]
            advice = f"; {offline[0]} is set, so it must have been downloaded before" if offline else ""
            if any("/" in one for one in data_sets):
                advice += (
                    "; where the Hub is out of reach, copy the cache ($HF_HOME) of a machine that has loaded it, or "
                    "name data files in a task of your own (include_path)"
                )
            needed = f" with its data set {sets}" if sets else ""
            raise StageError(f"task '{name}' can't be loaded{needed}: {said}{advice}") from error
        loaded["tasks"].update(part["tasks"])
        loaded["groups"].update(part.get("groups", {}))
    for name, task in loaded["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False):
            raise StageError(f"task '{name}' runs the code that the model writes, which coldpress doesn't")
        if getattr(task, "MULTIMODAL", False):
            raise StageError(f"task '{name}' shows the model more than text")
        own = task.get_config("num_fewshot")
        if parameters.num_fewshot is not None and own != 0:  # tasks that insist on none keep that
            task.set_config(key="num_fewshot", value=parameters.num_fewshot)
        elif own is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=seeds[3])
    return loaded


def _drawn(tasks: Mapping[str, Any], parameters: LmEvalParameters) -> dict[str, list[int]] | None:
    """The numbers of the questions to ask of each task, where only a share of them is wanted."""
    if parameters.share is None:
        return None
    chosen = {}
    for name, task in tasks.items():
        there = len(task.eval_docs)
        draw = random.Random(f"{parameters.seed or 0} {name}")
        chosen[name] = sorted(draw.sample(range(there), max(1, round(parameters.share * there))))
    return chosen


def _note_resumed(run: Run, taken_over: int, total: int) -> None:
    assert run.journal is not None
    before = run.journal.attempts[-1]["from_step"]
    if before:
        seconds = round(sum(step["seconds"] for step in run.journal.steps[:before]), 3)
        run.note("resumed", {"from_answer": taken_over, "of": total, "seconds_before": seconds})


@contextlib.contextmanager
def _no_foreign_code(definitions: Definitions) -> Iterator[None]:
    """Task files that don't come with lm-eval are data, unless the operator allows code: see `refusals`.

    lm-eval renders their templates where Jinja reaches all of Python, and takes a metric that it doesn't know for one
    on the Hub, which is code. So these are rendered in Jinja's sandbox and refused. Raises StageError.
    """
    foreign = definitions.foreign()
    if not foreign or code_is_allowed():
        yield
        return
    import lm_eval.api.metrics
    import lm_eval.utils
    from jinja2.exceptions import SecurityError
    from jinja2.sandbox import SandboxedEnvironment
    from lm_eval.api.registry import metric_registry

    for name in foreign:
        for entry in definitions.tasks[name].get("metric_list") or ():
            metric = entry.get("metric") if isinstance(entry, dict) else None
            if metric not in metric_registry:
                raise StageError(
                    f"task '{name}' has the metric {metric!r}, which lm-eval doesn't know and would take from the "
                    f"Hub as code to run; use one of lm-eval's, or set {ALLOW_CODE}=1 where it is computed"
                )
    before = lm_eval.utils.env
    confined = SandboxedEnvironment(
        loader=before.loader, undefined=before.undefined, keep_trailing_newline=before.keep_trailing_newline
    )
    confined.filters.update(before.filters)
    lm_eval.utils.env = confined
    try:
        yield
    except SecurityError as error:
        raise StageError(
            f"a template in the task files {', '.join(sorted({file for files in foreign.values() for file in files}))} "
            f"reaches for Python itself: {error}; if that is meant, set {ALLOW_CODE}=1 where it is computed"
        ) from error
    finally:
        lm_eval.utils.env = before


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


@contextlib.contextmanager
def _heard() -> Iterator[None]:
    """What lm-eval warns of becomes Python warnings, the first from each place in it."""
    handler = _Handler(logging.WARNING)
    logger = logging.getLogger("lm_eval")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


class _Handler(logging.Handler):
    def __init__(self, level: int) -> None:
        super().__init__(level)
        self._places: set[tuple[str, int]] = set()

    def emit(self, record: logging.LogRecord) -> None:
        place = (record.pathname, record.lineno)
        if place not in self._places:
            self._places.add(place)
            warnings.warn(f"lm-eval: {record.getMessage()}", stacklevel=2)
