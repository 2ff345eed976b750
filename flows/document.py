"""A YAML recipe as plain values that remember the lines they came from."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import yaml

Path = tuple[str | int, ...]


@dataclass(frozen=True)
class Problem:
    """Something wrong in a recipe: what, and where."""

    message: str
    line: int | None = None


@dataclass(frozen=True)
class Document:
    """Plain values, and the line of each value by its path."""

    value: Any
    lines: dict[Path, int]
    problems: list[Problem]

    def line(self, *path: str | int) -> int | None:
        """The line of the value at `path`, or of the nearest thing around it."""
        for length in range(len(path), -1, -1):
            if path[:length] in self.lines:
                return self.lines[path[:length]]
        return None


class _Loader(yaml.SafeLoader):
    """YAML without base-60 numbers: `2:4` is a pattern, not 124."""


_Loader.yaml_implicit_resolvers = {
    letter: [
        (tag, pattern) for tag, pattern in resolvers if tag not in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
    ]
    for letter, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?[0-9]+$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$|^[-+]?\.(inf|nan)$"),
    list("-+0123456789."),
)


def parse(text: str) -> Document:
    """The document of a YAML text. Syntax errors and doubled keys are problems, not exceptions."""
    lines: dict[Path, int] = {}
    problems: list[Problem] = []
    loader = _Loader(text)

    def build(node: yaml.Node, path: Path) -> Any:
        lines.setdefault(path, node.start_mark.line + 1)
        if isinstance(node, yaml.MappingNode):
            result: dict[Any, Any] = {}
            for key_node, value_node in node.value:
                key = loader.construct_object(key_node, deep=True)
                if not isinstance(key, str):
                    key = str(key_node.value)
                line = key_node.start_mark.line + 1
                if key in result:
                    problems.append(
                        Problem(f"'{key}' is there twice; the first is in line {lines[(*path, key)]}", line)
                    )
                    continue
                lines[(*path, key)] = line
                result[key] = build(value_node, (*path, key))
            return result
        if isinstance(node, yaml.SequenceNode):
            return [build(child, (*path, index)) for index, child in enumerate(node.value)]
        return loader.construct_object(node, deep=True)

    try:
        root = loader.get_single_node()
        value = None if root is None else build(root, ())
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        problems.append(Problem(f"not valid YAML: {error.problem}", None if mark is None else mark.line + 1))
        value = None
    finally:
        loader.dispose()
    return Document(value, lines, problems)


def parse_value(text: str) -> Any:
    """A single YAML value, as in `--set stages.pruned.sparsity=0.6`."""
    return yaml.load(text, Loader=_Loader)
