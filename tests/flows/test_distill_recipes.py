"""Recipes with teachers and instruction data: what is refused before anything runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from coldpress.flows.plan import prepare
from coldpress.flows.recipe import RecipeError, load_recipe
from coldpress.storage.store import Store

RECIPE = """\
name: taught
models: {{base: {{source: "{model}"}}, wide: {{source: "{wide}"}}, words: {{source: "{words}"}}}}
data:
  text: {{source: "{text}", samples: 3, length: 32}}
  asked: {{source: "{records}", prompt: q, response: a, length: 32}}
  held: {{source: "{records}", split: test, template: alpaca, length: 32}}
stages:
  short: {{use: layers, method: arrange, model: base, remove: [1]}}
  tuned: {{use: adapt, method: lora, model: base, data: asked, rank: 4}}
  taught: {{use: distill, method: hidden, model: short, teacher: tuned, data: asked, rank: 4}}
evaluate:
  variants: [taught]
  perplexity: {{data: text}}
"""


@pytest.fixture
def problems(tiny_model_folder: Callable[..., str], text_file: str, tmp_path: Path) -> Callable[[str, str], list[str]]:
    """`problems(old, new)`: what is wrong with the recipe when a piece of it is replaced."""
    records = tmp_path / "records.jsonl"
    records.write_text(json.dumps({"q": "Why?", "a": "So."}))
    recipe = RECIPE.format(
        model=tiny_model_folder("llama"),
        wide=tiny_model_folder("llama", hidden_size=32, head_dim=8),
        words=tiny_model_folder("llama", vocab_size=160),
        text=text_file,
        records=records,
    )

    def find(old: str, new: str) -> list[str]:
        assert old in recipe
        path = tmp_path / "taught.yaml"
        path.write_text(recipe.replace(old, new))
        try:
            prepare(load_recipe(str(path)), Store("memory://no-results-here"))
        except RecipeError as error:
            return error.sentences()
        return []

    return find


def test_an_adapter_and_records_teach(problems: Callable[[str, str], list[str]]) -> None:
    assert problems("name: taught", "name: taught") == []


@pytest.mark.parametrize(
    ("old", "new", "line", "says"),
    [
        ("teacher: tuned", "teacher: words", 10, "student's vocabulary has 128 tokens and the teacher's 160"),
        ("teacher: tuned", "teacher: wide", 10, "put out 64 features and the teacher's 32"),
        ("teacher: tuned, ", "", 10, "stage 'taught' needs 'teacher', the name of a checkpoint"),
        ("method: hidden, model: short", "method: hidden, model: tuned", 10, "can't take an adapter as 'model'"),
        ("data: asked, rank: 4}\nev", "data: asked, rank: 4, blocks: 0-2}\nev", 10,
         "names 3 of the teacher's blocks, but the student has 2"),
        ("short: {use: layers, method: arrange, model: base, remove: [1]}",
         "short: {use: prune, method: wanda, model: base, calibration: asked, sparsity: 0.5}", 8,
         "calibration 'asked@base' are records or lines, padded to one length, which only training and"),
        ("prompt: q, response: a", "prompt: q", 5, "records need both 'prompt' and 'response'"),
        ("samples: 3, length: 32}", "template: alpaca, length: 32}", 4, "is running text without prompts"),
    ],
)  # fmt: skip
def test_a_mistake_is_named_with_its_line_and_a_remedy(
    problems: Callable[[str, str], list[str]], old: str, new: str, line: int, says: str
) -> None:
    found = problems(old, new)
    assert any(f":{line}: " in sentence and says in sentence for sentence in found), found
