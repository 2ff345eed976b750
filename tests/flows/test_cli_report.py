"""`coldpress report` and `coldpress compare`: what they say of results that are there, without computing any."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from coldpress.flows.cli import main
from coldpress.storage.artifacts import Artifact
from coldpress.storage.store import Store
from coldpress.tasks.reporting.significance import paired_difference

Call = Callable[..., Result]


@pytest.fixture
def call(store: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Call:
    """`call("report", …)`: a command on the test's store."""
    monkeypatch.setenv("COLDPRESS_STORE", store.url)
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: CliRunner().invoke(main, list(arguments))


@pytest.fixture
def half_done(
    store: Store,
    change: Callable[[str, str], Path],
    import_model: Callable[..., Artifact],
    run_stage: Callable[..., Artifact],
    text_file: str,
) -> dict[str, Artifact]:
    """The tiny recipe with base and pruned made and measured on eight windows, and neither gptq nor nf4 yet."""
    change("split: test, samples: 3", "split: test, samples: 8")
    base = import_model("llama")
    tokens = {"source": text_file, "length": 32}
    calibration = run_stage("source/tokens", {"model": base}, **tokens, samples=3)
    held_out = run_stage("source/tokens", {"model": base}, **tokens, samples=8, split="test")
    pruned = run_stage("prune/wanda", {"model": base, "calibration": calibration}, sparsity=0.5)
    found = {"base": base, "pruned": pruned, "held_out": held_out}
    for name in ("base", "pruned"):
        found[f"{name}/size"] = run_stage("evaluate/size", {"model": found[name]})
        found[f"{name}/perplexity"] = run_stage("evaluate/perplexity", {"model": found[name], "data": held_out})
        store.set_ref(f"tiny/{name}", found[name])
    store.set_ref("tiny/held_out", held_out)
    return found


def losses(store: Store, metrics: Artifact) -> list[float]:
    values: list[float] = json.loads(store.read_file(metrics, "metrics.json"))["window_losses_nats"]
    return values


def test_a_report_tells_what_is_there_and_what_is_not_computed(
    call: Call, half_done: dict[str, Artifact], store: Store, tiny_recipe: Path, tmp_path: Path
) -> None:
    actions = len(list(store.actions()))
    said = call("report", str(tiny_recipe), "--output", "out", "--fit-size", "1GB", "--json")
    assert said.exit_code == 0, said.output
    document = json.loads(said.stdout)
    assert len(list(store.actions())) == actions
    states = {stage["name"]: stage["state"] for stage in document["stages"]}
    assert states["pruned"] == "cached"
    assert states["gptq"] == states["nf4/perplexity"] == "not computed"
    pruned = next(stage for stage in document["stages"] if stage["name"] == "pruned")
    assert pruned["inputs"] == {"model": "base", "calibration": "calibration"}
    assert (pruned["parameters"], pruned["format"], pruned["kind"]) == ({"sparsity": 0.5}, "dense", "checkpoint")
    assert pruned["provenance"]["attempts"] == 1
    assert document["recommendations"][0]["best"] in ("base", "pruned")
    shown = (tmp_path / "out" / "report.html").read_text()
    assert "<strong>gptq</strong>: not computed" in shown


def test_perplexities_are_compared_window_by_window(
    call: Call, half_done: dict[str, Artifact], store: Store, tiny_recipe: Path
) -> None:
    document = json.loads(call("report", str(tiny_recipe), "--json").stdout)
    expected = paired_difference(*(losses(store, half_done[f"{name}/perplexity"]) for name in ("pruned", "base")))
    entry = document["differences"]["pruned"]["perplexity"]
    assert entry["difference"] == pytest.approx(torch.tensor(expected.mean).double().exp().item())
    assert entry["within_noise"] == expected.within_noise
    assert (entry["reference"], entry["items"]) == ("base", 8)
    assert document["runtimes"]["base"]["perplexity"].startswith("coldpress block loop")


def test_two_recipes_are_one_page_with_equal_results_once(
    call: Call, half_done: dict[str, Artifact], tiny_recipe: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.yaml"
    other.write_text(tiny_recipe.read_text().replace("name: tiny", "name: other").replace("0.5}", "0.6}"))
    document = json.loads(call("report", str(tiny_recipe), str(other), "--output", "out", "--json").stdout)
    assert document["recipe"] == "tiny, other"
    assert document["variants"][:2] == ["base", "tiny: pruned"]
    assert document["variants"].count("base") == 1
    assert "other: pruned" in document["variants"]


def test_mistakes_are_sentences(call: Call, tiny_recipe: Path) -> None:
    budget = call("report", str(tiny_recipe), "--fit-vram", "much")
    assert budget.exit_code == 2
    assert "'much' is no amount of memory; write it like 8GB" in budget.stderr
    missing = call("report", "no-such-recipe")
    assert missing.exit_code == 2
    assert "no recipe file 'no-such-recipe'" in missing.stderr


def test_compare_says_how_weights_figures_and_origin_differ(
    call: Call,
    half_done: dict[str, Artifact],
    store: Store,
    read_tensors: Callable[[Artifact], dict[str, Any]],
) -> None:
    said = call("compare", "tiny/base", "tiny/pruned", "--json")
    assert said.exit_code == 0, said.output
    found = json.loads(said.stdout)
    base, pruned = (read_tensors(half_done[name]) for name in ("base", "pruned"))
    layers = {layer["name"]: layer for layer in found["weights"]["layers"]}
    assert set(layers) == set(base)
    for name, layer in layers.items():
        between = (pruned[name] - base[name]).double().norm() / base[name].double().norm()
        assert layer["difference"] == pytest.approx(float(between), rel=1e-6)
        assert layer["zeros_b"] == pytest.approx(float((pruned[name] == 0).double().mean()))
    differences = [layer["difference"] for layer in found["weights"]["layers"]]
    assert differences == sorted(differences, reverse=True)
    squares = sum(float((pruned[name] - base[name]).double().norm()) ** 2 for name in base)
    whole = sum(float(base[name].double().norm()) ** 2 for name in base)
    assert found["weights"]["difference"] == pytest.approx((squares / whole) ** 0.5)
    metrics = {entry["metric"]: entry for entry in found["metrics"]}
    assert metrics["perplexity"]["words"].startswith("×")
    assert metrics["sparsity"]["b"] == pytest.approx(0.5, abs=0.01)
    assert found["origin"][0].startswith("both come from source/model")
    assert found["origin"][1] == "B: prune/wanda (sparsity 0.5)"
    table = call("compare", "tiny/base", "tiny/pruned", "--top", "1").stdout
    assert "|B - A| / |A| is" in table
    assert table.count("model.layers.") == 1


def test_compare_names_parameters_and_data_that_differ(
    call: Call,
    half_done: dict[str, Artifact],
    run_stage: Callable[..., Artifact],
    text_file: str,
) -> None:
    base = half_done["base"]
    more = run_stage("source/tokens", {"model": base}, source=text_file, length=32, samples=4)
    other = run_stage("prune/wanda", {"model": base, "calibration": more}, sparsity=0.6)
    origin = json.loads(call("compare", "tiny/pruned", other.id[:16], "--json").stdout)["origin"]
    assert "parameters.sparsity 0.5 in A, 0.6 in B" in origin[1]
    assert "calibration: parameters.samples 3 in A, 4 in B" in origin[1]


def test_compare_tells_measurements_by_one_stage_apart(
    call: Call,
    half_done: dict[str, Artifact],
    run_stage: Callable[..., Artifact],
    text_file: str,
    tmp_path: Path,
) -> None:
    (tmp_path / "other.txt").write_text(Path(text_file).read_text()[::-1])
    base = half_done["base"]
    more = run_stage("source/tokens", {"model": base}, source=text_file, length=32, samples=4, split="test")
    other = run_stage("source/tokens", {"model": base}, source=str(tmp_path / "other.txt"), length=32, samples=4)
    for data in (more, other):
        for name in ("base", "pruned"):
            run_stage("evaluate/perplexity", {"model": half_done[name], "data": data})
    found = json.loads(call("compare", "tiny/base", "tiny/pruned", "--json").stdout)["metrics"]
    told = {entry["with"]: entry for entry in found if entry["metric"] == "perplexity"}
    assert len(told) == 3
    assert sum("data samples 4" in settings and "data split test" in settings for settings in told) == 1
    assert sum("data samples 8" in settings and "data text " in settings for settings in told) == 1
    assert [entry["with"] for entry in found if entry["metric"] == "sparsity"] == [""]
    table = " ".join(call("compare", "tiny/base", "tiny/pruned").stdout.split())
    assert table.count("perplexity (data samples 4, data split") == 2


def test_compare_refuses_what_has_no_weights_and_tells_other_structure(
    call: Call, half_done: dict[str, Artifact], store: Store, import_model: Callable[..., Artifact]
) -> None:
    refused = call("compare", "tiny/base", "tiny/held_out")
    assert refused.exit_code == 2
    assert "is tokens; compare takes checkpoints and adapters" in refused.stderr
    store.set_ref("tiny/deeper", import_model("llama", num_hidden_layers=4))
    told = call("compare", "tiny/base", "tiny/deeper", "--json")
    found = json.loads(told.stdout)
    assert found["weights"] is None
    assert any("blocks, B 4" in line for line in found["structure"])
    assert "they differ in structure: A has" in call("compare", "tiny/base", "tiny/deeper").stdout
    assert "the same artifact" in call("compare", "tiny/base", "tiny/base").stdout
