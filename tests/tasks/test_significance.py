"""Paired comparisons: against every possible draw, on simulated data, and what the report's document says of them."""

from __future__ import annotations

from itertools import product

import numpy
import pytest
from coldpress.tasks.reporting import significance
from coldpress.tasks.reporting.significance import Items, compare_all, paired_difference, paired_differences, words
from scipy.stats import norm, t


def test_the_interval_is_that_of_all_possible_draws() -> None:
    ours, theirs = [3.0, 1.0, 4.0, 1.5, 5.0, 9.0], [2.0, 1.0, 3.5, 2.5, 3.0, 5.0]
    differences = numpy.subtract(ours, theirs)
    means = numpy.array([numpy.mean(drawn) for drawn in product(differences, repeat=6)])  # all 6^6 of them
    tail = norm.cdf(-numpy.sqrt(6 / 5) * t.ppf(0.975, 5))
    found = paired_difference(ours, theirs)
    assert found.mean == pytest.approx(differences.mean())
    assert found.low == pytest.approx(numpy.quantile(means, tail), abs=0.15)
    assert found.high == pytest.approx(numpy.quantile(means, 1 - tail), abs=0.15)


@pytest.mark.parametrize("items", [8, 24])
def test_intervals_of_simulated_data_cover_the_truth_as_often_as_they_say(items: int) -> None:
    draws = numpy.random.default_rng(1).normal(0.3, 1.0, size=(2000, items))
    found = paired_differences(draws)
    covered = sum(one.low <= 0.3 <= one.high for one in found) / len(found)
    assert 0.93 < covered < 0.97  # plain percentiles of 8 items cover in 0.88


def test_pairing_finds_what_unpaired_means_would_drown() -> None:
    draw = numpy.random.default_rng(2)
    hard = draw.normal(3.0, 1.0, size=100)  # windows differ far more than the variants do
    better = hard - 0.01 + draw.normal(0, 0.005, size=100)
    assert not paired_difference(better, hard).within_noise
    assert paired_difference(draw.permutation(better), hard).within_noise


def test_equal_items_are_within_noise_and_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = numpy.random.default_rng(3).normal(size=(2, 50))
    whole = paired_differences(draw)
    monkeypatch.setattr(significance, "_DRAWN_AT_ONCE", 1000)
    assert [one.low for one in paired_differences(draw)] == pytest.approx([one.low for one in whole])
    same = paired_difference(draw[0], draw[0])
    assert (same.mean, same.low, same.high, same.within_noise) == (0.0, 0.0, 0.0, True)


def test_five_items_are_too_few() -> None:
    with pytest.raises(ValueError, match="5 items are too few to compare; 6 or more are needed"):
        paired_difference([1.0] * 5, [0.0] * 5)
    few = [Items(row, "perplexity", "data", [1.0] * 5) for row in ("base", "pruned")]
    assert compare_all(few, {"pruned": ["base"]}) == {"differences": {}, "indistinguishable": {}}


def test_the_document_says_ratios_of_perplexities_and_points_of_answers() -> None:
    losses = [2.0, 2.5, 3.0, 2.2, 2.8, 2.4, 2.6, 2.1]
    right = [1.0] * 30 + [0.0] * 10
    items = [
        Items("base", "perplexity", "text", losses),
        Items("pruned", "perplexity", "text", [loss + 0.5 for loss in losses]),
        Items("same", "perplexity", "text", losses),
        Items("elsewhere", "perplexity", "other text", losses),
        Items("base", "arc.acc", "arc", right),
        Items("pruned", "arc.acc", "arc", [0.0] * 10 + right[10:]),
    ]
    found = compare_all(items, {row: ["base"] for row in ("base", "pruned", "same", "elsewhere")})
    assert set(found["differences"]) == {"pruned", "same"}  # not against itself, nor on other data
    perplexity = found["differences"]["pruned"]["perplexity"]
    assert perplexity["difference"] == pytest.approx(numpy.exp(0.5))
    assert (perplexity["unit"], perplexity["items"], perplexity["within_noise"]) == ("ratio", 8, False)
    answers = found["differences"]["pruned"]["arc.acc"]
    assert answers["difference"] == pytest.approx(-25.0)
    assert answers["low"] < -25 < answers["high"] < 0
    assert found["indistinguishable"] == {"perplexity": [["base", "same"]]}
    assert words(perplexity) == "× 1.649 (1.649 to 1.649)"
    assert words(answers).startswith("-25.0 points (-")


def test_a_row_is_compared_with_the_first_reference_that_saw_the_same_items() -> None:
    items = [Items(row, "perplexity", "text", [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]) for row in ("base/kv2", "nf4/kv2")]
    found = compare_all(items, {"nf4/kv2": ["base", "base/kv2"]})
    assert found["differences"]["nf4/kv2"]["perplexity"]["reference"] == "base/kv2"
