"""Recipes are checked as a whole: every error at once, each with its line and what to write instead."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from coldpress.flows import plan
from coldpress.flows.document import Problem
from coldpress.flows.plan import Planned, check_models, check_sources, prepare
from coldpress.flows.recipe import RecipeError, load_recipe
from coldpress.flows.run import row_of
from coldpress.storage.errors import ColdpressError
from coldpress.storage.store import Store
from coldpress.tasks.stage import ModelFacts

Change = Callable[[str, str], Path]
RECIPES = Path(__file__).resolve().parents[2] / "flows" / "recipes"


def problems(path: Path, *overrides: str) -> list[str]:
    """What is wrong with a recipe, from reading it alone or from its sources and shapes."""
    with pytest.raises(RecipeError) as caught:
        prepare(load_recipe(str(path), overrides), Store("memory://no-results-here"))
    return caught.value.sentences()


def test_the_nodes_come_in_an_order_in_which_inputs_are_first(tiny_recipe: Path) -> None:
    nodes = load_recipe(str(tiny_recipe)).nodes
    seen: set[str] = set()
    for node in nodes:
        assert set(node.inputs.values()) <= seen
        seen.add(node.name)
    assert {"base", "calibration", "held_out", "pruned", "gptq", "nf4", "gptq/perplexity", "base/size"} <= seen


@pytest.mark.parametrize(
    ("old", "new", "line", "says"),
    [
        ("method: wanda", "method: wandas", 7, "did you mean 'wanda'"),
        ("use: prune", "use: prun", 7, "did you mean 'prune'"),
        ("sparsity: 0.5", "sparsty: 0.5", 7, "did you mean 'sparsity'"),
        ("sparsity: 0.5", "sparsity: 1.5", 7, "less than 1"),
        ("sparsity: 0.5", "sparsity: much", 7, "valid number"),
        (", sparsity: 0.5", "", 7, "say how much to prune"),
        ("sparsity: 0.5", "pattern: 4:2", 7, "'2:4' keeps two in each four"),
        ("sparsity: 0.5", "pattern: 3:5", 7, "needs rows that 5 divides"),
        ("group_size: 32", "group_size: 48", 8, "32 or 64 would"),
        ("group_size: 32", "bits: 5", 8, "bits"),
        (
            "size: 32",
            "size: 32, overrides: [\n{bits: 8},\n{module: [q_proj], bits: 8}]",
            10,
            "has no parameter 'overrides[1].module' (",
        ),
        ("size: 32", "size: 32, overrides: [\n{bits: 8},\n{bits: 5}]", 10, "overrides[1].bits is 5, but input"),
        ("size: 32", "size: 32, overrides: [\n{bits: 8},\n{layers: [2]}]", 10, "overrides[1] says neither bits"),
        (
            "size: 32",
            "size: 32, overrides: [{modules: [q], bits: 8}]",
            8,
            "a block has no module 'q'; it has self_attn.q",
        ),
        (
            "size: 32",
            "size: 32, overrides: {bits: 8}",
            8,
            "overrides is {'bits': 8}, but input should be a valid tuple",
        ),
        ("size: 32", "size: 32, choices: [{group_size: 32}]", 8, "needs 'choices[0].bits'"),
        ("size: 32", "size: 32, budget: {bits_per_weight: 2}", 8, "less than the smallest choices take"),
        ("size: 32", "size: 32, budget: 3.5", 8, "budget is 3.5, but"),
        (
            "nf4, model: pruned}",
            "rtn, model: pruned, group_size: 32, budget: {megabytes: 0.07}}",
            9,
            "needs 'calibration'",
        ),
        ("model: pruned, calibration", "model: nf4, calibration", 8, "comes further down"),
        ("model: pruned, calibration", "model: gptq, calibration", 8, "takes itself"),
        ("model: pruned, calibration", "model: prned, calibration", 8, "did you mean 'pruned'"),
        ("model: pruned}", "model: gptq}", 9, "needs an unquantized model, but 'gptq' is packed"),
        ("calibration: calibration, sparsity", "sparsity", 7, "needs 'calibration'"),
        ("calibration: calibration, sparsity", "calibration: held, sparsity", 7, "did you mean 'held_out'"),
        ("calibration: calibration, sparsity", "calibration: base, sparsity", 7, "must be a data entry"),
        ("model: pruned}", "model: [pruned]}", 9, "must be a name"),
        ("calibration: calibration, sparsity", "calibration: {a: 1}, sparsity", 7, "must be a name"),
        ("{data: held_out}", "{data: [held_out]}", 12, "an entry under 'data'"),
        ("variants: [base", "variants: [[base]", 11, "neither a model nor a stage"),
        ("samples: 3, length: 32}\n  held", "samples: 0, length: 32}\n  held", 4, "samples"),
        ("samples: 3, length: 32}\n  held", "samples: 99999, length: 32}\n  held", 4, "too few for 99999 windows"),
        ("split: test, ", "", 5, "drawn from the same text"),
        ("split: test", "split: tset", 5, "none of train, test, all"),
        ("[base, pruned", "[bas, pruned", 11, "did you mean 'base'"),
        ("perplexity:", "perplexty:", 12, "did you mean 'perplexity'"),
        ("{data: held_out}", "{data: held}", 12, "did you mean 'held_out'"),
        ("name: tiny", "name: a/b", 1, "a name of letters"),
        ("stages:", "stage:", 6, "did you mean 'stages'"),
        ("  nf4:", "  gptq:", 9, "there twice; the first is in line 8"),
        (
            "wanda, model: base, calibration: calibration",
            "magnitude, allocation: owl, model: base",
            7,
            "needs 'calibration' for statistics/owl",
        ),
        (
            "wanda, model: base, calibration: calibration",
            "flap, model: base",
            7,
            "needs 'calibration' for statistics/fluctuation",
        ),
        ("method: wanda", "method: wanda-sp", 9, "block_size 64 does not divide the 32 inputs"),
        (
            "use: prune, method: wanda, model: base, calibration: calibration, sparsity: 0.5",
            "use: layers, method: arrange, model: base, remove: [1, 3]",
            7,
            "block 3 is out of range",
        ),
    ],
)
def test_a_mistake_is_named_with_its_line_and_a_remedy(
    change: Change, old: str, new: str, line: int, says: str
) -> None:
    found = problems(change(old, new))
    assert any(f":{line}: " in sentence and says in sentence for sentence in found), found


def test_all_mistakes_are_reported_at_once(change: Change) -> None:
    change("method: wanda", "method: wandas")
    change("group_size: 32", "group: 32")
    found = problems(change("{data: held_out}", "{data: held}"))
    assert len(found) == 3


def test_a_cycle_is_called_one(change: Change) -> None:
    change("model: base, calibration", "model: gptq, calibration")
    found = problems(change("model: pruned, calibration", "model: pruned, calibration"))
    assert any("pruned -> gptq -> pruned form a cycle" in sentence for sentence in found)


def test_a_missing_data_file_is_named(change: Change, text_file: str) -> None:
    found = problems(change(f'{{source: "{text_file}", samples', "{source: ./nowhere.txt, samples"))
    assert any("nowhere.txt' is neither a file nor a folder" in sentence and ":4: " in sentence for sentence in found)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda folder: (folder / "model.safetensors").write_bytes(b"\x10" + bytes(40)), "damaged"),
        (lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"), "pickle"),
        (lambda folder: (folder / "config.json").unlink(), "no config.json"),
        (
            lambda folder: (folder / "config.json").write_text('{"model_type": "mixtral", "num_local_experts": 8}'),
            "mixture",
        ),
        (lambda folder: (folder / "config.json").write_text('{"model_type": "bert"}'), "coldpress knows"),
    ],
)
def test_a_model_that_cannot_be_used_is_refused_before_anything_runs(
    change: Change,
    copied: Callable[[str], Path],
    tiny_model_folder: Callable[..., str],
    damage: Callable[[Path], object],
    says: str,
) -> None:
    folder = copied(tiny_model_folder("llama"))
    damage(folder)
    found = problems(change(tiny_model_folder("llama"), str(folder)))
    assert any(":2: " in sentence and says in sentence for sentence in found), found


def test_a_truncated_safetensors_is_refused(
    change: Change, copied: Callable[[str], Path], tiny_model_folder: Callable[..., str]
) -> None:
    folder = copied(tiny_model_folder("llama"))
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-1])
    assert any("is damaged" in sentence for sentence in problems(change(tiny_model_folder("llama"), str(folder))))


def test_set_changes_a_value_and_a_wrong_path_is_refused(tiny_recipe: Path) -> None:
    recipe = load_recipe(str(tiny_recipe), ["stages.pruned.sparsity=0.6"])
    assert recipe.node("pruned").parameters.model_dump()["sparsity"] == 0.6
    assert any("did you mean 'pruned'" in sentence for sentence in problems(tiny_recipe, "stages.prund.sparsity=0.6"))


def test_only_keeps_what_a_stage_needs_and_its_evaluations(tiny_recipe: Path) -> None:
    recipe = load_recipe(str(tiny_recipe)).only(["nf4"])
    assert {node.name for node in recipe.nodes} == {
        "base", "calibration", "pruned", "nf4", "held_out", "nf4/size", "nf4/perplexity",
    }  # fmt: skip
    assert recipe.variants == ("nf4",)
    with pytest.raises(ColdpressError, match="did you mean 'nf4'"):
        load_recipe(str(tiny_recipe)).only(["nf44"])


def test_a_matrix_of_lists_is_one_too(change: Change) -> None:
    recipe = load_recipe(str(change(
        "pruned: {use: prune, method: wanda, model: base, calibration: calibration, sparsity: 0.5}",
        "pruned: {use: layers, method: arrange, model: base, matrix: {order: [[0, 1], [2, 2], '1-2']}}",
    )))  # fmt: skip
    assert {"pruned[order=0+1]", "gptq[order=2+2]", "nf4[order=1-2]"} <= {node.name for node in recipe.nodes}


def test_a_matrix_fans_out_through_the_dag(change: Change) -> None:
    recipe = load_recipe(str(change("sparsity: 0.5", "matrix: {sparsity: [0.5, 0.6]}")))
    names = [node.name for node in recipe.nodes]
    assert {"pruned[sparsity=0.5]", "pruned[sparsity=0.6]", "gptq[sparsity=0.6]", "nf4[sparsity=0.5]/size"} <= set(
        names
    )
    assert recipe.node("gptq[sparsity=0.6]").inputs["model"] == "pruned[sparsity=0.6]"
    assert names.count("calibration") == 1


CACHED = """\
  perplexity: {data: held_out}
  kv2: {method: perplexity, data: held_out, variants: [base, nf4], kv_cache: {bits: 2, group_size: 16, residual: 32}}"""


@pytest.fixture
def cached(change: Change) -> Path:
    """The tiny recipe with a second evaluation of perplexity, in line 13, with a quantized cache."""
    return change("  perplexity: {data: held_out}", CACHED)


def test_an_evaluation_with_a_name_of_its_own_is_of_the_variants_that_it_names(cached: Path) -> None:
    recipe = load_recipe(str(cached))
    assert recipe.evaluations["base"] == ("base/size", "base/perplexity", "base/kv2")
    assert recipe.evaluations["nf4"] == ("nf4/size", "nf4/perplexity", "nf4/kv2")
    assert recipe.evaluations["gptq"] == ("gptq/size", "gptq/perplexity")
    node = recipe.node("nf4/kv2")
    assert node.stage.name == "evaluate/perplexity"
    assert node.inputs == {"model": "nf4", "data": "held_out"}
    assert node.parameters.for_key() == {"kv_cache": {"bits": 2, "group_size": 16, "residual": 32}}


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("method: perplexity", "method: perplexty", "evaluation 'kv2': unknown method 'perplexty'; did you mean"),
        (
            "method: perplexity, ",
            "",
            "unknown evaluation 'kv2'; there is divergence, latency, generations, lm-eval, perplexity, size",
        ),
        ("variants: [base, nf4]", "variants: [bas]", "evaluation 'kv2': its variants must be a list of the recipe's"),
        ("variants: [base, nf4]", "variants: base", "evaluation 'kv2': its variants must be a list of the recipe's"),
        ("data: held_out, variants", "data: held, variants", "evaluation 'kv2' needs 'data'"),
        ("bits: 2", "bits: 3", "kv_cache.bits is 3, but input should be 2, 4 or 8 (kv_cache: "),
        ("bits: 2, ", "", "evaluation 'kv2' needs 'kv_cache.bits' (kv_cache: "),
        ("group_size: 16", "groups: 16", "evaluation 'kv2' has no parameter 'kv_cache.groups' (kv_cache: "),
        ("residual: 32", "residual: 40", "kv_cache: residual 40 is no multiple of group_size 16"),
        ("group_size: 16", "group_size: 32", "group_size 32 does not divide the model's head_dim of 16; 8 or 16 would"),
    ],
)
def test_a_mistake_in_a_second_evaluation_is_named(change: Change, cached: Path, old: str, new: str, says: str) -> None:
    found = problems(change(old, new))
    assert any(":13: " in sentence and says in sentence for sentence in found), found


COMPENSATED = (
    "  back: {use: compensate, method: eora, model: gptq, original: base, calibration: calibration, rank: 8}\n"
    "evaluate:\n  variants: [base, pruned, gptq, nf4, back]"
)


@pytest.fixture
def compensated(change: Change) -> Path:
    """The tiny recipe with a compensation of its GPTQ model, in line 10, among the variants."""
    return change("evaluate:\n  variants: [base, pruned, gptq, nf4]", COMPENSATED)


def test_an_adapter_is_a_variant_that_is_evaluated_as_models_are(compensated: Path) -> None:
    recipe = load_recipe(str(compensated))
    assert "back" in recipe.variants
    assert recipe.evaluations["back"] == ("back/size", "back/perplexity")
    assert recipe.node("back").inputs == {"model": "gptq", "original": "base", "calibration": "calibration"}
    plan = prepare(recipe, Store("memory://no-results-here"))
    assert plan["back/perplexity"].state == "undecided"


@pytest.mark.parametrize(
    ("old", "new", "line", "says"),
    [
        ("rank: 8", "rank: 33", 10, "rank 33 is above a dimension of self_attn.k_proj.weight, 32 x 64; 32 is the most"),
        (", rank: 8", "", 10, "rank 128 is above a dimension of self_attn.q_proj.weight"),
        ("rank: 8", "rank: 0", 10, "greater than or equal to 1"),
        ("original: base, ", "", 10, "needs 'original', the name of a checkpoint"),
        ("original: base", "original: nf4", 10, "'original' is packed (bitsandbytes)"),
        (
            "rank: 8}", "rank: 8}\n  more: {use: prune, method: magnitude, model: back, sparsity: 0.5}", 11,
            "stage 'more': prune/magnitude can't take an adapter as 'model'; name the checkpoint",
        ),
        (
            "rank: 8}", "rank: 8}\n  more: {use: quantize, method: nf4, model: back}", 11,
            "stage 'more': quantize/nf4 can't take an adapter as 'model'",
        ),
        (
            "rank: 8}", "rank: 8}\n  more: {use: compensate, method: svd, model: nf4, original: back}", 11,
            "stage 'more': compensate/svd can't take an adapter as 'original'",
        ),
        (
            "original: base, calibration: calibration, rank: 8}",
            "original: narrow, calibration: calibration, rank: 8}\n", 11,
            "mlp.gate_proj.weight is 128 x 64 in the model and 64 x 64 in 'original'",
        ),
    ],
)  # fmt: skip
def test_a_mistake_with_adapters_is_named_with_its_line_and_a_remedy(
    compensated: Path, change: Change, old: str, new: str, line: int, says: str
) -> None:
    if "narrow" in new:
        change("  nf4:", "  narrow: {use: prune, method: magnitude-sp, model: base, sparsity: 0.5, parts: ffn}\n  nf4:")
    found = problems(change(old, new))
    assert any(f":{line}: " in sentence and says in sentence for sentence in found), found


def test_two_models_have_tokens_of_their_own(change: Change, tiny_model_folder: Callable[..., str]) -> None:
    folder = tiny_model_folder("llama")
    change(f'model: {{source: "{folder}"}}', f'models: {{base: {{source: "{folder}"}}, other: {{source: "{folder}"}}}}')
    recipe = load_recipe(
        str(
            change(
                "nf4: {use: quantize, method: nf4, model: pruned}", "nf4: {use: quantize, method: nf4, model: other}"
            )
        )
    )
    assert recipe.node("pruned").inputs["calibration"] == "calibration@base"
    assert recipe.node("nf4/perplexity").inputs["data"] == "held_out@other"


def test_relative_paths_are_relative_to_the_recipe(change: Change, text_file: str, tmp_path: Path) -> None:
    (tmp_path / "near.txt").write_text(Path(text_file).read_text())
    recipe = load_recipe(str(change(f'calibration: {{source: "{text_file}"', "calibration: {source: near.txt")))
    assert recipe.node("calibration").parameters.model_dump()["source"] == str(tmp_path / "near.txt")


def test_a_shipped_recipe_is_found_by_its_name_and_a_misspelt_one_is_suggested() -> None:
    assert load_recipe("smollm2-branching").name == "smollm2-branching"
    with pytest.raises(ColdpressError, match="did you mean 'smollm2-branching'"):
        load_recipe("smollm2-branchin")


@pytest.mark.parametrize("name", ["pruning-study", "structured-study"])
def test_shipped_studies_have_nothing_wrong(name: str) -> None:
    planned = prepare(load_recipe(name), Store("memory://no-results-here"))
    assert len(planned) > 40


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_recipes_have_the_name_of_their_file_and_measure_something(path: Path) -> None:
    recipe = load_recipe(path.stem)
    assert recipe.name == path.stem
    assert recipe.variants
    assert all(any(node.endswith("/perplexity") for node in recipe.evaluations[name]) for name in recipe.variants)


def test_the_llama_study_is_right_but_for_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its models stand for their Hub ids here: a 7B and a 13B by their shapes, with which all stages must agree."""
    sizes = {"llama2-7b": (4096, 11008, 32, 32), "llama2-13b": (5120, 13824, 40, 40)}

    def facts(planned: Planned, store: Store, problems: list[Problem]) -> ModelFacts:
        width, inner, blocks, heads = sizes[planned.node.name]
        shape = {"hidden_size": width, "intermediate_size": inner, "num_hidden_layers": blocks}
        return ModelFacts({"model_type": "llama", **shape, "num_attention_heads": heads, "num_key_value_heads": heads})

    recipe = load_recipe("midllama")
    assert {node.name for node in recipe.nodes if node.stage.name == "source/model"} == sizes.keys()
    monkeypatch.setattr(plan, "_source_facts", facts)
    planned = {node.name: Planned(node, "undecided") for node in recipe.nodes}
    assert check_models(planned, Store("memory://no-results-here")) == []
    offline = check_sources(recipe)
    assert len(offline) == 6
    assert all("the Hub can't be reached" in problem.message for problem in offline)


def test_divergence_compares_every_variant_with_the_one_model_it_came_from(change: Change) -> None:
    path = change("perplexity: {data: held_out}", "perplexity: {data: held_out}\n  divergence: {data: held_out}")
    recipe = load_recipe(str(path))
    compared = [node for node in recipe.nodes if node.stage.name == "evaluate/divergence"]
    assert [node.name for node in compared] == [f"{variant}/divergence" for variant in recipe.variants]
    assert {node.inputs["reference"] for node in compared} == {"base"}
    (expected,) = {node.inputs["expected"] for node in compared}
    made = recipe.node(expected)
    assert (made.stage.name, dict(made.inputs)) == ("statistics/outputs", {"model": "base", "data": "held_out"})
    prepare(recipe, Store("memory://divergence"))


def test_lines_calibrate_nothing(change: Change) -> None:
    path = change("calibration: {source", "calibration: {unit: lines, source")
    assert "padded to one length" in " ".join(problems(path))


def test_evaluations_of_other_tasks_stand_with_the_variant_and_those_of_the_same_apart(change: Change) -> None:
    kv, mmlu = "kv: {method: perplexity, data: held_out}", "mmlu: {method: lm-eval, tasks: [mmlu], share: 0.5}"
    again = "again: {method: lm-eval, tasks: [arc_easy, piqa], num_fewshot: 5}"
    path = change("perplexity: {data: held_out}", f"lm-eval: {{tasks: [piqa]}}\n  {kv}\n  {mmlu}\n  {again}")
    recipe = load_recipe(str(path))
    rows = {name: row_of(recipe, "base", f"base/{name}") for name in ("lm-eval", "kv", "mmlu", "again", "size")}
    assert rows == {"lm-eval": "base", "kv": "base/kv", "mmlu": "base", "again": "base/again", "size": "base"}


@pytest.mark.parametrize(
    ("old", "new", "where"),
    [
        ("name: tiny\n", "name: tiny\ntrust_remote_code: true\n", "tiny.yaml:2"),
        ('model: {source: "', 'model: {trust_remote_code: true, source: "', "model 'base'"),
        ("held_out: {source", "held_out: {trust_remote_code: true, source", "data 'held_out'"),
        ("perplexity: {data", "lm-eval: {tasks: [piqa], trust_remote_code: true}\n  perplexity: {data", "'lm-eval'"),
    ],
)
def test_a_recipe_cannot_allow_the_code_of_a_model_or_data_set(change: Change, old: str, new: str, where: str) -> None:
    (said,) = problems(change(old, new))
    assert where in said
    assert "Python that comes with a model or data set is never run" in said
