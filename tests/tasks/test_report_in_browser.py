"""The report's page in a real browser: a crowded run on wide and narrow screens, light and dark."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from coldpress.tasks.reporting.choice import SIZE_FIGURES, recommend
from coldpress.tasks.reporting.report import values, write_report
from reports import LONG, crowded_document

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
WIDTHS = (1280, 390)
SCHEMES = {"dark": 0, "light": 1}  # as Chromium's settings number them
AA = 4.5  # WCAG 2.2, success criterion 1.4.3: of text that is not large

WATCH = """<script>
window.said = [];
addEventListener("error", (event) => said.push(event.message));
for (const kind of ["error", "warn"]) console[kind] = (...words) => said.push(words.join(" "));
</script>"""
ASK = """<script>
const parsed = (color) => {
  const [r, g, b, a = 1] = color.match(/[\\d.]+/g).map(Number);
  return color.startsWith("color(") ? [r * 255, g * 255, b * 255, a] : [r, g, b, a];
};
const over = ([r, g, b, a], below) => [r, g, b].map((one, index) => one * a + below[index] * (1 - a));
const luminance = (color) => {
  const [r, g, b] = color.map((one) => (one /= 255) <= 0.04045 ? one / 12.92 : ((one + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const chain = (element) => element ? [...chain(element.parentElement), element] : [];
// Contrast of what an element paints in `color` over the backgrounds behind it, both faded by the opacity around them.
const contrast = (element, color) => {
  const style = (one) => one.ownerDocument.defaultView.getComputedStyle(one);
  let behind = [255, 255, 255], front = null;
  for (const one of chain(element)) {
    behind = over(parsed(style(one).backgroundColor), behind);
  }
  const opacity = chain(element).reduce((product, one) => product * Number(style(one).opacity), 1);
  const [r, g, b, a] = parsed(style(element)[color]);
  front = over([r, g, b, a * opacity], behind);
  const [light, dark] = [luminance(front), luminance(behind)].sort((x, y) => y - x);
  return (light + 0.05) / (dark + 0.05);
};
const texts = (page) => {
  const found = [];
  const walker = page.createTreeWalker(page.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || ["SCRIPT", "STYLE", "title"].includes(element.tagName)) continue;
    const color = element instanceof page.defaultView.SVGElement ? "fill" : "color";
    found.push([contrast(element, color), walker.currentNode.data.trim()]);
  }
  for (const glyph of page.querySelectorAll('figure g[id*="text_"] use'))
    found.push([contrast(glyph, "fill"), glyph.closest('g[id*="text_"]').id]);
  return found;
};
const ask = (frame) => {
  const page = frame.contentDocument;
  const all = (selector) => [...page.querySelectorAll(selector)];
  const header = all("#variants thead th").find((one) => one.textContent === "perplexity");
  const column = () => all("#variants tbody tr").map((row) => row.cells[header.cellIndex].textContent.trim());
  const sorted = () => { header.querySelector("button").click(); return [header.getAttribute("aria-sort"), column()]; };
  const [rising, falling] = [sorted(), sorted()];
  const input = page.querySelector("#budget input");
  input.value = "82";
  input.dispatchEvent(new Event("input"));
  const panels = all(".panel").filter((one) => one.offsetHeight > 0).length;
  const top = page.querySelector("figure").getBoundingClientRect().top;
  all("details").forEach((one) => (one.open = true));
  const measured = texts(page);
  return {
    rising, falling, panels, top, budget: page.querySelector("#budget output").textContent,
    page: page.scrollingElement.scrollWidth, inner: frame.contentWindow.innerWidth, errors: frame.contentWindow.said,
    dark: frame.contentWindow.matchMedia("(prefers-color-scheme: dark)").matches,
    texts: measured.length, faint: measured.filter(([ratio]) => ratio < LEAST),
    silent: all("figure, .graph").filter((one) => one.getAttribute("role") !== "img" || !one.ariaLabel.trim()).length,
    figures: all("figure").length, narrowest: Math.min(...all("th:first-child").map((one) => one.offsetWidth)),
    unscoped: all("th:not([scope])").length, tables: all("table").length,
    headless: all("table").filter((one) => !one.querySelector("thead th") || !one.querySelector("tbody th")).length,
    unlabelled: all("input").filter((one) => !one.labels.length).length,
    titles: all("#variants thead th").map((one) => one.textContent.trim()),
  };
};
addEventListener("load", () => {
  const found = {};
  for (const frame of document.querySelectorAll("iframe")) found[frame.width] = ask(frame);
  document.body.dataset.found = JSON.stringify(found);
});
</script>"""


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The HTML of the crowded run's page, with a recommendation."""
    document = crowded_document()
    document["recommendations"] = [recommend(document, values(document), 150_000_000, SIZE_FIGURES)]
    return Path(write_report(document, str(tmp_path_factory.mktemp("written")))).read_text()


@pytest.fixture(scope="module", params=SCHEMES)
def found(request: pytest.FixtureRequest, shown: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the browser says of the page, by width, in one colour scheme: {"1280": …, "390": …, "scheme": …}."""
    folder = tmp_path_factory.mktemp("browser")
    page = html.escape(shown.replace("<head>", f"<head>{WATCH}", 1))
    frames = "".join(
        f'<iframe width="{width}" height="900" style="border:0" srcdoc="{page}"></iframe>' for width in WIDTHS
    )
    ask = ASK.replace("LEAST", str(AA))
    (folder / "frames.html").write_text(f"<!doctype html><meta charset=utf-8><body>{frames}{ask}</body>")
    said = subprocess.run(
        [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}",
         f"--blink-settings=preferredColorScheme={SCHEMES[request.param]}",
         "--window-size=1400,2000", "--dump-dom", f"file://{folder / 'frames.html'}"],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    given = re.search(r'data-found="([^"]*)"', said.stdout)
    assert given is not None, said.stderr[-2000:]
    return {"scheme": request.param, **json.loads(html.unescape(given[1]))}


def test_the_page_fits_wide_and_narrow_screens_without_complaints(found: dict[str, Any]) -> None:
    for width in WIDTHS:
        at = found[str(width)]
        assert at["errors"] == []
        assert at["page"] <= at["inner"] == width
        assert at["panels"] == 1
        assert at["narrowest"] > 60
    assert found["1280"]["top"] < 1800  # the first chart begins on the second screen


def test_all_text_has_enough_contrast(found: dict[str, Any]) -> None:
    for width in WIDTHS:
        at = found[str(width)]
        assert at["dark"] == (found["scheme"] == "dark")
        assert at["texts"] > 500
        assert at["faint"] == []


def test_figures_tables_and_fields_say_what_they_are(found: dict[str, Any]) -> None:
    at = found["390"]
    assert at["figures"] >= 8
    assert at["tables"] > 12
    assert (at["silent"], at["unscoped"], at["headless"], at["unlabelled"]) == (0, 0, 0, 0)


def test_the_table_sorts_and_the_budget_chooses(found: dict[str, Any]) -> None:
    for width in WIDTHS:
        at = found[str(width)]
        assert at["rising"][0] == "ascending"
        assert at["rising"][1][:2] == ["9.03", "9.03 ≈"]
        assert at["rising"][1][-2:] == ["-", "-"]
        assert at["falling"][0] == "descending"
        assert at["falling"][1][0] == "3006.41"
        assert at["falling"][1][-2:] == ["-", "-"]  # what was not measured stays below
        assert at["budget"] == "nf4 (perplexity 9.68, 81.0 MB)"


def test_the_crowded_page_names_tasks_and_hardware_once(shown: str, found: dict[str, Any]) -> None:
    assert "gsm8k exact_match (strict-match)" in " ".join(found["1280"]["titles"])
    assert "nf4, int8 on Imaginary GPU, 24 GB; the others on Imaginary CPU, 8 cores." in html.unescape(shown)
    assert LONG in html.unescape(shown)
