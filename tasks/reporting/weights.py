"""How far two checkpoints' weights are apart, block by block, on the dense weights that the stored bytes stand for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...storage.artifacts import Artifact
from ..blocks import StoredModel
from ..stage import Run


def structure(first: StoredModel, second: StoredModel) -> list[str]:
    """Sentences on what makes two models incomparable weight by weight; none if all their linear layers match."""
    said = []
    if (ours := first.config["model_type"]) != (theirs := second.config["model_type"]):
        said.append(f"A is a {ours}, B a {theirs}")
    if first.blocks != second.blocks:
        said.append(f"A has {first.blocks} blocks, B {second.blocks}")
    a, b = first.linear_shapes(0), second.linear_shapes(0)
    said += [
        f"{name} is {list(a[name])} in A, {list(b[name])} in B (in every block)"
        for name in a
        if name in b and a[name] != b[name]
    ]
    return said


def compare_weights(run: Run, first: Artifact, second: Artifact) -> tuple[list[str], dict[str, Any] | None]:
    """(differences in structure, differences of weights), the latter None where the former leave nothing to compare.

    Of each tensor that both have: difference is |B - A| / |A| in Frobenius norms, in float32 summed in float64 (by |B|
    where A is zero); zeros_a and zeros_b are shares of exact zeros. {difference over all tensors, equal: how many are
    equal, layers: [{name, difference, zeros_a, zeros_b}], the most different first}. Two blocks are held at once.
    """
    with StoredModel(run, first) as a, StoredModel(run, second) as b:
        said = structure(a, b)
        if said:
            return said, None
        layers: list[dict[str, Any]] = []
        apart = whole = 0.0
        for index in (None, *range(a.blocks)):
            ours, theirs = _dense(a, index), _dense(b, index)
            for name in ours.keys() & theirs.keys():
                if ours[name].shape != theirs[name].shape:
                    said.append(f"{name} is {list(ours[name].shape)} in A, {list(theirs[name].shape)} in B")
                    continue
                between, norm = _norm(theirs[name] - ours[name]), _norm(ours[name])
                apart, whole = apart + between**2, whole + norm**2
                layers.append(
                    {
                        "name": name,
                        "difference": between / (norm or _norm(theirs[name]) or 1.0),
                        "zeros_a": _zeros(ours[name]),
                        "zeros_b": _zeros(theirs[name]),
                    }
                )
            for label, names in (("A", ours.keys() - theirs.keys()), ("B", theirs.keys() - ours.keys())):
                said.extend(f"only {label} has {name}" for name in sorted(names))
            run.progress("comparing", 0 if index is None else index + 1, a.blocks)
    layers.sort(key=lambda layer: (-layer["difference"], layer["name"]))
    equal = sum(layer["difference"] == 0 for layer in layers)
    return said, {"difference": (apart / whole) ** 0.5 if whole else 0.0, "equal": equal, "layers": layers}


def _dense(model: StoredModel, index: int | None) -> dict[str, Tensor]:
    if index is None:
        return model.outer(torch.float32)
    model.prefetch(index + 1)
    return model.unpack(model.stored(index), torch.float32)


def _norm(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64))


def _zeros(tensor: Tensor) -> float:
    return 1 - int(torch.count_nonzero(tensor)) / tensor.numel()
