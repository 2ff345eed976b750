"""`matrix:` expanded: a stage over lists of values, and whatever takes it fans out with it.

A node made from a matrix is called `pruned[sparsity=0.5]`; what follows it carries its coordinates along:
`gptq[sparsity=0.5]`. A stage with several inputs from one matrix joins those of equal coordinates.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

# ((stage, parameter), value) pairs, in the order in which the stages stand in the recipe.
Coordinates = tuple[tuple[tuple[str, str], Any], ...]


class Instance(NamedTuple):
    """One node of a recipe entry, and where it stands in the matrices above it."""

    name: str
    coordinates: Coordinates


class Joined(NamedTuple):
    """A new instance, and the names of the inputs chosen for it."""

    instance: Instance
    chosen: tuple[str, ...]


def expand_matrix(matrix: Mapping[str, Sequence[Any]]) -> Iterator[tuple[tuple[str, Any], ...]]:
    """Every combination of values, as (parameter, value) pairs; one empty combination for an empty matrix."""
    for values in itertools.product(*([_frozen(value) for value in axis] for axis in matrix.values())):
        yield tuple(zip(matrix, values, strict=True))


class _Frozen(dict[str, Any]):
    """A mapping of frozen values that nobody changes, so that it can be looked up."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(frozenset(self.items()))


def _frozen(value: Any) -> Any:
    """Lists as tuples, which can be looked up, and mappings so that they can."""
    if isinstance(value, dict):
        return _Frozen({key: _frozen(one) for key, one in value.items()})
    return tuple(_frozen(one) for one in value) if isinstance(value, list) else value


def join_instances(
    name: str, inputs: Sequence[Sequence[Instance]], values: tuple[tuple[str, Any], ...]
) -> Iterator[Joined]:
    """The nodes of stage `name` for one combination of its own matrix and every fitting choice of inputs."""
    for choice in itertools.product(*inputs):
        coordinates: dict[tuple[str, str], Any] = {}
        fits = True
        for instance in choice:
            for axis, value in instance.coordinates:
                fits &= coordinates.setdefault(axis, value) == value
        if not fits:
            continue
        for parameter, value in values:
            coordinates[(name, parameter)] = value
        found = tuple(coordinates.items())
        yield Joined(Instance(name + _suffix(found), found), tuple(instance.name for instance in choice))


def _suffix(coordinates: Coordinates) -> str:
    if not coordinates:
        return ""
    parameters = [parameter for (_, parameter), _ in coordinates]
    parts = [
        f"{parameter if parameters.count(parameter) == 1 else f'{stage}.{parameter}'}={_written(value)}"
        for (stage, parameter), value in coordinates
    ]
    return f"[{','.join(parts)}]"


def _written(value: Any) -> str:
    if isinstance(value, dict):
        return ",".join(f"{key}:{_written(one)}" for key, one in value.items())
    return "+".join(_written(one) for one in value) if isinstance(value, tuple) else str(value)
