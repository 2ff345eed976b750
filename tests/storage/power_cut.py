"""A disk that forgets: what a folder may hold after a power cut.

`RecordingOs` stands in for the `os` module and writes down every operation that changes a folder tree. `power_cuts`
then replays each prefix of them by the rules of POSIX: the bytes of a file last once the file is fsynced, a name in
a folder (new, changed or gone) lasts once the folder is fsynced, and of all else any part may be there.
"""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

Tree = dict[str, bytes]  # path -> content
Node = int | str | None  # a file's number, a folder's path, or nothing

CONTENTS: dict[str, Callable[[bytes], bytes]] = {
    "lost": lambda data: b"",
    "half": lambda data: data[: len(data) // 2],
    "zeros": lambda data: bytes(len(data)),
    "kept": lambda data: data,
}


class Fate(NamedTuple):
    """What becomes of that which was not synced: whether a name lasts, and which bytes of a file do."""

    name_lasts: Callable[[], bool]
    content: Callable[[bytes], bytes]


@dataclass(frozen=True)
class Write:
    file: int
    data: bytes


@dataclass(frozen=True)
class Names:
    """Names that change at once: (folder, name) is now this node."""

    changes: tuple[tuple[str, str, Node], ...]


@dataclass(frozen=True)
class SyncFile:
    file: int


@dataclass(frozen=True)
class SyncFolder:
    folder: str


Operation = Write | Names | SyncFile | SyncFolder


class RecordingOs:
    """The `os` module with a diary of what happens below `base`. fsync of what is in `forget` does nothing."""

    def __init__(self, base: Path, forget: Literal["", "files", "folders"] = "") -> None:
        self.operations: list[Operation] = []
        self.before = read_tree(base)
        self.folders_before = [str(path.relative_to(base)) for path in base.rglob("*") if path.is_dir()]
        self._base = base
        self._forget = forget
        self._files = {path: number for number, path in enumerate(self.before)}
        self._next = len(self._files)
        self._open: dict[int, int | str] = {}
        self._lock = threading.RLock()

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def open(self, path: str, flags: int, mode: int = 0o777) -> int:
        with self._lock:
            descriptor = os.open(path, flags, mode)
            here = self._relative(path)
            if os.path.isdir(path):
                self._open[descriptor] = here
            else:
                if here not in self._files:
                    self._files[here] = self._next
                    self._next += 1
                    self._names((here, self._files[here]))
                self._open[descriptor] = self._files[here]
            return descriptor

    def close(self, descriptor: int) -> None:
        with self._lock:
            self._open.pop(descriptor, None)
            os.close(descriptor)

    def write(self, descriptor: int, data: Any) -> int:
        with self._lock:
            count = os.write(descriptor, data)
            file = self._open[descriptor]
            assert isinstance(file, int)
            self.operations.append(Write(file, bytes(data)[:count]))
            return count

    def fsync(self, descriptor: int) -> None:
        with self._lock:
            node = self._open[descriptor]
            if isinstance(node, int) and self._forget != "files":
                self.operations.append(SyncFile(node))
            if isinstance(node, str) and self._forget != "folders":
                self.operations.append(SyncFolder(node))

    def link(self, source: str, target: str) -> None:
        with self._lock:
            os.link(source, target)
            here, there = self._relative(source), self._relative(target)
            self._files[there] = self._files[here]
            self._names((there, self._files[here]))

    def replace(self, source: str, target: str) -> None:
        with self._lock:
            os.replace(source, target)
            here, there = self._relative(source), self._relative(target)
            self._files[there] = self._files.pop(here)
            self._names((there, self._files[there]), (here, None))

    rename = replace

    def unlink(self, path: str) -> None:
        with self._lock:
            os.unlink(path)
            here = self._relative(path)
            del self._files[here]
            self._names((here, None))

    remove = unlink

    def mkdir(self, path: str, mode: int = 0o777) -> None:
        with self._lock:
            os.mkdir(path, mode)
            here = self._relative(path)
            self._names((here, here))

    def makedirs(self, path: str, mode: int = 0o777, exist_ok: bool = False) -> None:
        with self._lock:
            if os.path.isdir(path) and exist_ok:
                return
            if not os.path.isdir(os.path.dirname(path)):
                self.makedirs(os.path.dirname(path), mode, exist_ok)
            self.mkdir(path, mode)

    def _relative(self, path: str) -> str:
        return os.path.relpath(path, self._base)

    def _names(self, *changes: tuple[str, Node]) -> None:
        self.operations.append(Names(tuple((os.path.dirname(p) or ".", os.path.basename(p), n) for p, n in changes)))


def power_cuts(recording: RecordingOs) -> Iterator[Tree]:
    """Different trees that a power cut may leave, before the first operation, between any two, and after the last."""
    operations = range(len(recording.operations) + 1)
    yield from _different(_replay(recording, length, fate) for length in operations for fate in _fates(length, 3))


def late_power_cuts(recording: RecordingOs) -> Iterator[Tree]:
    """Different trees that a power cut after the last operation may leave."""
    length = len(recording.operations)
    yield from _different(_replay(recording, length, fate) for fate in _fates(length, 200))


def _different(trees: Iterable[Tree]) -> Iterator[Tree]:
    seen: set[frozenset[tuple[str, bytes]]] = set()
    for tree in trees:
        state = frozenset(tree.items())
        if state not in seen:
            seen.add(state)
            yield tree


def _fates(seed: int, throws: int) -> Iterator[Fate]:
    """The extremes, and some throws of the dice."""
    yield Fate(lambda: False, CONTENTS["lost"])
    for content in CONTENTS.values():
        yield Fate(lambda: True, content)
    dice = random.Random(seed)

    def any_content(data: bytes) -> bytes:
        return CONTENTS[dice.choice(["kept", "kept", "kept", "lost", "half", "zeros"])](data)

    for _ in range(throws):
        yield Fate(lambda: True, any_content)
        yield Fate(lambda: dice.random() < 0.5, any_content)


def undisturbed(recording: RecordingOs) -> Tree:
    """The tree when nothing is lost."""
    return _replay(recording, len(recording.operations), Fate(lambda: True, CONTENTS["kept"]))


def read_tree(base: Path) -> Tree:
    return {str(path.relative_to(base)): path.read_bytes() for path in sorted(base.rglob("*")) if path.is_file()}


def write_tree(tree: Tree, base: Path) -> None:
    for path, data in tree.items():
        (base / path).parent.mkdir(parents=True, exist_ok=True)
        (base / path).write_bytes(data)


def _replay(recording: RecordingOs, length: int, fate: Fate) -> Tree:
    lasting = dict(enumerate(recording.before.values()))
    written: dict[int, bytes] = {}
    names: dict[tuple[str, str], Node] = {}
    for number, path in enumerate(recording.before):
        names[os.path.dirname(path) or ".", os.path.basename(path)] = number
    for path in recording.folders_before:
        names[os.path.dirname(path) or ".", os.path.basename(path)] = path
    pending: list[tuple[str, str, Node]] = []

    for operation in recording.operations[:length]:
        match operation:
            case Write(file, data):
                written[file] = written.get(file, b"") + data
            case SyncFile(file):
                lasting[file] = lasting.get(file, b"") + written.pop(file, b"")
            case Names(changes):
                pending.extend(changes)
            case SyncFolder(folder):
                names.update({(where, name): node for where, name, node in pending if where == folder})
                pending = [change for change in pending if change[0] != folder]

    names.update({(where, name): node for where, name, node in pending if fate.name_lasts()})
    for file, data in sorted(written.items()):
        lasting[file] = lasting.get(file, b"") + fate.content(data)

    def below(folder: str) -> Iterator[tuple[str, bytes]]:
        for (where, name), node in names.items():
            if where != folder:
                continue
            if isinstance(node, str):
                yield from below(node)
            elif node is not None:
                yield os.path.normpath(os.path.join(where, name)), lasting.get(node, b"")

    return dict(below("."))
