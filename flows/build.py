"""From a recipe's document to the nodes of its DAG, noting everything that is wrong on the way."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from ..tasks.catalogue import did_you_mean, methods, uses
from ..tasks.sources.texts import PYTHON_DOCS
from ..tasks.stage import CATALOGUE, Parameters, Stage
from .document import Document, Path, Problem
from .expand import Instance, expand_matrix, join_instances
from .mistakes import NO_REMOTE_CODE, sentence
from .recipe import Node

SECTIONS = ("name", "model", "models", "data", "stages", "evaluate")
SINGLE_MODEL = "base"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


class Builder:
    """Collects nodes and problems while it walks through a document."""

    def __init__(self, document: Document, folder: str, problems: list[Problem]) -> None:
        self.document = document
        self.value: dict[str, Any] = document.value
        self.folder = folder
        self.problems = problems
        self.name = "recipe"
        self.nodes: dict[str, Node] = {}
        self.instances: dict[str, list[Instance]] = {}  # name in the recipe -> its nodes
        self.variants: list[str] = []
        self.evaluations: dict[str, tuple[str, ...]] = {}
        self.data: dict[str, tuple[TokensEntry, int | None]] = {}
        self.learned_from: dict[str, str] = {}  # data entry -> the role in which stages use it
        self.broken: set[str] = set()  # named in the recipe, but with problems of their own

    def problem(self, message: str, *path: str | int) -> None:
        self.problems.append(Problem(message, self.document.line(*path)))

    def build(self) -> None:
        for key in self.value:
            if key == "trust_remote_code":
                self.problem(NO_REMOTE_CODE, key)
            elif key not in SECTIONS:
                self.problem(f"unknown section '{key}'; {did_you_mean(key, list(SECTIONS))}", key)
        name = self.value.get("name")
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            self.problem("a recipe needs a name of letters, digits, '-', '_' and '.': 'name: my-recipe'", "name")
        else:
            self.name = name
        self._models()
        self._data()
        self._stages()
        self._evaluations()

    def section(self, key: str) -> dict[str, Any]:
        """A section as a mapping of mappings, problems noted."""
        value = self.value.get(key) or {}
        if not isinstance(value, dict):
            self.problem(f"'{key}' must be a mapping of names to settings", key)
            return {}
        result = {}
        for name, entry in value.items():
            if not isinstance(entry, dict):
                self.problem(f"'{key}.{name}' must be a mapping, like {{source: …}}", key, name)
                self.broken.add(name)
            elif not _NAME.fullmatch(name):
                self.problem(f"'{name}' is no name: use letters, digits, '-', '_' and '.'", key, name)
            else:
                result[name] = entry
        return result

    def _models(self) -> None:
        if "model" in self.value and "models" in self.value:
            self.problem("write either 'model' (one) or 'models' (several), not both", "models")
        single = self.value.get("model")
        if isinstance(single, str):
            single = {"source": single}
        if single is not None:
            if isinstance(single, dict):
                self._model(SINGLE_MODEL, single, ("model",))
            else:
                self.problem("'model' must be a mapping, like {source: …}", "model")
        for name, entry in self.section("models").items():
            self._model(name, entry, ("models", name))
        if single is None and not self.value.get("models"):
            self.problem("a recipe needs a model: 'model: {source: …}'")

    def _model(self, name: str, entry: dict[str, Any], path: Path) -> None:
        stage = CATALOGUE["source/model"]
        parameters = self.parameters(stage, self._local(entry), path, f"model '{name}'")
        if parameters is None:
            self.broken.add(name)
            return
        self.nodes[name] = Node(name, stage, parameters, {}, self.document.line(*path), name)
        self.instances[name] = [Instance(name, ())]

    def _data(self) -> None:
        stage = CATALOGUE["source/tokens"]
        for name, entry in self.section("data").items():
            if name in self.nodes:
                self.problem(f"'{name}' is a model already; give the data another name", "data", name)
                continue
            parameters = self.parameters(stage, self._local(entry), ("data", name), f"data '{name}'")
            if parameters is None:
                self.broken.add(name)
            else:
                self.data[name] = (TokensEntry(name, parameters), self.document.line("data", name))

    def _local(self, entry: dict[str, Any]) -> dict[str, Any]:
        """Relative paths are relative to the recipe's folder."""
        if isinstance(folder := entry.get("include_path"), str):
            entry = {**entry, "include_path": os.path.abspath(os.path.join(self.folder, os.path.expanduser(folder)))}
        source = entry.get("source")
        if not isinstance(source, str) or "://" in source or source == PYTHON_DOCS:
            return entry
        path = os.path.join(self.folder, os.path.expanduser(source))
        looks_local = os.path.exists(path) or source.startswith(("./", "../", "~"))
        return {**entry, "source": os.path.abspath(path)} if looks_local else entry

    def parameters(self, stage: Stage, values: Mapping[str, Any], path: Path, label: str) -> Parameters | None:
        """The checked parameters of a stage; every problem is noted."""
        try:
            return stage.parameters.model_validate(dict(values))
        except ValidationError as error:
            for detail in error.errors():
                inner = detail["loc"][1:] if (*path, *detail["loc"]) in self.document.lines else ()
                where = (*path, str(detail["loc"][0]), *inner) if detail["loc"] else path
                self.problem(sentence(stage, label, detail), *where)
            return None

    def _stages(self) -> None:
        section = self.section("stages")
        for name, entry in section.items():
            if name in self.nodes or name in self.data:
                self.problem(f"'{name}' is the name of a model or data entry already; rename the stage", "stages", name)
                continue
            self.instances.setdefault(name, [])
            if not self._stage(name, entry, section):
                self.broken.add(name)

    def _stage(self, name: str, entry: dict[str, Any], section: Mapping[str, Any]) -> bool:
        path: Path = ("stages", name)
        label = f"stage '{name}'"
        use, method = entry.get("use"), entry.get("method")
        if use not in uses():
            self.problem(
                f"{label} needs 'use'; there is {', '.join(uses())}" if use is None
                else f"{label}: unknown use '{use}'; {did_you_mean(str(use), uses())}",
                *path, "use",
            )  # fmt: skip
            return False
        if method not in methods(use):
            self.problem(
                f"{label} needs 'method'; {use} has {', '.join(methods(use))}" if method is None
                else f"{label}: {use} has no method '{method}'; {did_you_mean(str(method), methods(use))}",
                *path, "method",
            )  # fmt: skip
            return False
        stage = CATALOGUE[f"{use}/{method}"]
        before = len(self.problems)
        inputs = {role: entry[role] for role in stage.inputs if role in entry}
        for role, kind in stage.inputs.items():
            if role not in entry and role in stage.passed_on:
                continue
            if role not in entry:
                there = sorted(self.data) if kind == "tokens" else sorted(self.instances.keys() - {name})
                self.problem(f"{label} needs '{role}', the name of a {kind}; there is {', '.join(there)}", *path)
            else:
                self._check_reference(name, role, kind, entry[role], section)
        for role, kind in stage.inputs.items():
            if kind == "tokens" and isinstance(inputs.get(role), str):
                self.learned_from.setdefault(inputs[role], role)
        matrix = entry.get("matrix") or {}
        fixed = {k: v for k, v in entry.items() if k not in ("use", "method", "matrix", *stage.inputs)}
        if not isinstance(matrix, dict) or not all(isinstance(values, list) and values for values in matrix.values()):
            self.problem(
                f"{label}: matrix must be lists of values by parameter, like {{sparsity: [0.5, 0.6]}}", *path, "matrix"
            )
            return False
        for parameter in matrix:
            if parameter in fixed:
                self.problem(
                    f"{label}: '{parameter}' is set and in the matrix too; drop one", *path, "matrix", parameter
                )
        checked: dict[tuple[Any, ...], Parameters | None] = {}
        for values in expand_matrix(matrix):
            where = (*path, "matrix") if values else path
            checked[values] = parameters = self.parameters(stage, {**fixed, **dict(values)}, where, label)
            if parameters is not None:
                self._check_passed_on(stage, parameters, inputs, path, label)
        if len(self.problems) > before or any(name in self.broken for name in inputs.values()):
            return False

        kinds = {role: kind for role, kind in stage.inputs.items() if role in inputs}
        upstream = [self.instances[inputs[role]] for role, kind in kinds.items() if kind != "tokens"]
        for values, parameters in checked.items():
            assert parameters is not None
            for joined in join_instances(name, upstream, values):
                node_inputs: dict[str, str] = {}
                chosen = iter(joined.chosen)
                root = ""
                for role, kind in kinds.items():
                    if kind != "tokens":
                        node_inputs[role] = next(chosen)
                        root = root or self.nodes[node_inputs[role]].root
                for role, kind in kinds.items():
                    if kind == "tokens":
                        node_inputs[role] = self._tokens(inputs[role], root)
                line = self.document.line(*path)
                for role, (asked, further) in stage.derived(parameters).items():
                    node_inputs[role] = self._derived(CATALOGUE[asked], further, node_inputs, line, root)
                for role in stage.passed_on:
                    node_inputs.pop(role, None)
                name_of = joined.instance.name
                self.nodes[name_of] = Node(name_of, stage, parameters, node_inputs, line, root)
                self.instances[name].append(joined.instance)
        return True

    def _check_passed_on(
        self, stage: Stage, parameters: Parameters, inputs: Mapping[str, str], path: Path, label: str
    ) -> None:
        """What a stage derives needs the inputs that it passes on."""
        for asked, _ in stage.derived(parameters).values():
            for role in (CATALOGUE[asked].inputs.keys() & stage.passed_on) - inputs.keys():
                kind = stage.inputs[role]
                there = ", ".join(sorted(self.data)) or "none yet"
                self.problem(f"{label} needs '{role}' for {asked}, the name of a {kind} entry; there is {there}", *path)

    def _check_reference(self, name: str, role: str, kind: str, value: Any, section: Mapping[str, Any]) -> None:
        path: Path = ("stages", name, role)
        label = f"stage '{name}'"
        if not isinstance(value, str):
            self.problem(f"{label}: {role} must be a name, but is {value!r}", *path)
            return
        if kind == "tokens":
            if value not in self.data and value not in self.broken:
                if value in self.instances:
                    self.problem(f"{label}: {role} must be a data entry, but '{value}' is a model", *path)
                else:
                    self.problem(
                        f"{label}: {role} '{value}' is not under 'data'; {did_you_mean(str(value), sorted(self.data))}",
                        *path,
                    )
            return
        if self.instances.get(str(value)) or value in self.broken:
            return
        if value in self.data:
            self.problem(f"{label}: {role} must be a model or a stage, but '{value}' is a data entry", *path)
        elif value == name:
            self.problem(f"{label} takes itself as {role}; name a model or a stage above it", *path)
        elif value in section:
            chain = _cycle(name, section)
            if chain:
                self.problem(f"stages {' -> '.join(chain)} form a cycle; one of them must start from a model", *path)
            else:
                self.problem(f"{label}: {role} '{value}' comes further down; move stage '{value}' above it", *path)
        else:
            known = sorted(self.instances.keys() - {name})
            self.problem(
                f"{label}: {role} '{value}' is neither a model nor a stage; {did_you_mean(str(value), known)}", *path
            )

    def _tokens(self, entry_name: str, root: str) -> str:
        """The node that tokenizes a data entry for the model at the root of a branch."""
        entry, line = self.data[entry_name]
        models = [node for node in self.nodes.values() if node.stage.name == "source/model"]
        name = entry_name if len(models) == 1 else f"{entry_name}@{root}"
        if name not in self.nodes:
            self.nodes[name] = Node(name, CATALOGUE["source/tokens"], entry.parameters, {"model": root}, line, root)
        return name

    def _derived(
        self, stage: Stage, values: Mapping[str, Any], inputs: Mapping[str, str], line: int | None, root: str
    ) -> str:
        """The node of what a stage asks for itself; those that ask for the same share it."""
        parameters = stage.parameters.model_validate(dict(values))
        taken = {role: inputs[role] for role in stage.inputs}
        settings = [f"{key}={value}" for key, value in parameters.for_key().items()]
        name = f"{taken['model']}/{stage.method}" + (f"[{','.join(settings)}]" if settings else "")
        while (node := self.nodes.get(name)) and dict(node.inputs) != taken:  # measured on other data
            name += "'"
        if node is None:
            self.nodes[name] = Node(name, stage, parameters, taken, line, root)
        return name

    def _evaluations(self) -> None:
        section = self.value.get("evaluate")
        if section is None:
            return
        if not isinstance(section, dict):
            self.problem(
                "'evaluate' must be a mapping, like {variants: [base], perplexity: {data: held_out}}", "evaluate"
            )
            return
        variants = section.get("variants", list(self.instances))
        if not isinstance(variants, list):
            self.problem("variants must be a list of models and stages: [base, pruned]", "evaluate", "variants")
            return
        measurements = list(self._measurements(section, variants))
        for index, variant in enumerate(variants):
            path = ("evaluate", "variants", index)
            if not self.instances.get(str(variant)):
                if str(variant) not in self.broken:
                    names = sorted(self.instances)
                    self.problem(
                        f"variant '{variant}' is neither a model nor a stage; {did_you_mean(str(variant), names)}",
                        *path,
                    )
                continue
            for instance in self.instances[str(variant)]:
                if self.nodes[instance.name].stage.output in ("checkpoint", "adapter"):
                    self.variants.append(instance.name)
                    asked = [one for one in measurements if variant in one.variants]
                    self.evaluations[instance.name] = tuple(self._evaluate(instance.name, asked))
        self._check_overlap(section)

    def _measurements(self, section: Mapping[str, Any], variants: list[Any]) -> Iterator[Measurement]:
        """What is to be measured: the size, and what the section says. An entry whose name is no method's names one."""
        known = methods("evaluate")
        if "size" not in section:
            yield Measurement("size", CATALOGUE["evaluate/size"], {}, variants)
        for name, entry in section.items():
            path: Path = ("evaluate", name)
            named = name not in known and isinstance(entry, dict) and "method" in entry
            method = entry["method"] if named else name
            if name == "variants":
                continue
            if method not in known:
                label = f"evaluation '{name}': unknown method" if named else "unknown evaluation"
                self.problem(f"{label} '{method}'; {did_you_mean(str(method), known)}", *path)
            elif not isinstance(entry, dict):
                self.problem(f"evaluation '{name}' must be a mapping, like {{data: held_out}}", *path)
            elif not _NAME.fullmatch(name):
                self.problem(f"'{name}' is no name: use letters, digits, '-', '_' and '.'", *path)
            elif not isinstance(own := entry.get("variants", variants), list) or any(
                one not in variants for one in own
            ):
                self.problem(f"evaluation '{name}': its variants must be a list of the recipe's", *path, "variants")
            else:
                ours = ("variants", "method") if named else ("variants",)
                settings = {key: value for key, value in entry.items() if key not in ours}
                yield Measurement(name, CATALOGUE[f"evaluate/{method}"], settings, own)

    def _evaluate(self, instance: str, measurements: Sequence[Measurement]) -> Iterator[str]:
        for measurement in measurements:
            stage, entry, label = measurement.stage, measurement.settings, f"evaluation '{measurement.name}'"
            path: Path = ("evaluate", measurement.name)
            root = self.nodes[instance].root
            inputs = {"model": instance, **({"reference": root} if "reference" in stage.inputs else {})}
            complete = True
            for role, kind in stage.inputs.items():
                if kind == "tokens":
                    if str(entry.get(role)) in self.data:
                        inputs[role] = self._tokens(entry[role], root)
                    else:
                        complete = False
                        if str(entry.get(role)) not in self.broken:
                            self.problem(
                                f"{label} needs '{role}', an entry under 'data'; "
                                f"{did_you_mean(str(entry.get(role)), sorted(self.data))}", *path, role,
                            )  # fmt: skip
            values = {key: value for key, value in entry.items() if key not in stage.inputs}
            parameters = self.parameters(stage, self._local(values), path, label)
            if complete and parameters is not None:
                name = f"{instance}/{measurement.name}"
                line = self.document.line(*path)
                for role, (asked, further) in stage.derived(parameters).items():
                    inputs[role] = self._derived(CATALOGUE[asked], further, {**inputs, "model": root}, line, root)
                self.nodes[name] = Node(name, stage, parameters, inputs, line, root)
                yield name

    def _check_overlap(self, section: Mapping[str, Any]) -> None:
        held_out = {
            str(entry["data"])
            for entry in section.values()
            if isinstance(entry, dict) and str(entry.get("data")) in self.data
        }
        for first in held_out:
            for second in self.learned_from.keys() & self.data.keys():
                if self.data[first][0].overlaps(self.data[second][0]):
                    self.problem(
                        f"{self.learned_from[second]} '{second}' and evaluation data '{first}' are drawn from the same "
                        "text, so windows could be in both; give them different splits (split: train, split: test) or "
                        "sources",
                        "data", first,
                    )  # fmt: skip


@dataclass(frozen=True)
class Measurement:
    """An entry under 'evaluate': its name, stage, settings (names of data among them), and the variants it is of."""

    name: str
    stage: Stage
    settings: Mapping[str, Any]
    variants: Sequence[Any]


@dataclass(frozen=True)
class TokensEntry:
    """A data entry of the recipe."""

    name: str
    parameters: Any

    def overlaps(self, other: TokensEntry) -> bool:
        """Whether the two may draw the same text."""
        mine, theirs = self.parameters, other.parameters
        if (mine.source, mine.name) != (theirs.source, theirs.name):
            return False
        return mine.split == theirs.split or "all" in (mine.split, theirs.split)


def _cycle(start: str, section: Mapping[str, Any]) -> list[str] | None:
    """The names on a way from `start` back to itself over the `model:` inputs, if there is one."""
    trail = [start]
    while True:
        entry = section.get(trail[-1])
        following = entry.get("model") if isinstance(entry, dict) else None
        if following == start:
            return [*trail, start]
        if not isinstance(following, str) or following in trail:
            return None
        trail.append(following)
