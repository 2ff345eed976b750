"""What two artifacts differ in: their weights, what was measured of both, and how they were made."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ..storage.artifacts import Artifact
from ..storage.errors import ColdpressError
from ..storage.store import Action, Store
from ..tasks.reporting.significance import Items, compare_all, words
from .plan import compare
from .result import read_items

_COMPARABLE = ("checkpoint", "adapter")


def compare_artifacts(
    store: Store, first: Artifact, second: Artifact, progress: Callable[[str, int, int], None] = lambda *_: None
) -> dict[str, Any]:
    """{a, b, identical, structure, weights, metrics, origin}; an adapter stands for its checkpoint with it.

    Raises ColdpressError for kinds without weights.
    """
    for artifact in (first, second):
        if artifact.kind not in _COMPARABLE:
            raise ColdpressError(
                f"artifact {artifact.short} is {artifact.kind}; compare takes checkpoints and adapters; "
                "`coldpress show` shows any"
            )
    structure: list[str] = []
    weights: dict[str, Any] | None = None
    if first != second:
        from ..tasks.reporting.weights import compare_weights
        from ..tasks.stage import Run

        structure, weights = compare_weights(Run(store, progress=progress), first, second)
    return {
        "a": {"kind": first.kind, "artifact": first.id},
        "b": {"kind": second.kind, "artifact": second.id},
        "identical": first == second,
        "structure": structure,
        "weights": weights,
        "metrics": list(_metrics(store, first, second)) if first != second else [],
        "origin": list(_origin(store, first, second)) if first != second else [],
    }


def _metrics(store: Store, first: Artifact, second: Artifact) -> Iterator[dict[str, Any]]:
    """What was measured of both in the same way and differs, or was measured item by item."""
    ours, theirs = _evaluations(store, first), _evaluations(store, second)
    shared = {way: json.loads(way) for way in ours if way in theirs}
    settings = _settings(store, shared)
    for way, preimage in shared.items():
        stage = preimage["stage"]
        before, after = _read(store, ours[way]), _read(store, theirs[way])
        items = [
            Items(side, metric, way, values)
            for side, by, metrics in (("B", theirs[way], after), ("A", ours[way], before))
            for metric, values in read_items(store, by.artifact, metrics).items()
        ]
        intervals = compare_all(items, {"B": ["A"]})["differences"].get("B", {})
        for metric in before:
            a, b = before[metric], after.get(metric)
            if not isinstance(a, int | float) or not isinstance(b, int | float) or (a == b and metric not in intervals):
                continue
            entry = {"evaluation": stage, "metric": metric, "with": settings[way], "a": a, "b": b, "change": b - a}
            if metric in intervals:
                entry |= {"interval": intervals[metric], "words": words(intervals[metric])}
            yield entry


def _evaluations(store: Store, model: Artifact) -> dict[str, Action]:
    """{how it was measured: action} of the evaluations of a model; the pre-image without the model says how."""
    found = {}
    for action in store.actions("evaluate"):
        if action.preimage["inputs"].get("model") == model.id and store.holds(action.artifact):
            others = {role: one for role, one in action.preimage["inputs"].items() if role != "model"}
            found[json.dumps({**action.preimage, "inputs": others}, sort_keys=True)] = action
    return found


def _settings(store: Store, ways: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """What tells each way of measuring from others by the same stage: its parameters, and what its data came of."""
    made, fields = _made(store), {}
    for way, preimage in ways.items():
        fields[way] = dict(preimage["parameters"])
        for role, artifact in preimage["inputs"].items():
            source = {"artifact": artifact[:12]}
            if artifact in made:
                content = {name: digest[:12] for name, digest in made[artifact].preimage.get("content", {}).items()}
                source = {**made[artifact].preimage["parameters"], **content}
            fields[way] |= {f"{role} {name}": value for name, value in source.items()}
    settings = {}
    for way, preimage in ways.items():
        rivals = [fields[other] for other in ways if ways[other]["stage"] == preimage["stage"]]
        names = sorted({name for rival in rivals for name in rival})
        telling = [name for name in names if any(rival.get(name) != rivals[0].get(name) for rival in rivals)]
        settings[way] = ", ".join(f"{name} {_value(fields[way].get(name))}" for name in telling)
    return settings


def _made(store: Store) -> dict[str, Action]:
    """{artifact id: the first action that made it}."""
    made: dict[str, Action] = {}
    for action in sorted(store.actions(), key=lambda action: str(action.provenance.get("started", ""))):
        made.setdefault(action.artifact.id, action)
    return made


def _read(store: Store, action: Action) -> dict[str, Any]:
    metrics = json.loads(store.read_file(action.artifact, "metrics.json"))
    assert isinstance(metrics, dict)
    return metrics


def _origin(store: Store, first: Artifact, second: Artifact) -> Iterator[str]:
    """Lines on how they were made: what both come from, and from there on what was done otherwise."""
    made = _made(store)
    ours, theirs = _chain(made, first), _chain(made, second)
    shared = 0
    while shared < min(len(ours), len(theirs)) and ours[shared].artifact == theirs[shared].artifact:
        shared += 1
    if shared:
        yield f"both come from {_named(ours[shared - 1])}, artifact {ours[shared - 1].artifact.short}"
    for number in range(shared, max(len(ours), len(theirs))):
        a = ours[number] if number < len(ours) else None
        b = theirs[number] if number < len(theirs) else None
        if a is not None and b is not None and a.stage == b.stage:
            lines = list(_fields(made, a, b, ""))
            yield f"both: {a.stage}, with " + ("; ".join(lines) if lines else "the same parameters, on other weights")
        else:
            for side, one in (("A", a), ("B", b)):
                if one is not None:
                    yield f"{side}: {_named(one)}"
    if ours and theirs:
        for what in ("device", "versions"):
            for difference in compare({what: ours[-1].provenance.get(what)}, {what: theirs[-1].provenance.get(what)}):
                yield f"made with {difference.field}: {difference.now} in A, {difference.then} in B"


def _chain(made: Mapping[str, Action], artifact: Artifact) -> list[Action]:
    """The actions that led to an artifact, from the model's source on; those that gc has left of them."""
    chain: list[Action] = []
    action: Action | None = made.get(artifact.id)
    while action is not None and action not in chain:
        chain.append(action)
        action = made.get(action.preimage["inputs"].get("model", ""))
    return chain[::-1]


def _fields(made: Mapping[str, Action], a: Action, b: Action, prefix: str) -> Iterator[str]:
    """What differs in how two artifacts were made by the same stage, and in how their data were."""
    for difference in compare(a.preimage, b.preimage):
        role = difference.field.removeprefix("inputs.")
        if difference.field == "inputs.model" or difference.field == "stage":
            continue
        if role != difference.field:
            one, other = (made.get(str(side)) for side in (difference.now, difference.then))
            if one is not None and other is not None and one.stage == other.stage:
                yield from _fields(made, one, other, f"{prefix}{role}: ")
                continue
        yield f"{prefix}{difference.field} {_value(difference.now)} in A, {_value(difference.then)} in B"


def _named(action: Action) -> str:
    parameters = ", ".join(f"{name} {_value(value)}" for name, value in action.preimage["parameters"].items())
    return f"{action.stage} ({parameters})" if parameters else action.stage


def _value(value: Any) -> str:
    return "(default)" if value is None else value if isinstance(value, str) else json.dumps(value)
