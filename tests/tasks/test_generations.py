"""Continuations of prompts, and the whole stock model that they and lm-eval run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from coldpress.storage.artifacts import Artifact
from coldpress.storage.store import Store
from coldpress.tasks.blocks import StoredModel
from coldpress.tasks.catalogue import stage_named
from coldpress.tasks.evaluation.whole_model import tokenizer_of, whole_model
from coldpress.tasks.stage import Preempted, Run, StageError, compute
from transformers import AutoModelForCausalLM, AutoTokenizer

PROMPTS = ("the mask and", "press", "one row of the block:")


@pytest.fixture
def continued(run_stage: Callable[..., Artifact], store: Store) -> Callable[..., list[str]]:
    """`continued(model, …)`: the continuations of PROMPTS."""

    def run(model: Artifact, **parameters: Any) -> list[str]:
        artifact = run_stage("evaluate/generations", {"model": model}, **{"prompts": PROMPTS, **parameters})
        texts = json.loads(store.read_file(artifact, "generations.json"))
        assert [text["prompt"] for text in texts] == list(PROMPTS)
        return [text["continuation"] for text in texts]

    return run


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "opt", "gpt_neox"])
def test_the_whole_model_is_the_exported_folders(
    family: str, import_model: Callable[..., Artifact], export_folder: Callable[..., str], store: Store
) -> None:
    model = import_model(family)
    folder = export_folder(model)
    with StoredModel(Run(store), model) as stored:
        ours = whole_model(Run(store), stored, torch.bfloat16)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    window = torch.randint(3, 120, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(ours(window).logits, theirs(window).logits)
    assert ours.generation_config.to_dict() == theirs.generation_config.to_dict()


@pytest.mark.parametrize("method", ["nf4", "gptq"])
def test_packed_weights_are_the_dense_ones_that_they_stand_for(
    method: str,
    import_model: Callable[..., Artifact],
    make_tokens: Callable[..., Artifact],
    run_stage: Callable[..., Artifact],
    block_loop_logits: Callable[..., torch.Tensor],
    store: Store,
) -> None:
    base = import_model("llama")
    calibration = {"calibration": make_tokens(base)} if method == "gptq" else {}
    settings = {"group_size": 32} if calibration else {}
    packed = run_stage(f"quantize/{method}", {"model": base, **calibration}, **settings)
    adapter = run_stage("compensate/svd", {"model": packed, "original": base}, rank=4)
    window = torch.randint(3, 120, (1, 24), generator=torch.Generator().manual_seed(1))
    for artifact in (packed, adapter):
        with StoredModel(Run(store), artifact) as stored, torch.no_grad():
            logits = whole_model(Run(store), stored, torch.float32)(window).logits
        torch.testing.assert_close(logits, block_loop_logits(artifact, window), atol=1e-4, rtol=1e-4)
        assert tokenizer_of(Run(store), artifact)("press")["input_ids"]


def test_greedy_continuations_are_those_of_transformers(
    import_model: Callable[..., Artifact], export_folder: Callable[..., str], continued: Callable[..., list[str]]
) -> None:
    model = import_model("llama")
    folder = export_folder(model)
    theirs, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    expected = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        output = theirs.generate(ids, do_sample=False, max_new_tokens=12)
        expected.append(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))
    assert continued(model, tokens=12) == expected


def test_sampling_follows_its_seed(
    import_model: Callable[..., Artifact], continued: Callable[..., list[str]], store: Store
) -> None:
    model = import_model("llama")
    drawn = [continued(model, tokens=12, temperature=1.5, seed=seed) for seed in (1, 2)]
    assert drawn[0] != drawn[1]
    entry = stage_named("evaluate/generations")
    parameters = entry.parameters(prompts=PROMPTS, tokens=12, temperature=1.5, seed=1)
    torch.manual_seed(99)  # what was drawn before makes no difference
    again = compute(Run(store), entry, parameters, {"model": model}).artifact
    assert [text["continuation"] for text in json.loads(store.read_file(again, "generations.json"))] == drawn[0]


def test_a_stopped_stage_goes_on_with_the_next_prompt(
    import_model: Callable[..., Artifact], new_store: Callable[[], Store]
) -> None:
    entry = stage_named("evaluate/generations")
    parameters = entry.parameters(prompts=PROMPTS, tokens=6, temperature=1.0)
    undisturbed, store = new_store(), new_store()
    whole = compute(Run(undisturbed), entry, parameters, {"model": import_model("llama", on=undisturbed)})
    model = import_model("llama", on=store)
    with pytest.raises(Preempted):
        compute(Run(store, stop_asked=lambda: True), entry, parameters, {"model": model})
    said: list[tuple[str, int, int]] = []
    resumed = compute(Run(store, progress=lambda *report: said.append(report)), entry, parameters, {"model": model})
    assert resumed.artifact == whole.artifact
    assert [done for what, done, total in said if what == "generating"] == [1, 2, 3]
    assert resumed.provenance["resumed"]["from_answer"] == 1


def test_a_prompt_beyond_the_context_is_refused(
    import_model: Callable[..., Artifact], run_stage: Callable[..., Artifact]
) -> None:
    with pytest.raises(StageError, match="prompt 2 has 201 tokens, and 100 more exceed the model's context of 256"):
        run_stage("evaluate/generations", {"model": import_model("llama")}, prompts=["a", "a" * 200], tokens=100)


def test_a_runs_document_has_the_texts_of_each_variant(
    tiny_model_folder: Callable[..., str], run_stage: Callable[..., Artifact], store: Store, tmp_path: Path
) -> None:
    from coldpress.flows.recipe import load_recipe
    from coldpress.flows.run import run_recipe
    from coldpress.flows.terminal import Terminal
    from rich.console import Console

    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"name: texts\nmodel: {{source: '{tiny_model_folder('llama')}'}}\n"
        "evaluate:\n  generations: {prompts: [press], tokens: 3}\n"
        "  more: {method: generations, prompts: [block], tokens: 3}\n"
    )
    model = run_stage("source/model", {}, source=tiny_model_folder("llama"))
    run_stage("evaluate/size", {"model": model})
    for prompt in ("press", "block"):
        run_stage("evaluate/generations", {"model": model}, prompts=[prompt], tokens=3)
    result = run_recipe(load_recipe(str(path)), store, Terminal(Console(quiet=True)))  # all of it cached: no Prefect
    texts = result.to_json()["generations"]
    assert {name: [text["prompt"] for text in found] for name, found in texts.items()} == {
        "base": ["press"],
        "base/more": ["block"],
    }
    assert result.metrics["base"]["prompts"] == 1
