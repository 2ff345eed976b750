"""Keys say what a result depends on, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from coldpress.flows.plan import check_disk, compare, disk_need, make_plan, nearest_action
from coldpress.flows.recipe import load_recipe
from coldpress.storage.artifacts import Artifact
from coldpress.storage.errors import ColdpressError
from coldpress.storage.store import Store
from coldpress.tasks.catalogue import stage_named
from coldpress.tasks.stage import preimage

INPUTS = {"model": Artifact("checkpoint", "a" * 64), "calibration": Artifact("tokens", "b" * 64)}


def key(**parameters: object) -> dict[str, object]:
    stage = stage_named("quantize/gptq")
    return preimage(stage, stage.parameters(**parameters), INPUTS)


def test_parameters_at_their_defaults_are_left_out_of_the_key() -> None:
    assert key() == key(bits=4, group_size=128)
    assert key()["parameters"] == {}


def test_the_preimage_of_a_default_run_never_changes_unnoticed() -> None:
    """Changing this invalidates everyone's results: it needs a new version of the method."""
    assert key(group_size=64) == {
        "stage": "quantize/gptq",
        "version": 1,
        "parameters": {"group_size": 64},
        "inputs": {"model": "a" * 64, "calibration": "b" * 64},
    }
    defaults = {name: info.default for name, info in stage_named("quantize/gptq").parameters.model_fields.items()}
    assert defaults == {
        "bits": 4, "group_size": 128, "symmetric": True, "act_order": False, "static_groups": False, "damping": 0.01,
        "dtype": "auto", "overrides": (), "budget": None, "choices": None,
    }  # fmt: skip


def test_where_a_model_lies_is_not_in_the_key_but_its_content_is(
    tiny_model_folder: Callable[..., str], copied: Callable[[str], Path]
) -> None:
    stage = stage_named("source/model")
    folder = tiny_model_folder("llama")
    elsewhere = copied(folder)
    assert preimage(stage, stage.parameters(source=folder), {}) == preimage(
        stage, stage.parameters(source=str(elsewhere)), {}
    )
    (elsewhere / "tokenizer_config.json").write_text("{}")
    assert preimage(stage, stage.parameters(source=folder), {}) != preimage(
        stage, stage.parameters(source=str(elsewhere)), {}
    )


def test_stages_are_undecided_until_their_inputs_exist(
    tiny_recipe: Path, store: Store, run_stage: Callable[..., Artifact], tiny_model_folder: Callable[..., str]
) -> None:
    recipe = load_recipe(str(tiny_recipe))
    before = {name: entry.state for name, entry in make_plan(recipe, store).items()}
    assert before["base"] == "will run"
    assert before["pruned"] == "undecided"
    run_stage("source/model", {}, source=tiny_model_folder("llama"))
    after = {name: entry.state for name, entry in make_plan(recipe, store).items()}
    assert after["base"] == "cached"
    assert after["calibration"] == "will run"
    assert after["pruned"] == "undecided"


def test_why_names_the_field_that_differs_from_the_nearest_run(
    store: Store, run_stage: Callable[..., Artifact], tiny_model_folder: Callable[..., str]
) -> None:
    base = run_stage("source/model", {}, source=tiny_model_folder("llama"))
    run_stage("prune/magnitude", {"model": base}, sparsity=0.3)
    run_stage("prune/magnitude", {"model": base}, sparsity=0.5, dtype="float32")
    stage = stage_named("prune/magnitude")
    image = preimage(stage, stage.parameters(sparsity=0.6, dtype="float32"), {"model": base})
    found = nearest_action(store, stage.name, image)
    assert found is not None
    assert [(d.field, d.now, d.then) for d in found[1]] == [("parameters.sparsity", 0.6, 0.5)]


def test_compare_sees_fields_that_one_side_lacks() -> None:
    assert [d.field for d in compare({"a": {"x": 1}}, {"a": {"y": 2}})] == ["a.x", "a.y"]


def test_an_adapter_counts_with_the_bytes_of_its_factors(
    change: Callable[[str, str], Path], store: Store, run_stage: Callable[..., Artifact]
) -> None:
    def need(rank: int) -> int:
        return disk_need(make_plan(load_recipe(str(path), [f"stages.back.rank={rank}"]), store), store)

    stage = "  back: {use: compensate, method: svd, model: nf4, original: base, rank: 1}\nevaluate:"
    path = change("evaluate:", stage)
    a_block = 2 * (64 + 64) + 2 * (32 + 64) + 3 * (128 + 64)
    assert need(5) - need(1) == 4 * 3 * a_block * 2  # "auto" counts as two bytes


def test_a_run_that_cannot_fit_on_the_disk_is_refused_before_it_starts(
    tiny_recipe: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = make_plan(load_recipe(str(tiny_recipe)), store)
    assert disk_need(plan, store) > 0
    check_disk(plan, store)
    monkeypatch.setattr(store.files, "free_bytes", lambda: 1000)
    with pytest.raises(ColdpressError, match=r"would write about .* GB to .* are free; free some space"):
        check_disk(plan, store)
