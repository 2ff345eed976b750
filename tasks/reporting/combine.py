"""Several runs' documents as one, for a report over recipes and stores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

_DONE = ("cached", "computed", "resumed")


def combine(documents: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One document of all variants; names that mean different things get their recipe's before them.

    A variant (or another stage) that several runs have with the same artifact and the same figures stands there once,
    with all that was measured of it. Where figures of one artifact contradict each other, measured on other data for
    instance, both stay. Comparisons item by item are those within each run.
    """
    if len(documents) == 1:
        return dict(documents[0])
    names = _names(documents)
    stages: dict[str, dict[str, Any]] = {}
    variants: dict[str, None] = {}
    figures: dict[str, dict[str, dict[str, Any]]] = {"metrics": {}, "runtimes": {}, "differences": {}}
    generations: dict[str, Any] = {}
    alike: dict[str, list[list[str]]] = {}
    for document, called in zip(documents, names, strict=True):
        for stage in document["stages"]:
            entry = {
                **stage,
                "name": called[stage["name"]],
                "inputs": {role: called[name] for role, name in (stage.get("inputs") or {}).items()},
                "root": called.get(stage["root"], stage["root"]),
                "recipe": document["recipe"],
                "store": document["store"],
                "node": stage["name"],
            }
            known = stages.get(entry["name"])
            if known is None or (known["state"] not in _DONE and entry["state"] in _DONE):
                stages[entry["name"]] = entry
        variants.update(dict.fromkeys(called[name] for name in document["variants"]))
        for part, rows in figures.items():
            for row, found in document.get(part, {}).items():
                rows.setdefault(_row(row, document, called), {}).update(_renamed(found, document, called))
        for row, texts in document.get("generations", {}).items():
            generations.setdefault(_row(row, document, called), texts)
        for metric, pairs in document.get("indistinguishable", {}).items():
            said = ([_row(row, document, called) for row in pair] for pair in pairs)
            alike.setdefault(metric, []).extend(pair for pair in said if pair not in alike.get(metric, []))
    return {
        "run": None,
        "recipe": ", ".join(dict.fromkeys(document["recipe"] for document in documents)),
        "store": ", ".join(dict.fromkeys(document["store"] for document in documents)),
        "stages": list(stages.values()),
        "variants": list(variants),
        **figures,
        "indistinguishable": alike,
        **({"generations": generations} if generations else {}),
    }


@dataclass(frozen=True)
class _Meaning:
    """What a stage's name stands for in one document: an artifact and the figures of it; without one, whose it is."""

    artifact: str | None
    recipe: str
    name: str
    figures: Mapping[str, Any]

    def same(self, other: _Meaning) -> bool:
        """Whether both can be one entry: equal artifacts, no figure of which contradicts the other's."""
        if self.artifact is None:
            return other.artifact is None and (self.recipe, self.name) == (other.recipe, other.name)
        shared = self.figures.keys() & other.figures.keys()
        return self.artifact == other.artifact and all(self.figures[key] == other.figures[key] for key in shared)


def _names(documents: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """For each document how its stages are called in the combined one: the same for the same."""
    meant = [{stage["name"]: _meaning(document, stage) for stage in document["stages"]} for document in documents]
    clashing = {
        name
        for mine, theirs in combinations(meant, 2)
        for name in mine.keys() & theirs.keys()
        if not mine[name].same(theirs[name])
    }
    called: list[dict[str, str]] = []
    taken: dict[str, _Meaning] = {}
    for document, meanings in zip(documents, meant, strict=True):
        mine: dict[str, str] = {}
        for stage in document["stages"]:
            name, meaning = stage["name"], meanings[stage["name"]]
            model = (stage.get("inputs") or {}).get("model")
            if stage["stage"].startswith("evaluate/") and model in mine:
                mine[name] = mine[model] + name.removeprefix(model)
                continue
            twin = next((one for one, known in taken.items() if known.same(meaning)), None)
            chosen = twin or (f"{document['recipe']}: {name}" if name in clashing else name)
            while twin is None and chosen in taken:
                chosen += "'"  # the same recipe in two stores, with other results
            earlier = taken[twin].figures if twin else {}
            taken[chosen] = replace(meaning, figures={**earlier, **meaning.figures})
            mine[name] = chosen
        called.append(mine)
    return called


def _meaning(document: Mapping[str, Any], stage: Mapping[str, Any]) -> _Meaning:
    figures = document["metrics"].get(stage["name"], {})
    numbers = {key: value for key, value in figures.items() if isinstance(value, int | float)}
    return _Meaning(stage.get("artifact"), document["recipe"], stage["name"], numbers)


def _row(row: str, document: Mapping[str, Any], called: Mapping[str, str]) -> str:
    """A row's name: of a variant, or of an evaluation "variant/name"."""
    if row in called:
        return called[row]
    variant, _, name = row.rpartition("/")
    return f"{called[variant]}/{name}" if variant in called else row


def _renamed(found: Mapping[str, Any], document: Mapping[str, Any], called: Mapping[str, str]) -> dict[str, Any]:
    """A row's entries, the references in its comparisons under their new names."""
    return {
        key: {**value, "reference": _row(value["reference"], document, called)}
        if isinstance(value, dict) and "reference" in value
        else value
        for key, value in found.items()
    }
