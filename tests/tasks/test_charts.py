"""The report's charts: which figures they show, and when there is something to show."""

from __future__ import annotations

from typing import Any
from xml.etree import ElementTree

from coldpress.tasks.reporting.charts import (
    bits_by_block,
    charts,
    curves,
    losses_by_step,
    perplexity_by_sparsity,
    shares_by_block,
    shortened,
    smoothed,
)


def document(**changes: Any) -> dict[str, Any]:
    weights = {"linear_weights": 1000, "sparsity": 0.0}
    stages: list[dict[str, Any]] = [{"name": "base", "stage": "source/model", "root": "base", "linear_weights": 1000}]
    metrics = {
        "base": {**weights, "perplexity": 10.0},
        "wanda[sparsity=0.7]": {**weights, "sparsity": 0.7, "perplexity": 500.0},
        "wanda[sparsity=0.5]": {**weights, "sparsity": 0.5, "perplexity": 20.0},
        "narrow": {**weights, "linear_weights": 800, "perplexity": 14.0},
        "failed": {},
    }
    stages += [{"name": name, "stage": "prune/x", "root": "base"} for name in metrics if name != "base"]
    return {"stages": stages, "variants": list(metrics), "metrics": metrics, **changes}


def test_a_matrix_is_one_curve_by_the_share_of_the_first_models_weights() -> None:
    assert curves(document()) == {"wanda": [(0.5, 20.0), (0.7, 500.0)], "narrow": [(0.19999999999999996, 14.0)]}


def test_curves_are_drawn_when_one_has_several_points() -> None:
    chart = perplexity_by_sparsity(document())
    assert chart is not None
    assert "wanda: 20.0 at 50 %, 500.0 at 70 %" in chart.words
    assert ElementTree.fromstring(chart.svg).tag.endswith("svg")
    assert chart == perplexity_by_sparsity(document())  # equal figures, equal bytes
    assert perplexity_by_sparsity(document(variants=["base", "narrow", "failed"])) is None


def test_curves_do_not_need_the_first_models_own_figures() -> None:
    unmeasured = document(variants=["narrow"])
    del unmeasured["metrics"]["base"]
    assert curves(unmeasured) == {"narrow": [(0.19999999999999996, 14.0)]}
    unmeasured["stages"][0]["linear_weights"] = None
    assert curves(unmeasured) == {}


def test_a_variant_whose_size_was_not_measured_is_on_no_curve() -> None:
    unmeasured = document()
    del unmeasured["metrics"]["narrow"]["sparsity"]
    assert curves(unmeasured) == {"wanda": [(0.5, 20.0), (0.7, 500.0)]}


def test_bars_are_drawn_for_stages_whose_blocks_differ() -> None:
    shares = {"even": [0.5, 0.5], "uneven": [0.4, 0.6]}
    stages = [{"name": name, "stage": "prune/x", "shares_by_block": values} for name, values in shares.items()]
    chart = shares_by_block(document(stages=stages))
    assert chart is not None
    assert chart.words == "uneven: 40.0 %, 60.0 %"
    assert shares_by_block(document(stages=stages[:1])) is None
    stages = [{"name": "mixed", "stage": "quantize/x", "bits_by_block": [3.25, 4.0]}]
    (only,) = charts(document(stages=stages, variants=[]))
    assert only == bits_by_block(document(stages=stages))
    assert only.words == "mixed: 3.25, 4.00"
    assert charts(document(stages=[], variants=[])) == []


def test_losses_are_drawn_for_stages_that_trained() -> None:
    losses = {"lora": [3.0, 2.5, 2.0], "pruned": None, "one step": [1.0]}
    stages = [{"name": name, "stage": "adapt/x", "losses": values} for name, values in losses.items()]
    chart = losses_by_step(document(stages=stages))
    assert chart is not None
    assert chart.words == "lora: 3.000 to 2.000 nats in 3 steps"
    assert ElementTree.fromstring(chart.svg).tag.endswith("svg")
    assert charts(document(stages=stages, variants=[])) == [chart]
    assert losses_by_step(document(stages=stages[1:])) is None


def test_what_is_left_out_of_a_crowded_chart_is_said() -> None:
    stages = [{"name": f"lora{number}", "stage": "adapt/x", "losses": [2.0, 1.0]} for number in range(14)]
    chart = losses_by_step(document(stages=stages))
    assert chart is not None
    assert chart.words.endswith("lora11: 2.000 to 1.000 nats in 2 steps. The first 12 of 14.")


def test_smoothing_takes_the_mean_with_neighbours_on_both_sides() -> None:
    assert smoothed([3.0, 1.0, 2.0]) == [3.0, 1.0, 2.0]  # too few to smooth
    spike = [0.0] * 100
    spike[50] = 5.0
    assert smoothed(spike) == [0.0] * 48 + [1.0] * 5 + [0.0] * 47
    assert smoothed(spike[50:])[:3] == [5 / 2, 5 / 3, 0.0]  # 50 steps: one neighbour on each side


def test_long_names_keep_their_beginning_and_their_end() -> None:
    assert shortened("gptq4", 5) == "gptq4"
    assert shortened("gptq4[bits=3]", 9) == "gptq…s=3]"
