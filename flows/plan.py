"""What a run would do: for each node its key and whether its result is there; and whether the run can work at all.

Torch-free. `check_plan` collects every error that can be known before computing; `why` names what differs from the
nearest earlier run.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..storage.artifacts import Artifact
from ..storage.digests import digest_of
from ..storage.errors import ColdpressError
from ..storage.store import Action, Store
from ..tasks.architectures import block_count, family_of, linear_parameters
from ..tasks.sources.locate import check_model, peek_config
from ..tasks.sources.texts import check_text, text_bytes
from ..tasks.stage import ModelFacts, facts_of, preimage
from .document import Problem
from .recipe import Node, Recipe, RecipeError


@dataclass(frozen=True)
class Planned:
    """A node with what is known of it: state is "cached", "will run", or "undecided" until its inputs exist."""

    node: Node
    state: str
    key: str | None = None
    preimage: dict[str, Any] | None = None
    action: Action | None = None


def make_plan(recipe: Recipe, store: Store, device: str = "auto") -> dict[str, Planned]:
    """Node name -> plan, in the recipe's order. device: where it would run, which measurements have in their keys."""
    plan: dict[str, Planned] = {}
    for node in recipe.nodes:
        inputs: dict[str, Artifact] = {}
        for role, name in node.inputs.items():
            action = plan[name].action
            if action is not None:
                inputs[role] = action.artifact
        if len(inputs) < len(node.inputs):
            plan[node.name] = Planned(node, "undecided")
            continue
        image = preimage(node.stage, node.parameters, inputs, device)
        key = digest_of(image)
        action = store.lookup(node.stage.name, key)
        plan[node.name] = Planned(node, "cached" if action else "will run", key, image, action)
    return plan


def prepare(recipe: Recipe, store: Store, device: str = "auto") -> dict[str, Planned]:
    """The plan of a recipe that was checked against its sources and the store. Raises RecipeError."""
    problems = check_sources(recipe)
    if problems:
        raise RecipeError(recipe.path, problems)
    plan = make_plan(recipe, store, device)
    problems = check_models(plan, store)
    if problems:
        raise RecipeError(recipe.path, problems)
    return plan


def check_sources(recipe: Recipe) -> list[Problem]:
    """What is wrong with the files and ids that the recipe names."""
    problems = []
    for node in recipe.nodes:
        parameters: Any = node.parameters
        try:
            if node.stage.name == "source/model":
                check_model(parameters.source)
            elif node.stage.name == "source/tokens":
                check_text(parameters.source, parameters.split, of_records=parameters.of_records)
                size = None if parameters.padded else text_bytes(parameters.source, parameters.split)
                if size is not None and parameters.samples and size < parameters.samples * parameters.length:
                    raise ColdpressError(
                        f"{parameters.source} has {size} bytes, too few for {parameters.samples} windows of "
                        f"{parameters.length} tokens; lower samples or length, or give more text"
                    )
            if node.stage.content is not None:
                node.stage.content(parameters)
        except (ColdpressError, OSError) as error:
            what = {"source/model": f"model {node.label}", "source/tokens": f"data {node.label}"}
            evaluation = f"evaluation '{node.name.rpartition('/')[2]}'"  # once for all its variants
            problems.append(Problem(f"{what.get(node.stage.name, evaluation)}: {error}", node.line))
    return problems


def check_models(plan: Mapping[str, Planned], store: Store) -> list[Problem]:
    """Combinations that can't work: shapes against parameters, packed models or adapters where dense ones must be."""
    problems: list[Problem] = []
    facts: dict[str, ModelFacts | None] = {}
    for name, planned in plan.items():
        node = planned.node
        if node.stage.name == "source/model":
            facts[name] = _source_facts(planned, store, problems)
            continue
        if refusal := node.stage.refusal({role: plan[one].node.stage.output for role, one in node.inputs.items()}):
            problems.append(Problem(f"{node.label}: {refusal}", node.line))
            continue
        problems.extend(_padded_data(node, plan))
        given = facts.get(node.inputs.get("model", ""))
        if given is None:
            continue
        if given.format not in node.stage.accepts:
            problems.append(
                Problem(
                    f"{node.label}: {node.stage.name} needs an unquantized model, but '{node.inputs['model']}' is "
                    f"packed ({given.format}); take the model before it was quantized, or quantize last",
                    node.line,
                )
            )
            continue
        other = node.inputs.get("original") or node.inputs.get("teacher", "")
        known = replace(given, original=facts.get(other))
        found = [Problem(f"{node.label}: {error}", node.line) for error in node.stage.check(node.parameters, known)]
        problems.extend(found)
        if node.stage.output == "adapter":
            facts[name] = given  # of the checkpoint that it belongs to
        elif node.stage.output == "checkpoint" and not found:
            facts[name] = node.stage.after(node.parameters, given)
    return problems


def _padded_data(node: Node, plan: Mapping[str, Planned]) -> Iterator[Problem]:
    """Windows padded to one length where all tokens of a window are used."""
    for role, name in node.inputs.items():
        parameters: Any = plan[name].node.parameters
        if role == "calibration" and plan[name].node.stage.name == "source/tokens" and parameters.padded:
            yield Problem(
                f"{node.label}: {role} '{name}' are records or lines, padded to one length, which only training and "
                "evaluation can use; name a data entry of running text",
                node.line,
            )


def _source_facts(planned: Planned, store: Store, problems: list[Problem]) -> ModelFacts | None:
    parameters: Any = planned.node.parameters
    try:
        if planned.action is not None:
            return facts_of(store, planned.action.artifact)
        peeked = peek_config(parameters.source)
        if peeked is None:
            return None  # on the Hub: checked when it is loaded
        family_of(peeked)
    except ColdpressError as error:
        problems.append(Problem(f"model {planned.node.label}: {error}", planned.node.line))
        return None
    settings = peeked.get("quantization_config")
    return ModelFacts(peeked, settings.get("quant_method", "quantized") if settings else "dense")


BYTES_PER_WEIGHT = {"float32": 4, "bfloat16": 2, "float16": 2, "auto": 2}


def disk_need(plan: Mapping[str, Planned], store: Store) -> int:
    """Upper estimate of the bytes that computing the plan adds to the store: what is not cached and of some size."""
    total = 0
    sizes: dict[str, int] = {}
    for name, planned in plan.items():
        node = planned.node
        parameters: Any = node.parameters
        if node.stage.output == "adapter" and planned.action is None:
            total += _adapter_bytes(plan[node.root].node, parameters.rank)
            continue
        if node.stage.name == "source/model":
            if planned.action is not None:
                sizes[name] = store.manifest(planned.action.artifact).stored_bytes()
                continue
            peeked = peek_config(parameters.source)
            if peeked is None:
                continue
            embeddings = 2 * int(peeked["vocab_size"] or 0) * int(peeked["hidden_size"])
            weights = linear_parameters(peeked) + embeddings
            sizes[name] = weights * BYTES_PER_WEIGHT[parameters.dtype]
            total += sizes[name]
        elif planned.action is None:
            bits = node.stage.bits_written
            if bits is None and node.stage.output == "checkpoint":
                bits = 1 + getattr(parameters, "most_bits", 16)  # and a bit of mask
            total += int(sizes.get(node.root, 0) * (bits or 0) / 16)
    return total


def _adapter_bytes(source: Node, rank: int) -> int:
    """Bytes of an adapter of all linear layers of a model; 0 for one that is not known before it is downloaded."""
    parameters: Any = source.parameters
    config = peek_config(parameters.source)
    if config is None:
        return 0
    a_block = sum(rank * (rows + columns) for rows, columns in family_of(config).linear_weights(config).values())
    return a_block * block_count(config) * BYTES_PER_WEIGHT[parameters.dtype]


def check_disk(plan: Mapping[str, Planned], store: Store) -> None:
    """Raises ColdpressError when the store's disk can't hold what the plan would write."""
    free = store.files.free_bytes()
    if free is None or all(planned.action for planned in plan.values()):
        return
    need = disk_need(plan, store)
    if need > free:
        raise ColdpressError(
            f"the run would write about {need / 1e9:.1f} GB to {store.url}, where {free / 1e9:.1f} GB are free; "
            "free some space, or put the store elsewhere (--store or COLDPRESS_STORE)"
        )


@dataclass(frozen=True)
class Difference:
    """One field in which two pre-images differ; None where a side lacks it."""

    field: str
    now: Any
    then: Any


def nearest_action(store: Store, stage: str, image: Mapping[str, Any]) -> tuple[Action, list[Difference]] | None:
    """The recorded action of a stage whose pre-image differs least from `image`, the most recent of equals."""
    best: tuple[tuple[int, float], Action, list[Difference]] | None = None
    for action in store.actions(stage):
        differences = compare(image, action.preimage)
        rank = (len(differences), -_started(action))
        if best is None or rank < best[0]:
            best = (rank, action, differences)
    return None if best is None else (best[1], best[2])


def _started(action: Action) -> float:
    text = action.provenance.get("started")
    return time.mktime(time.strptime(text, "%Y-%m-%dT%H:%M:%SZ")) if text else 0.0


def compare(now: Mapping[str, Any], then: Mapping[str, Any]) -> list[Difference]:
    """Fields, like `parameters.sparsity`, in which two pre-images differ."""
    mine, theirs = dict(_flat(now)), dict(_flat(then))
    return [
        Difference(field, mine.get(field), theirs.get(field))
        for field in sorted(mine.keys() | theirs.keys())
        if mine.get(field) != theirs.get(field)
    ]


def _flat(value: Any, prefix: str = "") -> list[tuple[str, Any]]:
    if isinstance(value, Mapping):
        return [
            pair for key, entry in value.items() for pair in _flat(entry, f"{prefix}.{key}" if prefix else str(key))
        ]
    return [(prefix, value)]
