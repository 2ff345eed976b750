"""Fingerprints of the code behind each method, so that results don't change under an unchanged version.

`python -m tests.fingerprints` (`make fingerprints`) rewrites fingerprints.json. A fingerprint covers the syntax trees,
without comments and docstrings, of the module that holds the stage and of everything inside coldpress that it imports.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import json
from pathlib import Path

from coldpress.tasks.catalogue import CATALOGUE

ROOT = Path(__file__).resolve().parent.parent
RECORD = Path(__file__).with_name("fingerprints.json")


def module_path(name: str) -> Path | None:
    """The file of a module, by its dotted name relative to coldpress (`tasks.blocks`)."""
    base = ROOT.joinpath(*name.split("."))
    return next((path for path in (base.with_suffix(".py"), base / "__init__.py") if path.is_file()), None)


def imported(tree: ast.Module, name: str, *, is_package: bool) -> set[str]:
    """Modules inside coldpress that a module imports, anywhere in it, except for types alone."""
    found = set()
    for node in _without_type_checking(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            parts = name.split(".")
            base = parts[: len(parts) - node.level + (1 if is_package else 0)]
            target = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                inner = f"{target}.{alias.name}"
                found.add(inner if module_path(inner) else target)
    return {module for module in found if module_path(module)}


def _without_type_checking(tree: ast.AST) -> list[ast.AST]:
    nodes: list[ast.AST] = []
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.If) and isinstance(child.test, ast.Name) and child.test.id == "TYPE_CHECKING":
            continue
        nodes += [child, *_without_type_checking(child)]
    return nodes


@functools.cache
def code_of(name: str) -> tuple[str, frozenset[str]]:
    """A module's syntax tree as text, without docstrings, and the modules it imports."""
    path = module_path(name)
    assert path is not None, name
    tree = ast.parse(path.read_text())
    modules = imported(tree, name, is_package=path.name == "__init__.py")
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node, clean=False):
            node.body = node.body[1:]
    return ast.dump(tree), frozenset(modules)


def fingerprint(module: str) -> str:
    """The fingerprint of a module and all it imports."""
    texts: dict[str, str] = {}
    waiting = {module}
    while waiting:
        name = waiting.pop()
        if name not in texts:
            texts[name], further = code_of(name)
            waiting |= further
    return hashlib.sha256("\n".join(texts[name] for name in sorted(texts)).encode()).hexdigest()[:16]


def fingerprints() -> dict[str, dict[str, object]]:
    """Stage name -> its version and the fingerprint of its code."""
    found: dict[str, dict[str, object]] = {}
    for name, stage in sorted(CATALOGUE.items()):
        module = inspect.unwrap(stage.function).__module__.removeprefix("coldpress.")
        found[name] = {"version": stage.version, "code": fingerprint(module)}
    return found


if __name__ == "__main__":
    RECORD.write_text(json.dumps(fingerprints(), indent=1) + "\n")
