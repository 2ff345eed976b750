"""Evaluations whose processes are killed half-way: the next run asks the model only what is left, and ends alike."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from coldpress.storage.inspect import verify
from coldpress.storage.store import Store
from runs import BLOCKS, artifacts, committed, finish, kill_all, start, states, wait_for

COUNTED = Path(__file__).parent / "counted"
BATCH = 4
TASK = """\
dataset_path: json
dataset_kwargs: {data_files: {test: questions.jsonl}}
test_split: test
doc_to_text: "{{query}}"
"""
TASKS = {
    "_task": TASK,
    "choices.yaml": """\
include: _task
task: choices
output_type: multiple_choice
doc_to_choice: [" press the block", " a row", " zero"]
doc_to_target: gold
""",
    "endings.yaml": """\
include: _task
task: endings
output_type: generate_until
doc_to_target: "a row"
generation_kwargs: {until: ["."], max_gen_toks: 5, do_sample: false}
metric_list: [{metric: exact_match}]
""",
}
QUESTIONS = 60
REQUESTS = QUESTIONS * (3 + 1)
PROMPTS = [f"block {number} and row {number * 7}" for number in range(30)]
EVALUATIONS: dict[str, dict[str, Any]] = {
    "lm-eval": {"tasks": ["choices", "endings"], "include_path": "./tasks", "batch_size": BATCH},
    "generations": {"prompts": PROMPTS, "tokens": 6},
    "perplexity": {"data": "held_out"},
}


@pytest.fixture
def recipe_of(tiny_model_folder: Callable[..., str], text_file: str, tmp_path: Path) -> Callable[[str], Path]:
    """`recipe_of("lm-eval")`: a recipe that measures a tiny model so, with the task files beside it."""
    (tmp_path / "tasks").mkdir()
    for name, text in TASKS.items():
        (tmp_path / "tasks" / name).write_text(text)
    rows = ({"query": f"{'the mask ' * (number % 7)}of {number}:", "gold": number % 3} for number in range(QUESTIONS))
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def write(method: str) -> Path:
        recipe = {
            "name": "measured",
            "model": {"source": tiny_model_folder("llama", num_hidden_layers=BLOCKS)},
            "data": {"held_out": {"source": text_file, "samples": 16, "length": 128}} if method == "perplexity" else {},
            "evaluate": {method: EVALUATIONS[method]},
        }
        path = tmp_path / "measured.yaml"
        path.write_text(json.dumps(recipe))  # which is YAML, too
        return path

    return write


@pytest.mark.long
@pytest.mark.parametrize("method", EVALUATIONS)
def test_an_evaluation_killed_half_way_asks_only_what_is_left(
    method: str, recipe_of: Callable[[str], Path], tmp_path: Path, server: str
) -> None:
    recipe, store, node = recipe_of(method), str(tmp_path / "killed"), f"base/{method}"
    steps = {"lm-eval": REQUESTS // BATCH, "generations": len(PROMPTS), "perplexity": BLOCKS}[method]
    asked: list[int] = []

    def begin(folder: str) -> Any:
        asked.append(0)
        log = tmp_path / f"asked-{len(asked)}"
        log.touch()
        return start(recipe, folder, PREFECT_API_URL=server, PYTHONPATH=str(COUNTED), ASKED=str(log))

    def asked_in(run: int) -> int:
        return len((tmp_path / f"asked-{run}").read_text().splitlines())

    killed = begin(store)
    wait_for(killed, lambda: committed(store, node) >= steps // 3)
    assert killed.poll() is None, killed.communicate()
    kill_all(killed)
    assert verify(Store(store)) == []
    half = committed(store, node)

    stopped = begin(store)
    wait_for(stopped, lambda: committed(store, node) >= max(half + 1, steps // 2))
    stopped.send_signal(signal.SIGTERM)
    output, said = stopped.communicate(timeout=60)
    assert stopped.returncode == 128 + signal.SIGTERM, said
    assert states(json.loads(output))[node] == "pre-empted"

    after = finish(begin(store))
    assert states(after)[node] == "resumed"
    assert verify(Store(store)) == []
    undisturbed = finish(begin(str(tmp_path / "undisturbed")))
    assert set(states(undisturbed).values()) == {"computed"}
    assert artifacts(after) == artifacts(undisturbed)
    assert after["metrics"] == undisturbed["metrics"]

    (action,) = Store(store).actions(f"evaluate/{method}")
    note = action.provenance["resumed"]
    if method == "perplexity":
        assert note["from_block"] > half
        return
    parts, whole = [asked_in(run) for run in (1, 2, 3)], asked_in(4)
    at_once = BATCH if method == "lm-eval" else 1
    assert min(parts) > 0
    # What had been asked but not committed when the first run was killed is asked for again, and nothing else.
    assert whole <= sum(parts) <= whole + at_once
    assert note["of"] - note["from_answer"] == parts[2]
