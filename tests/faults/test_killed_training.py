"""Every training stage, killed with `kill -9` after it saved: the next run ends in the undisturbed artifact ids."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
from coldpress.storage.inspect import verify
from coldpress.storage.store import Store
from runs import artifacts, committed, finish, kill_all, start, states, wait_for

STEPS = 120
TRAINED = ("lora", "sparse", "full", "adalora", "sora", "losa", "structured", "loraprune", "kl", "reverse", "hidden")
RECIPE = """\
name: training
model: {{source: "{model}"}}
data:
  calibration: {{source: "{text}", samples: 6, length: 32}}
  text: {{source: "{text}", samples: 16, length: 32}}
stages:
  pruned: {{use: prune, method: wanda, model: base, calibration: calibration, sparsity: 0.5}}
  shallow: {{use: layers, method: arrange, model: base, order: "0 2"}}
  lora: {{use: adapt, method: lora, model: pruned, data: text, {training}, rank: 4}}
  sparse: {{use: adapt, method: sparse-lora, model: pruned, data: text, {training}, rank: 4}}
  full: {{use: adapt, method: full, model: pruned, data: text, {training}}}
  adalora: {{use: adapt, method: adalora, model: pruned, data: text, {training}, rank: 4, initial_rank: 6}}
  sora: {{use: adapt, method: sora, model: pruned, data: text, {training}, rank: 4}}
  losa: {{{losa}, {training}, rank: 4, rounds: 3, sparsity: 0.5}}
  structured: {{{losa}, {training}, rank: 4, rounds: 2, sparsity: 0.4, criterion: wanda-sp}}
  loraprune: {{use: adapt, method: loraprune, model: base, data: text, {training}, rank: 4, sparsity: 0.5}}
  kl: {{use: distill, method: kl, model: pruned, teacher: base, data: text, {training}, rank: 4}}
  reverse: {{use: distill, method: reverse-kl, model: pruned, teacher: base, data: text, {training}, rank: 4}}
  hidden: {{use: distill, method: hidden, model: shallow, teacher: base, data: text, {training}, rank: 4}}
"""
LOSA = "use: adapt, method: losa, model: base, calibration: calibration, data: text, max_rank: 8"


@pytest.mark.long
def test_training_that_is_killed_ends_in_the_undisturbed_artifacts(
    tiny_model_folder: Callable[..., str], text_file: str, tmp_path: Path, server: str
) -> None:
    recipe, store = tmp_path / "training.yaml", str(tmp_path / "killed")
    training = f"steps: {STEPS}, batch_size: 4, learning_rate: 1.0e-2"
    folder = tiny_model_folder("llama")
    recipe.write_text(RECIPE.format(model=folder, text=text_file, training=training, losa=LOSA))
    chance = random.Random(0)
    killed = set()
    for node in TRAINED:
        saved = chance.randrange(1, 4)
        process = start(recipe, store, PREFECT_API_URL=server)
        wait_for(process, lambda node=node, saved=saved: committed(store, node) >= saved)  # type: ignore[misc]
        assert process.poll() is None, process.communicate()
        kill_all(process)
        assert verify(Store(store)) == []
        killed.add(node)
    after = finish(start(recipe, store, PREFECT_API_URL=server))
    assert killed == set(TRAINED)
    assert verify(Store(store)) == []
    undisturbed = finish(start(recipe, str(tmp_path / "undisturbed"), PREFECT_API_URL=server))
    assert set(states(undisturbed).values()) == {"computed"}
    assert artifacts(after) == artifacts(undisturbed)
    resumed = [action.provenance["node"] for action in Store(store).actions() if "resumed" in action.provenance]
    assert set(resumed) >= set(TRAINED)
