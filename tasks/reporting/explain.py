"""What a reader of the report asks: why there is no figure, how a variant came about, how to load it."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .report import Column

DONE = ("cached", "computed", "resumed")
_ONE_LOADS = {"dense": "transformers", "bitsandbytes": "transformers", "gptq": "gptqmodel", "awq": "gptqmodel"}


@dataclass(frozen=True)
class Loading:
    """How to load a variant elsewhere: shell commands that export it, and lines of Python."""

    commands: str
    python: str


def ancestors(document: Mapping[str, Any], name: str) -> list[Mapping[str, Any]]:
    """The stages that a stage was made from, inputs first, and at the end it itself."""
    stages = {stage["name"]: stage for stage in document["stages"]}
    found: dict[str, Mapping[str, Any]] = {}

    def visit(one: str) -> None:
        if one in stages and one not in found:
            for before in (stages[one].get("inputs") or {}).values():
                visit(before)
            found[one] = stages[one]

    visit(name)
    return list(found.values())


def evaluations(document: Mapping[str, Any], variant: str) -> list[Mapping[str, Any]]:
    """The stages that measure a variant."""
    return [
        stage
        for stage in document["stages"]
        if stage["stage"].startswith("evaluate/") and (stage.get("inputs") or {}).get("model") == variant
    ]


def what_failed(document: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(variant, sentence) for each variant without a result or with an evaluation that did not finish."""
    said = []
    for variant in document["variants"]:
        if sentence := _why_not_done(document, variant):
            said.append((variant, sentence))
            continue
        for stage in evaluations(document, variant):
            if sentence := _why_not_done(document, stage["name"]):
                said.append((variant, f"{stage['name'].removeprefix(variant + '/')} {sentence}"))
    return said


def _why_not_done(document: Mapping[str, Any], name: str) -> str | None:
    """Why a stage has no result; None if it has one."""
    chain = ancestors(document, name)
    stage = chain[-1]
    if stage["state"] in DONE:
        return None
    if stage.get("error"):
        return f"{stage['state']}: {stage['error']}"
    culprit = next((one for one in chain if one.get("error")), None)
    if culprit is not None:
        return f"{stage['state']}, because {culprit['name']} {culprit['state']}: {culprit['error']}"
    return str(stage["state"])


def dashes(
    document: Mapping[str, Any], table: Sequence[Mapping[str, Any]], columns: Sequence[Column]
) -> list[tuple[str, list[str]]]:
    """[(column's title, variants that the recipe doesn't have it measured of)], where it is measured of others."""
    explained = {name for name, _ in what_failed(document)}
    variants = [row for row in table if row["variant"] in document["variants"]]
    said = []
    for column in columns:
        missing = [row["variant"] for row in variants if row.get(column.key) is None]
        if len(missing) < len(variants):
            said.append((column.title, [name for name in missing if name not in explained]))
    return [(title, missing) for title, missing in said if missing]


def mixed_protocols(document: Mapping[str, Any]) -> list[str]:
    """A warning for each kind of evaluation that measured variants on different data or with different settings."""
    stages = {stage["name"]: stage for stage in document["stages"]}
    ways: dict[str, dict[str, list[str]]] = {}
    for variant in document["variants"]:
        for stage in evaluations(document, variant):
            method = stage["stage"].removeprefix("evaluate/")
            if stage["name"] != f"{variant}/{method}" or stage["state"] not in DONE:
                continue
            inputs = {role: name for role, name in stage["inputs"].items() if role != "model"}
            data = {role: stages[name]["artifact"] for role, name in inputs.items() if name in stages}
            way = json.dumps([stage.get("parameters"), data], sort_keys=True)
            ways.setdefault(method, {}).setdefault(way, []).append(variant)
    return [
        f"{method} was measured in {len(found)} ways (other data or settings), and only figures measured in the same "
        f"way can be compared: {'; '.join(', '.join(variants) for variants in found.values())}."
        for method, found in ways.items()
        if len(found) > 1
    ]


def mixed_hardware(document: Mapping[str, Any]) -> dict[str, list[str]]:
    """{hardware: rows measured on it}, when there are several."""
    found: dict[str, list[str]] = {}
    for row, metrics in document["metrics"].items():
        if metrics.get("hardware"):
            found.setdefault(metrics["hardware"], []).append(row)
    return found if len(found) > 1 else {}


def hardware_words(document: Mapping[str, Any]) -> str:
    """ "nf4, int8 on one GPU; the others on this CPU", the most rows last; empty when all hardware is the same."""
    groups = sorted(mixed_hardware(document).items(), key=lambda group: len(group[1]))
    said = [f"{', '.join(rows)} on {hardware}" for hardware, rows in groups[:-1]]
    if groups and len(groups[-1][1]) > 3:
        said.append(f"the others on {groups[-1][0]}")
    elif groups:
        said.append(f"{', '.join(groups[-1][1])} on {groups[-1][0]}")
    return "; ".join(said)


def loading(document: Mapping[str, Any], variant: str) -> Loading | None:
    """How to export and load a variant; None if it has no result."""
    stages = {stage["name"]: stage for stage in document["stages"]}
    stage = stages[variant]
    if not stage.get("artifact"):
        return None
    command = _export(document, stage)
    folder = folder_name(variant)
    if stage.get("kind") == "adapter":
        base = next((one for one in document["stages"] if one["artifact"] == stage.get("base")), None)
        of_base = folder_name(base["name"]) if base else "base"
        commands = [_export(document, base) if base else f"coldpress export {stage.get('base')} base", command]
        how = _python(str(base.get("format") or "dense") if base else "dense", of_base)
        with_adapter = ["from peft import PeftModel", f'model = PeftModel.from_pretrained(model, "{folder}")']
        lines = [*how, *with_adapter]
        return Loading("\n".join(commands), "\n".join(lines))
    return Loading(command, "\n".join(_python(str(stage.get("format") or "dense"), folder)))


def folder_name(variant: str) -> str:
    """A variant's name as that of a folder."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", variant).strip("-") or "model"


def _export(document: Mapping[str, Any], stage: Mapping[str, Any]) -> str:
    recipe = stage.get("recipe") or document["recipe"]
    ref = f"{recipe}/{stage.get('node') or stage['name']}"
    store = stage.get("store") or document["store"]
    words = ["coldpress", "export", ref, folder_name(stage["name"]), "--store", store]
    return shlex.join(words)


def _python(format: str, folder: str) -> list[str]:
    if _ONE_LOADS.get(format) == "gptqmodel":
        return ["from gptqmodel import GPTQModel", f'model = GPTQModel.load("{folder}")', "tokenizer = model.tokenizer"]
    return [
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        f'model = AutoModelForCausalLM.from_pretrained("{folder}", dtype="auto")',
        f'tokenizer = AutoTokenizer.from_pretrained("{folder}")',
    ]
