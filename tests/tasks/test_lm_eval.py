"""lm-eval's scores: those of its own command line, resumable, keyed by what the tasks say and read."""

from __future__ import annotations

import json
import math
import random
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from coldpress.storage.artifacts import Artifact
from coldpress.storage.errors import ColdpressError
from coldpress.storage.store import Action, Store
from coldpress.tasks.catalogue import stage_named
from coldpress.tasks.evaluation import lm_eval_model, lm_eval_tasks
from coldpress.tasks.evaluation.lm_eval_model import JournaledModel
from coldpress.tasks.evaluation.lm_eval_tasks import SourceError, content, define, scan
from coldpress.tasks.stage import Preempted, Run, StageError, compute
from pydantic import ValidationError

CHOICES = """\
dataset_path: json
dataset_kwargs: {data_files: {test: data/QUESTIONS}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{query}}"
doc_to_choice: choices
doc_to_target: gold
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
"""
TASKS = {
    "_choices": CHOICES.replace("QUESTIONS", "choices.jsonl"),
    "words.yaml": "include: _choices\ntask: words\ntag: with_choices\n",
    "more_words.yaml": "include: _choices\n'task': more_words\ntag: [with_choices]\n"
    "dataset_kwargs: {data_files: {test: data/more.jsonl}}\nnum_fewshot: 2\nfewshot_split: test\n",
    "all_words.yaml": "group: all_words\ntask:\n  - words\n  - more_words\n"
    "aggregate_metric_list:\n  - {metric: acc, weight_by_size: true}\n",
    "endings.yaml": """\
task: endings
dataset_path: json
dataset_kwargs: {data_files: {test: data/choices.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "{{query}}"
doc_to_target: "{{choices[gold]}}"
process_results: !function scoring.first_letter
generation_kwargs: {until: ["e"], max_gen_toks: 6, do_sample: false}
metric_list:
  - {metric: first_letter, aggregation: mean, higher_is_better: true}
  - {metric: length, aggregation: mean, higher_is_better: true}
""",
    "texts.yaml": """\
task: texts
dataset_path: json
dataset_kwargs: {data_files: {test: data/more.jsonl}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - {metric: word_perplexity}
  - {metric: bits_per_byte}
""",
    "drawn.yaml": "include: endings.yaml\ntask: drawn\n"
    "generation_kwargs: {until: [e], max_gen_toks: 6, do_sample: true, temperature: 1.5}\n",
    "scoring.py": "def first_letter(doc, results):\n"
    "    return {'first_letter': float(results[0].strip()[:1] in 'aeiou'), 'length': len(results[0])}\n",
}
KINDS = ("all_words", "endings", "texts")
# lm-eval's command line without its 14,000 tasks and its list of installed packages, which take half a minute.
COMMAND_LINE = (
    "import lm_eval.evaluator, lm_eval.tasks.manager\n"
    "lm_eval.tasks.manager.__file__ = '/nowhere/manager.py'\n"
    "lm_eval.evaluator.add_env_info = lambda results: None\n"
    "from lm_eval.__main__ import cli_evaluate\n"
    "cli_evaluate()\n"
)


@pytest.fixture
def my_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with tasks of all kinds, two of them with questions that are the same, from the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLDPRESS_ALLOW_CODE", "1")  # one of them has a function of its own
    write_tasks(tmp_path)
    return tmp_path / "tasks"


def write_tasks(root: Path) -> None:
    draw = random.Random(0)
    words = ["press", "block", "a", "the", "row", "zero mask", "i", "group code"]
    rows = [
        {
            "query": " ".join(draw.choices(words, k=draw.randint(2, 9))) + ":",
            "choices": [f" {word}" for word in draw.sample(words, 3)],
            "gold": draw.randrange(3),
            "text": " ".join(draw.choices(words, k=draw.randint(5, 90))),
        }
        for _ in range(14)
    ]
    (root / "tasks").mkdir(parents=True)
    (root / "data").mkdir()
    for name, part in {"choices": [*rows[:8], rows[0], rows[1]], "more": [*rows[8:], rows[2]]}.items():
        (root / "data" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    for name, text in TASKS.items():
        (root / "tasks" / name).write_text(text)


@pytest.fixture
def evaluate(
    run_stage: Callable[..., Artifact], read_metrics: Callable[[Artifact], dict[str, Any]], my_tasks: Path
) -> Callable[..., dict[str, Any]]:
    """`evaluate(model, tasks=[…], …)`: the metrics."""

    def run(model: Artifact, **parameters: Any) -> dict[str, Any]:
        settings = {"include_path": str(my_tasks), **parameters}
        return read_metrics(run_stage("evaluate/lm-eval", {"model": model}, **settings))

    return run


def test_scores_are_those_of_lm_evals_command_line(
    import_model: Callable[..., Artifact],
    export_folder: Callable[..., str],
    evaluate: Callable[..., dict[str, Any]],
    my_tasks: Path,
    tmp_path: Path,
) -> None:
    model = import_model("llama")
    folder = export_folder(model)
    asked = ["run", "--model", "hf", "--model_args", f"pretrained={folder}", "--device", "cpu", "--batch_size", "3"]
    asked += ["--tasks", *KINDS, "--include_path", str(my_tasks), "--output_path", str(tmp_path / "out.json")]
    done = subprocess.run(
        [sys.executable, "-c", COMMAND_LINE, *asked], capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (written,) = tmp_path.glob("out*.json")
    theirs = {
        f"{task}.{metric.removesuffix(',none')}": value
        for task, values in json.loads(written.read_text())["results"].items()
        for metric, value in values.items()
        if metric.endswith(",none") and isinstance(value, float)
    }
    ours = evaluate(model, tasks=list(KINDS), batch_size=3)
    assert {name: value for name, value in ours.items() if not name.endswith(".n") and name != "runtime"} == theirs
    assert {"all_words.acc", "words.acc_norm", "words.acc_stderr", "endings.length", "texts.word_perplexity"} <= set(
        ours
    )
    assert (ours["words.n"], ours["more_words.n"], ours["all_words.n"]) == (10, 7, 17)


def test_each_question_is_in_the_items(
    import_model: Callable[..., Artifact], run_stage: Callable[..., Artifact], store: Store, my_tasks: Path
) -> None:
    asked = {"tasks": ["with_choices"], "include_path": str(my_tasks)}
    artifact = run_stage("evaluate/lm-eval", {"model": import_model("llama")}, **asked)
    items = json.loads(store.read_file(artifact, "items.json"))
    metrics = json.loads(store.read_file(artifact, "metrics.json"))
    assert {name: len(values) for name, values in items.items()} == {
        "words.acc": 10, "words.acc_norm": 10, "more_words.acc": 7, "more_words.acc_norm": 7,
    }  # fmt: skip
    for name, values in items.items():
        assert math.isclose(sum(values) / len(values), metrics[name])
        assert set(values) == {0.0, 1.0}


def test_a_share_is_drawn_from_each_task(
    import_model: Callable[..., Artifact], evaluate: Callable[..., dict[str, Any]]
) -> None:
    model = import_model("llama")
    half = evaluate(model, tasks=["all_words"], share=0.5)
    assert (half["words.n"], half["more_words.n"], half["all_words.n"]) == (5, 4, 9)
    assert evaluate(model, tasks=["all_words"], limit=5)["words.n"] == 5


def test_an_adapter_is_scored_with_its_checkpoint(
    import_model: Callable[..., Artifact],
    run_stage: Callable[..., Artifact],
    evaluate: Callable[..., dict[str, Any]],
) -> None:
    base = import_model("llama")
    packed = run_stage("quantize/nf4", {"model": base})
    adapter = run_stage("compensate/svd", {"model": packed, "original": base}, rank=32)
    bits = [evaluate(model, tasks=["texts"])["texts.bits_per_byte"] for model in (base, packed, adapter)]
    assert abs(bits[2] - bits[0]) < abs(bits[1] - bits[0]) / 2  # it takes most of the rounding back


class Interrupted:
    """Attempts that are asked to stop after so many commits to the journal; counts what the model is asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rows = 0
        self.commits = 0
        call, generate, commit = (
            JournaledModel._model_call, JournaledModel._model_generate, JournaledModel._commit,
        )  # fmt: skip

        def counted_call(model: JournaledModel, inputs: torch.Tensor, *rest: Any) -> torch.Tensor:
            logits = call(model, inputs, *rest)
            self.rows += len(inputs)
            return logits

        def counted_generate(model: JournaledModel, **keywords: Any) -> torch.Tensor:
            output = generate(model, **keywords)
            self.rows += len(keywords["context"])
            return output

        def counted_commit(model: JournaledModel) -> None:
            self.commits += bool(model._pending)
            commit(model)

        monkeypatch.setattr(JournaledModel, "_model_call", counted_call)
        monkeypatch.setattr(JournaledModel, "_model_generate", counted_generate)
        monkeypatch.setattr(JournaledModel, "_commit", counted_commit)
        monkeypatch.setattr(lm_eval_model, "COMMIT_EVERY", 0.0)

    def attempt(self, store: Store, model: Artifact, stop_after: int, **parameters: Any) -> Action:
        self.rows = self.commits = 0
        entry = stage_named("evaluate/lm-eval")
        run = Run(store, stop_asked=lambda: self.commits >= stop_after)
        return compute(run, entry, entry.parameters(**parameters), {"model": model})


@pytest.mark.parametrize(("tasks", "batch_size"), [(("all_words", "endings"), 4), (("texts",), 2)])
def test_a_stopped_evaluation_asks_only_what_is_left_and_ends_in_the_same_bytes(
    tasks: tuple[str, ...],
    batch_size: int,
    import_model: Callable[..., Artifact],
    new_store: Callable[[], Store],
    my_tasks: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    interrupted = Interrupted(monkeypatch)
    parameters = {"tasks": tasks, "include_path": str(my_tasks), "batch_size": batch_size}
    undisturbed = new_store()
    whole = interrupted.attempt(undisturbed, import_model("llama", on=undisturbed), 10**6, **parameters)
    all_rows, all_commits = interrupted.rows, interrupted.commits
    assert all_commits > 3
    store = new_store()
    model = import_model("llama", on=store)
    rows = []
    for stop_after in (2, all_commits // 2):
        with pytest.raises(Preempted):
            interrupted.attempt(store, model, stop_after, **parameters)
        rows.append(interrupted.rows)
    resumed = interrupted.attempt(store, model, 10**6, **parameters)
    assert resumed.artifact == whole.artifact
    assert min(rows) > 0
    assert sum(rows) + interrupted.rows == all_rows
    note = resumed.provenance["resumed"]
    assert 0 < note["from_answer"] < note["of"]


def test_sampled_texts_are_drawn_anew_and_come_out_the_same(
    import_model: Callable[..., Artifact],
    new_store: Callable[[], Store],
    my_tasks: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    interrupted = Interrupted(monkeypatch)
    parameters = {"tasks": ["drawn", "endings"], "include_path": str(my_tasks), "batch_size": 2}
    undisturbed, store = new_store(), new_store()
    whole = interrupted.attempt(undisturbed, import_model("llama", on=undisturbed), 10**6, **parameters)
    model = import_model("llama", on=store)
    with pytest.raises(Preempted):
        interrupted.attempt(store, model, 3, **parameters)
    resumed = interrupted.attempt(store, model, 10**6, **parameters)
    assert resumed.artifact == whole.artifact
    assert resumed.provenance["resumed"]["of"] == 20


# What is in the key


def test_the_content_id_follows_definitions_and_data_and_not_where_they_are(
    my_tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ids(folder: Path) -> dict[str, Any]:
        found: dict[str, Any] = content(["all_words", "endings"], str(folder))["tasks"]
        return found

    before = ids(my_tasks)
    assert set(before) == {"words", "more_words", "endings"}
    write_tasks(tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path / "elsewhere")
    there = tmp_path / "elsewhere" / "tasks"
    assert ids(there) == before
    changes = {
        "tasks/_choices": {"words", "more_words"},
        "tasks/words.yaml": {"words"},
        "tasks/all_words.yaml": {"words", "more_words"},
        "data/more.jsonl": {"more_words"},
        "tasks/endings.yaml": {"endings"},
    }
    for name, affected in changes.items():
        file = tmp_path / "elsewhere" / name
        old = file.read_text()
        file.write_text(old + "\n")
        now = ids(there)
        assert {task for task in now if now[task] != before[task]} == affected
        file.write_text(old)
    (there / "scoring.py").write_text(TASKS["scoring.py"].replace("aeiou", "aeiouy"))
    assert ids(there)["endings"] != before["endings"]


def test_lm_evals_own_tasks_are_known_by_its_version() -> None:
    assert content(["arc_easy", "mmlu"], None) == {"lm_eval": lm_eval_tasks.version()}
    mmlu = define(["mmlu"], None)
    assert len(mmlu.tasks) == 57
    assert mmlu.data_sets() == ["cais/mmlu"]
    assert [re.sub(r".*/tasks/", "", folder) for folder in mmlu.folders] == ["mmlu/default"]


def test_names_are_found_as_lm_eval_finds_them(my_tasks: Path) -> None:
    from lm_eval.tasks import TaskManager

    (my_tasks / "again").mkdir()
    (my_tasks / "again" / "words.yaml").write_text("task: words\ndoc_to_text: the second of this name\n")
    (my_tasks / "python.yaml").write_text('"task": own_code\n"class": !function scoring.first_letter\ntag:\n- coded\n')
    (my_tasks / "broken.yaml").write_text("task: [\n")
    (my_tasks / "neither.yaml").write_text("dataset_path: json\n")
    theirs = TaskManager(include_path=str(my_tasks), include_defaults=False).task_index
    found = scan(str(my_tasks))
    assert {name: (one.path, list(one.tagged)) for name, one in found.items()} == {
        name: (entry.yaml_path and str(entry.yaml_path), sorted(entry.tags) if entry.yaml_path is None else [])
        for name, entry in theirs.items()
    }


def test_keys_are_made_without_lm_eval_and_torch(my_tasks: Path) -> None:
    script = (
        "import sys\n"
        "from coldpress.tasks.catalogue import stage_named\n"
        "entry = stage_named('evaluate/lm-eval')\n"
        "entry.content(entry.parameters(tasks=['words', 'arc_easy'], include_path=sys.argv[1]))\n"
        "heavy = {'torch', 'transformers', 'lm_eval', 'datasets'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(my_tasks)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# What is refused


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("wrods", "lm-eval has no task 'wrods'; did you mean 'words'"),
        ("arc_eazy", "did you mean 'arc_easy'"),
        ("humaneval", "task 'humaneval' runs the code that the model writes"),
        ("scripted", "task 'scripted' runs code that comes with its data set 'some/thing'"),
        ("nothing_there", "task 'nothing_there': there is no data file 'data/gone.jsonl'; lm-eval takes such paths"),
        ("broken_group", "lm-eval has no task 'woords', which its group 'broken_group' names; did you mean 'words'"),
    ],
)
def test_impossible_tasks_are_refused(name: str, sentence: str, my_tasks: Path) -> None:
    (my_tasks / "scripted.yaml").write_text(
        "task: scripted\ndataset_path: some/thing\ndataset_kwargs: {trust_remote_code: true}\n"
    )
    (my_tasks / "gone.yaml").write_text(
        "task: nothing_there\ninclude: _choices\ndataset_kwargs: {data_files: data/gone.jsonl}\n"
    )
    (my_tasks / "group.yaml").write_text("group: broken_group\ntask: [woords]\n")
    with pytest.raises(SourceError, match=re.escape(sentence)):
        content([name], str(my_tasks))


@pytest.mark.parametrize("name", ["endings", "drawn", "in_group"])
def test_python_beside_task_files_needs_the_operators_consent(
    name: str, my_tasks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (my_tasks / "in_group.yaml").write_text("group: in_group\ntask: [{task: words, process_docs: !function x.y}]\n")
    assert content([name], str(my_tasks))
    monkeypatch.delenv("COLDPRESS_ALLOW_CODE")
    function = "x.y" if name == "in_group" else "scoring.first_letter"
    with pytest.raises(SourceError, match=rf"runs the Python function {function}, named in .* COLDPRESS_ALLOW_CODE=1"):
        content([name], str(my_tasks))
    monkeypatch.setenv("COLDPRESS_ALLOW_CODE", "yes")
    with pytest.raises(SourceError, match="COLDPRESS_ALLOW_CODE is 'yes'; write 1"):
        content([name], str(my_tasks))


def test_tasks_that_are_data_and_those_of_lm_eval_itself_need_no_consent(
    my_tasks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COLDPRESS_ALLOW_CODE")
    assert content(["all_words", "texts"], str(my_tasks))
    assert content(["hellaswag"], None)  # prepares its questions with a function
    (my_tasks / "hub.yaml").write_text("task: hub\ninclude: _choices\nmetric_list: [{metric: x, hf_evaluate: true}]\n")
    with pytest.raises(SourceError, match="runs the metric 'x' as code from the Hub"):
        content(["hub"], str(my_tasks))


def test_templates_and_metrics_of_task_files_run_no_python_without_consent(
    import_model: Callable[..., Artifact], evaluate: Callable[..., dict[str, Any]],
    my_tasks: Path, store: Store, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    model, entry = import_model("llama"), stage_named("evaluate/lm-eval")
    trusted = evaluate(model, tasks=["words"])
    monkeypatch.delenv("COLDPRESS_ALLOW_CODE")
    (my_tasks / "sly.yaml").write_text("task: sly\ninclude: _choices\ndoc_to_text: \"{{''['__cl' 'ass__'].mro()}}\"\n")
    (my_tasks / "odd.yaml").write_text("task: odd\ninclude: _choices\nmetric_list: [{metric: somebody/thing}]\n")
    for task, said in (
        ("sly", r"sly.yaml reaches for Python itself"),
        ("odd", "metric 'somebody/thing', which lm-eval"),
    ):
        with pytest.raises(StageError, match=said):
            compute(Run(store), entry, entry.parameters(tasks=[task], include_path=str(my_tasks)), {"model": model})
    asked = entry.parameters(tasks=["words"], include_path=str(my_tasks), num_fewshot=0)
    confined = compute(Run(store), entry, asked, {"model": model}).artifact
    found = json.loads(store.read_file(confined, "metrics.json"))
    assert {name: value for name, value in found.items() if name != "runtime"} == {
        name: value for name, value in trusted.items() if name != "runtime"
    }


def test_all_unknown_names_are_told_at_once(my_tasks: Path) -> None:
    with pytest.raises(SourceError, match=r"'wrods'; did you mean 'words'.* no task 'endigns'; did you mean 'endings'"):
        content(["endings", "endigns", "words", "wrods"][::-1], str(my_tasks))


def test_a_task_that_two_names_hold_is_refused(my_tasks: Path) -> None:
    with pytest.raises(SourceError, match="'all_words' and 'words' both have the task 'words'; ask for one"):
        content(["all_words", "words"], str(my_tasks))


def test_without_lm_eval_it_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib.metadata import PackageNotFoundError

    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(lm_eval_tasks.importlib.metadata, "version", missing)
    with pytest.raises(SourceError, match=r"pip install 'coldpress\[lm-eval\]'"):
        content(["arc_easy"], None)


def test_limit_and_share_exclude_each_other() -> None:
    with pytest.raises(ValidationError, match="'limit' takes the first questions and 'share' random ones"):
        stage_named("evaluate/lm-eval").parameters(tasks=["arc_easy"], limit=10, share=0.5)


def test_a_data_set_that_is_not_here_is_named(import_model: Callable[..., Artifact], store: Store) -> None:
    entry = stage_named("evaluate/lm-eval")
    model = import_model("llama")
    with pytest.raises(
        StageError,
        match=r"task 'arc_easy' can't be loaded with its data set 'allenai/ai2_arc': .*OFFLINE.*copy the cache",
    ):
        compute(Run(store), entry, entry.parameters(tasks=["arc_easy"]), {"model": model})


def test_a_missing_chat_template_is_said(
    import_model: Callable[..., Artifact], evaluate: Callable[..., dict[str, Any]]
) -> None:
    with pytest.raises(StageError, match="chat_template: the model's tokenizer has none"):
        evaluate(import_model("llama"), tasks=["words"], chat_template=True)


def test_recipes_say_what_is_wrong_once_and_take_folders_relative_to_theirs(
    import_model: Callable[..., Artifact], tiny_model_folder: Callable[..., str], store: Store, my_tasks: Path
) -> None:
    from coldpress.flows.plan import prepare
    from coldpress.flows.recipe import RecipeError, load_recipe

    def recipe(task: str) -> str:
        path = my_tasks.parent / "recipe.yaml"
        path.write_text(
            f"name: scored\nmodels: {{one: {{source: '{tiny_model_folder('llama')}'}}, "
            f"two: {{source: '{tiny_model_folder('llama')}'}}}}\n"
            f"evaluate:\n  lm-eval: {{tasks: [{task}], include_path: ./tasks}}\n"
        )
        return str(path)

    with pytest.raises(RecipeError) as refused:
        prepare(load_recipe(recipe("wrods")), store)
    (sentence,) = refused.value.sentences()
    assert "recipe.yaml:4: evaluation 'lm-eval': lm-eval has no task 'wrods'; did you mean 'words'" in sentence
    plan = prepare(load_recipe(recipe("words")), store)
    (node,) = (planned.node for name, planned in plan.items() if name == "one/lm-eval")
    assert getattr(node.parameters, "include_path") == str(my_tasks)  # noqa: B009 (of a stage's own parameters)
    with pytest.raises(ColdpressError, match=r"include_path .* is no folder"):
        content(["words"], str(my_tasks / "nowhere"))
