"""How much smaller variants are than the model that they were made of: a pure function of a run's document."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def ratios(document: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """{variant: {"size": …, "memory": …}}: the root model's figure by the variant's, so 4.0 means a quarter.

    The root is the model at the beginning of the variant's branch; where that was not measured, or the variant not, a
    ratio is absent. "size" is of the bytes on disk; "memory" of the peak while loading and running, compared on equal
    hardware only: bytes allocated on a GPU, or on the CPU what the process took beyond what it held before loading.
    Evaluations with names of their own, "variant/name", are compared with "root/name".
    """
    roots = {stage["name"]: stage["root"] for stage in document["stages"]}
    metrics = document["metrics"]
    found: dict[str, dict[str, float]] = {}
    for name, mine in metrics.items():
        variant, _, further = name.rpartition("/") if name not in document["variants"] else (name, "", "")
        root = roots.get(variant)
        base = metrics.get(f"{root}/{further}" if further else root, {})
        of_it = {
            "size": _ratio(base.get("size_bytes"), mine.get("size_bytes")),
            "memory": _ratio(_memory(base), _memory(mine)) if _same_machine(base, mine) else None,
        }
        found[name] = {what: value for what, value in of_it.items() if value is not None}
    return found


def _same_machine(base: Mapping[str, Any], mine: Mapping[str, Any]) -> bool:
    return "hardware" in base and base["hardware"] == mine.get("hardware")


def _memory(metrics: Mapping[str, Any]) -> float | None:
    """Bytes that a model took: on the device, or beyond the interpreter and its libraries."""
    if "device_memory_bytes" in metrics:
        return float(metrics["device_memory_bytes"])
    whole, before = metrics.get("process_memory_bytes"), metrics.get("process_memory_before_bytes")
    return None if whole is None or before is None else float(whole - before)


def _ratio(base: float | None, mine: float | None) -> float | None:
    return base / mine if base and mine and mine > 0 else None
