"""Recipes: a YAML file becomes a DAG of nodes, or a list of everything that is wrong with it.

Nothing is loaded or computed here, and every problem is reported at once, with its line and what to write instead.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

from ..storage.errors import ColdpressError
from ..tasks.catalogue import did_you_mean
from ..tasks.stage import Parameters, Stage
from .document import Document, Problem, parse, parse_value


class RecipeError(ColdpressError):
    """A recipe that can't be run: all its problems."""

    def __init__(self, path: str, problems: Sequence[Problem]) -> None:
        self.path = path
        self.problems = sorted(set(problems), key=lambda problem: (problem.line or 0, problem.message))
        super().__init__("\n".join(self.sentences()))

    def sentences(self) -> list[str]:
        """One line a problem: `recipe.yaml:14: stage 'gptq': …`."""
        return [
            f"{self.path}:{problem.line}: {problem.message}" if problem.line else f"{self.path}: {problem.message}"
            for problem in self.problems
        ]


@dataclass(frozen=True)
class Node:
    """One stage of the DAG, after `matrix:` is expanded. `inputs` names other nodes by role."""

    name: str
    stage: Stage
    parameters: Parameters
    inputs: Mapping[str, str]
    line: int | None
    root: str  # the model at the beginning of its branch

    @property
    def label(self) -> str:
        """How errors call it."""
        return {"source": f"'{self.name}'", "evaluate": f"evaluation '{self.name}'"}.get(
            self.stage.use, f"stage '{self.name}'"
        )


@dataclass(frozen=True)
class Recipe:
    """A checked recipe: nodes in an order in which each comes after its inputs."""

    name: str
    path: str
    text: str
    overrides: tuple[str, ...]
    nodes: tuple[Node, ...]
    variants: tuple[str, ...] = ()
    evaluations: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # variant -> its evaluation nodes

    def node(self, name: str) -> Node:
        """The node of that name. Raises KeyError."""
        return next(node for node in self.nodes if node.name == name)

    def only(self, names: Sequence[str]) -> Recipe:
        """The part of the recipe that the named nodes need, with the evaluations of the named ones."""
        known = [node.name for node in self.nodes]
        wanted: set[str] = set()
        for name in names:
            matches = [n for n in known if n == name or n.split("[", 1)[0] == name]
            if not matches:
                raise ColdpressError(f"--only {name}: the recipe has no such stage; {did_you_mean(name, known)}")
            wanted.update(matches)
            wanted.update(evaluation for match in matches for evaluation in self.evaluations.get(match, ()))
        for node in reversed(self.nodes):
            if node.name in wanted:
                wanted.update(node.inputs.values())
        return Recipe(
            self.name,
            self.path,
            self.text,
            self.overrides,
            tuple(node for node in self.nodes if node.name in wanted),
            tuple(variant for variant in self.variants if any(e in wanted for e in self.evaluations[variant])),
            {v: tuple(e for e in found if e in wanted) for v, found in self.evaluations.items()},
        )


def find_recipe(name: str) -> tuple[str, str, str]:
    """(path to show, text, folder of relative paths) of a recipe file or of a shipped recipe's name."""
    if os.path.isfile(name):
        with open(name, encoding="utf-8") as file:
            return name, file.read(), os.path.dirname(os.path.abspath(name))
    shipped = {entry.name.removesuffix(".yaml"): entry for entry in _shipped()}
    if name.removesuffix(".yaml") in shipped:
        entry = shipped[name.removesuffix(".yaml")]
        return entry.name, entry.read_text(encoding="utf-8"), os.getcwd()
    raise ColdpressError(
        f"there is no recipe file {name!r}, and none of that name comes with coldpress; "
        f"{did_you_mean(name, sorted(shipped))}"
    )


def _shipped() -> list[Any]:
    folder = resources.files("coldpress.flows.recipes")
    return [entry for entry in folder.iterdir() if entry.name.endswith(".yaml")]


def load_recipe(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read and check a recipe. `overrides` are `path.to.value=yaml`. Raises RecipeError with every problem found."""
    return parse_recipe(*find_recipe(name), overrides)


def parse_recipe(path: str, text: str, folder: str, overrides: Sequence[str] = ()) -> Recipe:
    """Check the text of a recipe. `path` is how errors call it; `folder` is where its relative paths begin."""
    document = parse(text)
    problems = list(document.problems)
    for override in overrides:
        problems.extend(_apply(document, override))
    if not isinstance(document.value, dict):
        problems.append(Problem("a recipe is a mapping with name, model, data, stages and evaluate", 1))
        raise RecipeError(path, problems)
    from .build import Builder

    builder = Builder(document, folder, problems)
    builder.build()
    if problems:
        raise RecipeError(path, problems)
    nodes = tuple(builder.nodes.values())
    return Recipe(builder.name, path, text, tuple(overrides), nodes, tuple(builder.variants), dict(builder.evaluations))


def _apply(document: Document, override: str) -> Iterator[Problem]:
    keys, equals, text = override.partition("=")
    if not equals or not keys:
        yield Problem(f"--set {override}: write it as stages.pruned.sparsity=0.6")
        return
    *parents, last = keys.split(".")
    place = document.value
    for key in parents:
        if not isinstance(place, dict) or not isinstance(place.get(key), dict):
            known = sorted(place) if isinstance(place, dict) else []
            yield Problem(f"--set {override}: the recipe has no '{key}' there; {did_you_mean(key, known)}")
            return
        place = place[key]
    place[last] = parse_value(text)
