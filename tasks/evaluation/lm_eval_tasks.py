"""What lm-eval's tasks are made of, found out without lm-eval, which is slow to import and to list what it has.

lm-eval looks for tasks in YAML files: its own, and those of a folder that takes precedence. Here only the few lines of
each file are parsed that say what it defines; those of lm-eval itself are remembered in the user's cache folder. Of the
tasks that are asked for everything is read: that gives the content id of their definitions, and what speaks against
running them.
"""

from __future__ import annotations

import functools
import glob
import importlib.metadata
import importlib.util
import json
import os
import re
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ...storage.digests import canonical_json, digest_of, sha256
from ..sources.locate import SourceError, file_digest

_KEYS = re.compile(rb"^[\"']?(task|group|tag|class|include)[\"']?[ \t]*:(?:[ \t].*)?(?:\n(?:[ \t-].*)?)*", re.MULTILINE)
_SKIPPED = {"__pycache__", ".ipynb_checkpoints"}


# The operator's consent to run Python that lies beside task files; a recipe can't give it.
ALLOW_CODE = "COLDPRESS_ALLOW_CODE"


class Function(str):
    """The name of a Python function, which `!function` in a task file has lm-eval import and call."""


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """Reads lm-eval's YAML; functions stay names."""


_Loader.add_constructor("!function", lambda loader, node: Function(loader.construct_scalar(node)))


@dataclass(frozen=True)
class Definition:
    """A name that can be evaluated: the YAML file that defines a task or a group, or the tasks with a tag."""

    path: str | None
    tagged: tuple[str, ...] = ()


@dataclass(frozen=True)
class Definitions:
    """What the names asked for stand for.

    tasks: {name: its settings, as in YAML, with what they include}; those without subtasks. files: {name: the files
    that define it}, the groups on the way to it too. folders: what lm-eval has to search to find all of them.
    """

    tasks: Mapping[str, Mapping[str, Any]]
    files: Mapping[str, frozenset[str]]
    folders: tuple[str, ...]

    def foreign(self) -> dict[str, list[str]]:
        """{task: the task files behind it that don't come with lm-eval}, for tasks that have such."""
        own = _own_folder() + os.sep
        found = {
            name: sorted(file for file in files if not file.startswith(own) and not file.endswith(".py"))
            for name, files in self.files.items()
        }
        return {name: files for name, files in found.items() if files}

    def data_sets(self) -> list[str]:
        """Their data sets on the Hub, or the builders of local files, as lm-eval's errors may fail to name them."""
        named = (settings.get("dataset_path") for settings in self.tasks.values())
        return sorted({name for name in named if isinstance(name, str)})


def version() -> str:
    """The version of lm-eval. Raises SourceError when it is not installed."""
    try:
        return importlib.metadata.version("lm_eval")
    except importlib.metadata.PackageNotFoundError as error:
        raise SourceError("lm-eval is not installed: pip install 'coldpress[lm-eval]'") from error


def content(names: Sequence[str], include_path: str | None) -> dict[str, Any]:
    """The content id of tasks: lm-eval's version, and a digest for each name that its own files don't define.

    Raises SourceError for unknown tasks, tasks that want to run code of their data, and missing data files.
    """
    definitions = define(names, include_path)
    problems = list(refusals(definitions))
    if problems:
        raise SourceError(problems[0])
    own = _own_folder()
    found: dict[str, Any] = {"lm_eval": version()}
    local = {}
    for name, files in definitions.files.items():
        if any(not file.startswith(own + os.sep) for file in files):
            data = list(_data_files(name, definitions.tasks[name]))
            local[name] = digest_of(
                sorted({file_digest(file) for file in files}) + [file_digest(path) for path in data]
            )
    return {**found, "tasks": local} if local else found


def define(names: Sequence[str], include_path: str | None) -> Definitions:
    """Everything behind the names. Raises SourceError where there is nothing."""
    version()
    if include_path is None:
        return _define_own(tuple(names))
    if not os.path.isdir(include_path):
        raise SourceError(f"include_path {include_path!r} is no folder; it is relative to the recipe's folder")
    return _define(names, {**_own_index(), **scan(include_path)}, include_path)


@functools.cache
def _define_own(names: tuple[str, ...]) -> Definitions:
    return _define(names, _own_index(), None)


def _define(names: Sequence[str], index: Mapping[str, Definition], include_path: str | None) -> Definitions:
    tasks: dict[str, dict[str, Any]] = {}
    files: dict[str, frozenset[str]] = {}
    folders: dict[str, None] = {}
    asked_as: dict[str, str] = {}
    if unknown := [name for name in names if name not in index]:
        raise SourceError(" ".join(f"lm-eval has no task '{name}'; {_similar(name, index)}" for name in unknown))
    for name in names:
        for task, settings, behind in _expand(name, index, {}, frozenset(), ()):
            if asked_as.setdefault(task, name) != name:
                raise SourceError(f"'{asked_as[task]}' and '{name}' both have the task '{task}'; ask for one of them")
            tasks[task] = settings
            files[task] = files.get(task, frozenset()) | behind
            folders.update(dict.fromkeys(os.path.dirname(file) for file in sorted(behind)))
    own = _own_folder() + os.sep
    searched = sorted(
        (folder for folder in folders if folder.startswith(own)), key=lambda folder: (len(folder), folder)
    )
    outermost: list[str] = []
    for folder in searched:
        if not any(folder.startswith(other + os.sep) for other in outermost):
            outermost.append(folder)
    return Definitions(tasks, files, (*outermost, *([include_path] if include_path else [])))


def refusals(definitions: Definitions) -> Iterator[str]:
    """Why tasks can't be run: they would execute what a model wrote, or code of whoever wrote the task.

    What comes with lm-eval is trusted as lm-eval itself is.
    """
    for name, settings in definitions.tasks.items():
        if settings.get("unsafe_code"):
            yield f"task '{name}' runs the code that the model writes (unsafe_code), which coldpress doesn't"
        if (settings.get("dataset_kwargs") or {}).get("trust_remote_code"):
            yield (
                f"task '{name}' runs code that comes with its data set '{settings.get('dataset_path')}' "
                "(trust_remote_code), which coldpress doesn't; convert the data set to files and name these in a task "
                "of your own"
            )
    if code_is_allowed():
        return
    for name, files in definitions.foreign().items():
        for file in files:
            for what in _code_in(_loaded(file)):
                yield (
                    f"task '{name}' runs {what}, named in {file}, with all rights of who computes; if everybody who "
                    f"may write there may do that, set {ALLOW_CODE}=1 where it is computed (and where it is submitted)"
                )


def code_is_allowed() -> bool:
    """Whether the operator lets Python beside task files run: $COLDPRESS_ALLOW_CODE is 1. Raises SourceError."""
    text = os.environ.get(ALLOW_CODE, "0")
    if text not in ("", "0", "1"):
        raise SourceError(f"{ALLOW_CODE} is {text!r}; write 1, or 0 for no")
    return text == "1"


def _code_in(value: Any) -> Iterator[str]:
    """What in a task file would be imported or downloaded and then run."""
    if isinstance(value, Function):
        yield f"the Python function {value}"
    elif isinstance(value, dict):
        if value.get("hf_evaluate"):
            yield f"the metric {value.get('metric')!r} as code from the Hub"
        for entry in value.values():
            yield from _code_in(entry)
    elif isinstance(value, list):
        for entry in value:
            yield from _code_in(entry)


def _expand(
    name: str,
    index: Mapping[str, Definition],
    overrides: Mapping[str, Any],
    files: frozenset[str],
    above: tuple[str, ...],
) -> Iterator[tuple[str, dict[str, Any], frozenset[str]]]:
    """(task, settings, the files behind it) for each task that a name stands for, as lm-eval finds them."""
    if name in above:
        raise SourceError(f"lm-eval's group '{name}' contains itself: {' -> '.join((*above, name))}")
    definition = index[name]
    above = (*above, name)
    if definition.path is None:
        for task in definition.tagged:
            yield from _expand(task, index, overrides, files, above)
        return
    settings, read = _settings(definition.path)
    files = files | read
    if "group" not in settings:
        yield name, {**settings, **overrides}, files
        return
    own = {key: value for key, value in settings.items() if key not in _OF_GROUPS} | dict(overrides)
    yield from _members(name, settings.get("task"), index, own, files, above)


_OF_GROUPS = ("group", "group_alias", "task", "aggregate_metric_list", "metadata", "include", "tag")


def _members(
    group: str,
    members: Any,
    index: Mapping[str, Definition],
    overrides: Mapping[str, Any],
    files: frozenset[str],
    above: tuple[str, ...],
) -> Iterator[tuple[str, dict[str, Any], frozenset[str]]]:
    for member in members if isinstance(members, list) else [members]:
        settings = dict(member) if isinstance(member, dict) else {}
        name = str(settings.get("group") or settings.get("task") if settings else member)
        if name in index:
            rest = {key: value for key, value in settings.items() if key not in ("task", "group")}
            yield from _expand(name, index, {**overrides, **rest}, files, above)
        elif "group" in settings:
            inner = {key: value for key, value in settings.items() if key not in _OF_GROUPS}
            yield from _members(f"{group}::{name}", settings.get("task"), index, {**overrides, **inner}, files, above)
        elif settings:
            yield f"{group}::{name}", {**overrides, **settings}, files
        else:
            raise SourceError(f"lm-eval has no task '{name}', which its group '{group}' names; {_similar(name, index)}")


def _settings(path: str, reading: tuple[str, ...] = ()) -> tuple[dict[str, Any], frozenset[str]]:
    """A YAML file's settings over those it includes; and all files it takes: YAML, and Python beside these."""
    if path in reading:
        raise SourceError(f"{path} includes itself")
    found = _loaded(path)
    folder = os.path.dirname(path)
    files = frozenset({path, *glob.glob(os.path.join(glob.escape(folder), "*.py"))})
    merged: dict[str, Any] = {}
    for included in _listed(found.pop("include", None)):
        settings, further = _settings(os.path.realpath(os.path.join(folder, included)), (*reading, path))
        merged.update(settings)
        files |= further
    return {**merged, **found}, files


def _loaded(path: str) -> dict[str, Any]:
    try:
        with open(path, "rb") as file:
            found = yaml.load(file, _Loader)
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise SourceError(f"the task file {path} can't be read: {' '.join(str(error).split())}") from error
    if not isinstance(found, dict):
        raise SourceError(f"the task file {path} holds no settings")
    return found


def _data_files(task: str, settings: Mapping[str, Any]) -> Iterator[str]:
    """The local files that a task reads its questions from, relative to the working directory as lm-eval has it."""
    source, wanted = settings.get("dataset_path"), settings.get("dataset_kwargs") or {}
    folder = wanted.get("data_dir") or ""
    patterns = wanted.get("data_files")
    named = patterns.values() if isinstance(patterns, dict) else [patterns]
    for pattern in (one for entry in named for one in _listed(entry)):
        path = os.path.join(folder, os.path.expanduser(pattern))
        if "://" in path:
            continue
        there = sorted(glob.glob(path, recursive=True))
        if not there and not _on_the_hub(source):
            raise SourceError(
                f"task '{task}': there is no data file {pattern!r}; lm-eval takes such paths relative to the working "
                f"directory, which is {os.getcwd()}"
            )
        yield from (one for one in there if os.path.isfile(one))
    if patterns is None:
        for local in (one for one in (source, folder) if one and os.path.isdir(one)):
            yield from sorted(str(path) for path in Path(local).rglob("*") if path.is_file())


def _on_the_hub(source: Any) -> bool:
    return isinstance(source, str) and "/" in source and not os.path.exists(source)


def _listed(value: Any) -> list[str]:
    return [] if value is None else [str(one) for one in value] if isinstance(value, list) else [str(value)]


def _similar(name: str, index: Mapping[str, Definition]) -> str:
    import difflib

    close = difflib.get_close_matches(name, index, 3, cutoff=0.6)
    if not close:
        return "'lm_eval ls tasks' lists what there is, and include_path adds a folder of your own."
    return f"did you mean {' or '.join(repr(one) for one in close)}?"


def _own_folder() -> str:
    found = importlib.util.find_spec("lm_eval")
    assert found is not None
    assert found.submodule_search_locations is not None
    return os.path.join(os.path.realpath(found.submodule_search_locations[0]), "tasks")


def _own_index() -> Mapping[str, Definition]:
    """What lm-eval itself defines."""
    folder = _own_folder()
    return _remembered_index(folder, version(), os.stat(folder).st_mtime_ns)


@functools.cache
def _remembered_index(folder: str, version: str, modified: int) -> Mapping[str, Definition]:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "coldpress" / "lm-eval"
    memory = cache / sha256(canonical_json([folder, version, modified]))
    try:
        found = json.loads(memory.read_bytes())
        return {name: Definition(path and os.path.join(folder, path), tuple(tagged)) for name, path, tagged in found}
    except (OSError, ValueError, TypeError):
        index = scan(folder)  # not remembered yet
    rows = [[name, one.path and os.path.relpath(one.path, folder), one.tagged] for name, one in index.items()]
    try:
        cache.mkdir(parents=True, exist_ok=True)
        temporary = cache / uuid.uuid4().hex
        temporary.write_bytes(canonical_json(rows))
        temporary.replace(memory)
    except OSError:
        return index  # no cache folder to write to: it is made again next time
    return index


def scan(folder: str) -> dict[str, Definition]:
    """All tasks, groups and tags that the YAML files of a folder define; of equal names the first file's counts."""
    index: dict[str, Definition] = {}
    tags: dict[str, set[str]] = {}
    read: dict[str, dict[str, Any]] = {}
    root = os.path.realpath(folder)
    for path in sorted(glob.glob(os.path.join(glob.escape(root), "**", "*.yaml"), recursive=True)):
        if _SKIPPED.isdisjoint(Path(path).parts):
            says = _said_in(path, read)
            name = says.get("group") if "class" not in says and "group" in says else says.get("task")
            if not isinstance(name, str) or name in index:
                continue
            index[name] = Definition(path)
            if "class" in says or "group" not in says:
                for tag in _listed(says.get("tag")):
                    tags.setdefault(tag, set()).add(name)
                    index.setdefault(tag, Definition(None))
    for tag, tagged in tags.items():
        if index[tag].path is None:
            index[tag] = Definition(None, tuple(sorted(tagged)))
    return index


def _said_in(path: str, read: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The keys of a YAML file, and of what it includes, that say what it defines; {} if it can't be read."""
    if path not in read:
        read[path] = {}  # for a file that includes itself
        try:
            text = Path(path).read_bytes()
            found: dict[str, Any] = {}
            for match in _KEYS.finditer(text):
                key = match.group(1).decode()
                value = match.group().split(b":", 1)[1]
                found[key] = "code" if key == "class" else yaml.load(b"a:" + value, _Loader)["a"]
        except (OSError, yaml.YAMLError, UnicodeDecodeError):
            return {}  # lm-eval leaves such files out, too
        merged: dict[str, Any] = {}
        for included in _listed(found.pop("include", None)):
            merged.update(_said_in(os.path.realpath(os.path.join(os.path.dirname(path), included)), read))
        read[path] = {**merged, **found}
    return read[path]
