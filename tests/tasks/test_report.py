"""The report: what its table, page and recommendation say of a run."""

from __future__ import annotations

import json
import re
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from coldpress.storage.errors import ColdpressError
from coldpress.tasks.reporting.choice import (
    COSTS,
    MEMORY_FIGURES,
    PERPLEXITY,
    SIZE,
    SIZE_FIGURES,
    front,
    most_measured,
    parse_bytes,
    quality,
    recommend,
    summary,
)
from coldpress.tasks.reporting.combine import combine
from coldpress.tasks.reporting.dag import draw_graph
from coldpress.tasks.reporting.explain import dashes, loading, mixed_hardware, mixed_protocols, what_failed
from coldpress.tasks.reporting.page import by_prompt, markdown
from coldpress.tasks.reporting.report import columns, rows, task_columns, values, write_report, write_value
from coldpress.tasks.reporting.tradeoffs import compression_ratios, fronts, memory_by_time, place_labels
from reports import CPU, full_document, stage


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    """Thirteen variants with everything; tests that change it take a copy."""
    return full_document()


@pytest.fixture(scope="module")
def written(document: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of its report, whose page takes a second to draw."""
    return Path(write_report(document, str(tmp_path_factory.mktemp("written") / "report"))).parent


def row_of(document: dict[str, Any], variant: str) -> dict[str, str]:
    titles = [column.title for column in columns(document)]
    return next(dict(zip(titles, row, strict=True)) for row in rows(document) if row[0] == variant)


def test_the_table_has_what_was_measured_with_its_spread_and_marks_noise(document: dict[str, Any]) -> None:
    titles = [column.title for column in columns(document)]
    after = titles.index("perplexity")
    assert titles[after + 1 : after + 3] == ["arc_easy acc", "hellaswag acc_norm"]
    assert "device memory" not in titles  # of nothing measured
    assert row_of(document, "int8")["perplexity"] == "9.03 ≈"
    assert row_of(document, "nf4")["perplexity"] == "9.68"
    assert row_of(document, "base")["arc_easy acc"] == "62.0 % ± 1.0"
    assert row_of(document, "base")["per token"] == "31.0 ms (IQR 0.8)"
    assert row_of(document, "awq4")["per token"] == "-"


def test_an_evaluation_of_its_own_name_without_figures_has_no_row(document: dict[str, Any]) -> None:
    more = {"nf4/texts": {"prompts": 3, "generated_tokens": 96}, "nf4/more": {"boolq.acc": 0.7}}
    stages = [stage(name, "evaluate/x", {"model": "nf4"}) for name in more]
    both = {"metrics": {**document["metrics"], **more}, "stages": [*document["stages"], *stages]}
    named = [row["variant"] for row in values({**document, **both})]
    assert "nf4/more" in named
    assert "nf4/texts" not in named


def test_figures_are_written_as_the_table_writes_them() -> None:
    assert write_value("size_bytes", 118_100_000) == "118.1 MB"
    assert write_value("arc_easy.acc", 0.5) == "50.0 %"
    assert write_value("zeros", 0.500045) == "0.500045"


def test_what_is_missing_is_explained(document: dict[str, Any]) -> None:
    said = dict(what_failed(document))
    assert said["broken"].startswith("failed: the Hessian of model.layers.3")
    assert said["never"].startswith("skipped, because broken failed: the Hessian")
    assert said["awq4"] == "latency failed: the exported model did not run: no kernel for this device"
    assert set(said) == {"broken", "never", "awq4"}
    assert dashes(document, values(document), columns(document)) == [("hellaswag acc_norm", ["owl[sparsity=0.7]"])]


def test_the_front_is_what_nothing_else_beats_in_both() -> None:
    points = {"a": (1.0, 9.0), "b": (2.0, 5.0), "c": (3.0, 6.0), "d": (3.0, 5.0), "e": (4.0, 4.0), "f": (0.5, None)}
    table = [{"variant": name, "size_bytes": size, "perplexity": bad} for name, (size, bad) in points.items()]
    beaten = {
        x
        for x, (size, bad) in points.items()
        for s, b in points.values()
        if bad is None or (b is not None and s <= size and b <= bad and (s, b) != (size, bad))
    }
    assert {row["variant"] for row in front(table, SIZE, PERPLEXITY)} == points.keys() - beaten


def test_without_perplexity_variants_are_ranked_by_a_task() -> None:
    table = [{"variant": "a", "arc.acc": 0.5, "boolq.acc": 0.9}, {"variant": "b", "arc.acc": 0.6}]
    by = quality(table)
    assert by is not None
    assert (by.key, by.best, by.write(0.5)) == ("arc.acc", "high", "50.0 %")
    assert quality([{"variant": "a"}]) is None


def test_quality_is_weighed_against_what_most_variants_have(document: dict[str, Any]) -> None:
    other = deepcopy(document)
    for name in ("nf4", "int8"):  # on a GPU
        other["metrics"][name]["device_memory_bytes"] = 200_000_000
    assert most_measured(values(other), COSTS) == SIZE
    assert "least size on disk" in summary(other, values(other))
    assert fronts(other, values(other))[0].title == "Perplexity against size on disk"
    assert most_measured([{}], COSTS) is None


def test_scores_read_in_several_ways_are_percentages_with_titles_that_say_so() -> None:
    key = "gsm8k.exact_match,strict-match"
    (column,) = task_columns([{key: 0.0805, f"{key}_stderr": 0.0075, "gsm8k.n": 1319}])
    assert column.title == "gsm8k exact_match (strict-match)"
    assert column.write(0.0805) == "8.1 %"
    by = quality([{key: 0.0805}])
    assert by is not None
    assert by.write(0.0805) == "8.1 %"


def test_a_collapsed_variant_does_not_flatten_the_chart(document: dict[str, Any]) -> None:
    other = deepcopy(document)
    other["metrics"]["gptq4"]["perplexity"] = 3006.41
    size = fronts(other, values(other))[0]
    assert "gptq4 3006.41 at" in size.words
    assert "<!-- gptq4 ↑ 3006.41 -->" in size.svg
    assert "1000" not in re.findall("<!-- ([^ ]*) -->", size.svg)  # no such tick


def test_the_best_variant_that_fits_is_recommended_by_a_figure_that_is_named(document: dict[str, Any]) -> None:
    table = values(document)
    found = recommend(document, table, 700_000_000, MEMORY_FIGURES)
    assert found["best"] == "int8"
    assert found["figure"] == "process_memory_bytes"
    assert found["words"].startswith(
        "For 700.0 MB take int8: perplexity 9.03 in 663.1 MB, by measured resident memory of the process; device "
        "memory was not measured."
    )
    assert found["too_large"]["base"] == 790_000_000
    assert found["not_measured"] == ["awq4", "broken", "never"]
    by_size = recommend(document, table, 100_000_000, SIZE_FIGURES)
    assert (by_size["best"], by_size["fits"]) == ("awq4", ["awq4", "nf4", "gptq4"])
    none = recommend(document, table, 1000, SIZE_FIGURES)
    assert none["best"] is None
    assert none["words"] == (
        "Nothing fits into 1.0 kB, by size on disk. The smallest is nf4 with 81.0 MB. Not judged, for want of one of "
        "these figures: broken, never."
    )


def test_measured_device_memory_comes_before_memory_of_the_process_and_size(document: dict[str, Any]) -> None:
    table = values(document)
    table[0] = {**table[0], "device_memory_bytes": 5_000_000}
    found = recommend(document, table, 8_000_000_000, MEMORY_FIGURES)
    assert (found["figure"], found["best"]) == ("device_memory_bytes", "base")
    bare = [{key: value for key, value in row.items() if "memory" not in key} for row in values(document)]
    assert (
        "memory was not measured, and running needs more" in recommend(document, bare, 10**9, MEMORY_FIGURES)["words"]
    )


def test_a_smaller_variant_within_noise_of_the_best_is_named(document: dict[str, Any]) -> None:
    assert (
        "Within noise of it, and smaller: int8" in recommend(document, values(document), 10**9, SIZE_FIGURES)["words"]
    )


@pytest.mark.parametrize(("text", "size"), [("8GB", 8 * 10**9), ("7.5 GiB", 8053063680), ("500mb", 500 * 10**6)])
def test_budgets_are_read_with_their_units(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["8 gigs", "GB", "", "-1GB", "0GB"])
def test_other_budgets_are_refused(text: str) -> None:
    with pytest.raises(ColdpressError, match="write it like 8GB, 500MB or"):
        parse_bytes(text)


def test_the_summary_names_the_best_and_the_smallest(document: dict[str, Any]) -> None:
    assert summary(document, values(document)) == (
        "Of 12 variants int8 has the best perplexity, 9.03 (base: 9.03, a difference within noise); nf4 has the least "
        "size on disk, 81.0 MB, at 9.68."
    )
    nothing = {**document, "metrics": {}}
    assert summary(nothing, values(nothing)) == "13 variants; the quality of none of them is known yet."


def test_charts_say_what_they_leave_out_and_when_hardware_differs(document: dict[str, Any]) -> None:
    assert mixed_hardware(document) == {}
    other = deepcopy(document)
    other["metrics"]["nf4"]["hardware"] = "Another CPU"
    size, memory, _ = fronts(other, [row for row in values(other) if row["variant"] in other["variants"]])
    assert memory.title == "Perplexity against memory of the process"
    assert memory.words.endswith(" On the front: gptq4, int8, base, nf4.")  # nf4 has a front of its own
    assert memory.note.endswith(" Not in this chart, for want of a figure: awq4, broken, never.")
    against_time = memory_by_time(other, values(other))
    assert against_time is not None
    for chart in (memory, against_time):
        assert "compare only within it" in chart.note
        assert f"nf4 on Another CPU; the others on {CPU}." in chart.note
    assert "different" not in size.note
    assert "Warning: Speed and memory were measured on different hardware" in markdown(other)


def test_ratios_are_drawn_on_disk_and_in_memory(document: dict[str, Any]) -> None:
    bars = compression_ratios(document)
    assert bars is not None
    assert "gptq4 3.23 on disk, 2.01 in memory" in bars.words


def test_labels_cover_neither_points_nor_each_other() -> None:
    points = {f"variant {number}": (100.0 + 14 * (number % 3), 80.0 + 12 * (number // 3)) for number in range(6)}
    offsets = place_labels(points, (0.0, 0.0, 400.0, 300.0))
    boxes = [(x + dx, y + dy, x + dx + 45, y + dy + 10) for (x, y), (dx, dy) in zip(points.values(), [offsets[n] for n in points], strict=True)]  # fmt: skip  # noqa: E501
    for number, one in enumerate(boxes):
        for other in boxes[number + 1 :]:
            assert one[2] <= other[0] or other[2] <= one[0] or one[3] <= other[1] or other[3] <= one[1]


def test_the_graph_has_a_box_for_each_stage_and_every_arrow_goes_right() -> None:
    stages = [{"name": "n0", "stage": "source/model", "state": "computed", "seconds": 1.0, "inputs": {}}]
    stages += [
        {"name": f"n{i}", "stage": "prune/x", "state": "failed" if i == 7 else "computed", "seconds": 1.0,
         "inputs": {"model": f"n{(i - 1) // 2}"}}
        for i in range(1, 40)
    ]  # fmt: skip
    stages.append({"name": "n39/size", "stage": "evaluate/size", "state": "failed", "inputs": {"model": "n39"}})
    graph = draw_graph({"stages": stages})
    boxes = {box.name: box for box in graph.boxes}
    assert set(boxes) == {f"n{i}" for i in range(40)}
    assert {name for name, box in boxes.items() if box.broken} == {"n7", "n39"}
    assert boxes["n39"].lines[-1] == "+ size failed"
    assert len(graph.arrows) == 39
    for i in range(1, 40):
        assert boxes[f"n{(i - 1) // 2}"].x + boxes[f"n{(i - 1) // 2}"].width < boxes[f"n{i}"].x
    for one in graph.boxes:
        assert one.x + one.width <= graph.width
        assert one.y + one.height <= graph.height
        for other in graph.boxes:
            apart = one.x != other.x or one.y + one.height <= other.y or other.y + other.height <= one.y
            assert one is other or apart


def test_each_format_is_loaded_by_the_library_that_reads_it(document: dict[str, Any]) -> None:
    def of(variant: str) -> Any:
        return loading(document, variant)

    assert of("gptq4").commands == "coldpress export everything/gptq4 gptq4 --store /a/store"
    assert 'GPTQModel.load("gptq4")' in of("gptq4").python
    assert 'AutoModelForCausalLM.from_pretrained("nf4", dtype="auto")' in of("nf4").python
    assert of("owl[sparsity=0.6]").commands == (
        "coldpress export 'everything/owl[sparsity=0.6]' owl-sparsity-0.6 --store /a/store"
    )
    tuned = of("shallow-tuned")
    assert tuned.commands.splitlines()[0] == "coldpress export everything/shallow shallow --store /a/store"
    assert 'PeftModel.from_pretrained(model, "shallow-tuned")' in tuned.python
    assert of("broken") is None
    for name in document["variants"]:
        if of(name):
            compile(of(name).python, name, "exec")


def test_the_page_shows_texts_as_text_and_each_chart_has_ids_of_its_own(
    document: dict[str, Any], written: Path
) -> None:
    shown = (written / "report.html").read_text()
    assert "&lt;b&gt;bridges&lt;/b&gt; &amp; rivers" in shown
    assert "<b>bridges" not in shown
    assert by_prompt(document)[0][0] == "The capital of France is"
    assert len(by_prompt(document)[0][1]) == 11
    assert not re.search(r'(src|href)="(?!#|data:)', shown)  # nothing from elsewhere
    clips = re.findall(r'<clipPath id="([^"]+)"', shown)
    assert len(clips) == len(set(clips))
    assert shown.count('<th scope="row"') >= len(document["variants"])


def test_markdown_has_the_table_the_marks_and_what_failed(document: dict[str, Any]) -> None:
    text = markdown({**document, "recommendations": [recommend(document, values(document), 10**9, SIZE_FIGURES)]})
    assert "| int8 | 100.0 M |" in text
    assert "9.03 ≈" in text
    assert "no more than noise" in text
    assert "**For 1.00 GB take base" in text
    assert "- broken: failed: the Hessian" in text


def renamed(document: dict[str, Any], recipe: str) -> dict[str, Any]:
    return {**deepcopy(document), "recipe": recipe, "store": f"/stores/{recipe}"}


def test_several_runs_become_one_table_with_equal_artifacts_once(document: dict[str, Any]) -> None:
    assert combine([document]) == document
    other = renamed(document, "other")
    kept = {"base", "pruned", "gptq4", "calibration", "held_out"}
    other["stages"] = [one for one in other["stages"] if one["name"].split("/")[0] in kept]
    other["variants"] = ["base", "gptq4"]
    other["metrics"] = {"base": {"boolq.acc": 0.7}, "gptq4": {"perplexity": 99.0}}
    other["generations"], other["runtimes"] = {}, {}
    other["differences"] = {"gptq4": {"perplexity": {"reference": "base", "within_noise": True}}}
    for one in other["stages"]:
        if one["name"] == "gptq4":
            one["artifact"] = "another"
    found = combine([document, other])
    assert found["recipe"] == "everything, other"
    assert [name for name in found["variants"] if "gptq4" in name] == ["everything: gptq4", "other: gptq4"]
    assert found["variants"].count("base") == 1
    assert found["metrics"]["base"]["boolq.acc"] == 0.7
    assert found["metrics"]["base"]["perplexity"] == document["metrics"]["base"]["perplexity"]
    assert found["differences"]["other: gptq4"]["perplexity"]["reference"] == "base"
    load = loading(found, "other: gptq4")
    assert load is not None
    assert load.commands == "coldpress export other/gptq4 other-gptq4 --store /stores/other"
    assert draw_graph(found).boxes
    assert "other: gptq4" in markdown(found)


def test_figures_that_contradict_each_other_stay_apart_and_are_warned_of(document: dict[str, Any]) -> None:
    other = renamed(document, "longer")
    other["metrics"]["base"]["perplexity"] = 7.0  # of the same artifact, on other windows
    for one in other["stages"]:
        if one["name"] == "held_out":
            one["artifact"] = "longer windows"
    found = combine([document, other])
    assert found["metrics"]["everything: base"]["perplexity"] != found["metrics"]["longer: base"]["perplexity"] == 7.0
    (warning,) = mixed_protocols(found)
    assert warning.startswith("perplexity was measured in 2 ways")
    assert mixed_protocols(document) == []


def test_all_files_are_written(document: dict[str, Any], written: Path) -> None:
    assert (written / "report.html").read_text().startswith("<!doctype html>")
    assert json.loads((written / "report.json").read_text())["variants"] == document["variants"]
    assert (written / "report.csv").read_text().splitlines()[0].startswith("variant,")
    assert {one.name for one in written.iterdir()} == {f"report.{kind}" for kind in ("html", "md", "csv", "json")}
