"""The format of compressed-tensors, "pack-quantized", which vLLM and llm-compressor share: written by export alone.

Checkpoints in GPTQ's or AWQ's format are converted tensor by tensor, codes and scales as they are. For a weight
[out_features, in_features] `x.weight` the tensors are
`x.weight_packed` int32 [out_features, in_features * bits / 32], codes packed along the inputs, the first in the lowest
bits, one stream of bits in each row: GPTQ's `qweight`, transposed;
`x.weight_scale` float16 [out_features, groups]; `x.weight_shape` int64 [2], the weight's;
`x.weight_zero_point` int32 [out_features * bits / 32, groups], zero points packed along the outputs, of asymmetric
grids only; symmetric ones have theirs at 2^(bits-1). Groups are consecutive inputs: the `g_idx` that older versions of
the format had is gone.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...storage.artifacts import Artifact, ArtifactReader, Manifest
from ...storage.digests import Buffer
from ...storage.errors import ColdpressError
from ...storage.export import Contents, Part, Read, stored_part
from ...storage.store import Store
from ...storage.tensors import from_torch, to_torch
from ..architectures import block_count, family_of
from ..stage import json_file
from . import awq_format
from .awq_format import unpack_columns
from .gptq_format import PARTS, pack_rows
from .precision import Precision, precision_of

NAME = "compressed-tensors"


def contents(store: Store, artifact: Artifact) -> Contents:
    """The folder of a quantized checkpoint in this format, for `export`.

    Tensors are converted as they are written, one at a time. Raises ColdpressError, before anything is written, for
    what the format cannot express.
    """
    manifest = store.manifest(artifact)
    if problem := _refusal(artifact, manifest):
        raise ColdpressError(problem)
    quantization = manifest.quantization or {}
    modules = sorted(name.removesuffix(".qweight") for name in manifest.tensors if name.endswith(".qweight"))
    with ArtifactReader(store, manifest) as reader:
        config = json.loads(reader.file("config.json"))
        if quantization.get("desc_act"):
            for module in modules:
                name = f"{module}.g_idx"
                _check_order(module, reader.tensors([name])[name], _precision(quantization, module).group_size)
    packed = {f"{module}.{part}" for module in modules for part in PARTS}
    tensors = {name: stored_part(manifest, name) for name in manifest.tensors if name not in packed}
    for module in modules:
        tensors.update(_parts(manifest, module))
    family = family_of(config)
    linears = {
        family.block_prefix(index) + linear.name for index in range(block_count(config)) for linear in family.linears
    }
    outside = {name for name, part in tensors.items() if len(part.shape) == 2 and family.block_of(name) is None}
    dense = {name.removesuffix(".weight") for name in outside} | linears - set(modules)
    settings = quantization_config(quantization, modules, dense)
    files: dict[str, str | bytes] = {n: blob for n, blob in manifest.files.items() if n != "quantize_config.json"}
    files["config.json"] = json_file({**config, "quantization_config": settings})
    return Contents("checkpoint", tensors, files)


def quantization_config(
    quantization: Mapping[str, Any], modules: Iterable[str], dense: Iterable[str]
) -> dict[str, Any]:
    """What goes into config.json under `quantization_config`. modules: the quantized ones; dense: the others."""
    several = {precision for module in modules if (precision := precision_of(quantization, module))}
    if len(several) != 1:
        raise ColdpressError(
            f"the layers have several bit widths or group sizes, and transformers reads {NAME} by those of the first "
            "alone; export the checkpoint as it is stored"
        )
    (precision,) = several
    whole_rows = precision.group_size == -1
    weights = {
        "type": "int",
        "num_bits": precision.bits,
        "symmetric": _symmetric(quantization),
        "strategy": "channel" if whole_rows else "group",
        "group_size": None if whole_rows else precision.group_size,
        "dynamic": False,
    }
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {
        "quant_method": NAME,
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": sorted({"lm_head", *dense}),  # a tied head is a linear layer too, whose weight no file has
    }


def _refusal(artifact: Artifact, manifest: Manifest) -> str | None:
    """Why an artifact can't be written in this format, as far as its manifest says."""
    if artifact.kind != "checkpoint":
        return (
            f"{NAME} is a format of checkpoints, and this is of the kind '{artifact.kind}'; export it as it is stored"
        )
    if manifest.format in ("gptq", "awq"):
        return None
    if manifest.format == "dense" and manifest.masks:
        return (
            f"{NAME} has no format for pruned dense weights since version 0.15, which took sparse-bitmask and "
            "sparse-24-bitmask out; export it as it is stored, or quantize it with rtn, gptq or awq first"
        )
    holds = "is dense" if manifest.format == "dense" else f"is in the format {manifest.format}, which it can't express"
    return f"{NAME} holds what rtn, gptq and awq quantized, and this checkpoint {holds}; export it as it is stored"


def _check_order(module: str, group_index: Tensor, group_size: int) -> None:
    columns = len(group_index)
    size = columns if group_size == -1 else group_size
    if not torch.equal(group_index, torch.arange(columns, dtype=torch.int32) // size):
        raise ColdpressError(
            f"the groups of {module} are in the order of activations (act_order), which {NAME} no longer has a place "
            "for; quantize with static_groups: true besides, or with act_order: false"
        )


def _precision(quantization: Mapping[str, Any], module: str) -> Precision:
    """Of a quantized module."""
    precision = precision_of(quantization, module)
    assert precision is not None
    return precision


def _symmetric(quantization: Mapping[str, Any]) -> bool:
    return bool(quantization.get("sym", False))  # AWQ's own format doesn't say: it is always asymmetric


def _parts(manifest: Manifest, module: str) -> dict[str, Part]:
    """The tensors of a layer by their names in the folder."""
    quantization = manifest.quantization or {}
    bits = _precision(quantization, module).bits
    groups, rows = manifest.tensors[f"{module}.scales"].shape
    first = manifest.tensors[f"{module}.qweight"].shape[0]
    awq = manifest.format == "awq"  # packed along the outputs; GPTQ's format packs along the inputs
    columns = first if awq else first * 32 // bits

    def part(dtype: str, shape: tuple[int, ...], change: Callable[[Tensor], Tensor], source: str) -> Part:
        return Part(dtype, shape, partial(_converted, change, f"{module}.{source}"))

    scale_dtype = manifest.tensors[f"{module}.scales"].dtype
    parts = {
        "weight_packed": part("I32", (rows, columns * bits // 32), _awq_codes if awq else _transposed, "qweight"),
        "weight_scale": part(scale_dtype, (rows, groups), _transposed, "scales"),
        "weight_shape": Part("I64", (2,), lambda read: from_torch(torch.tensor([rows, columns])).data),
    }
    if not _symmetric(quantization):
        # GPTQ's format in its version 2, in which asymmetric grids are stored: zero points as they are, not less one.
        assert awq or quantization["checkpoint_format"] == "gptq_v2"
        zeros = _awq_zeros if awq else _transposed
        parts["weight_zero_point"] = part("I32", (rows * bits // 32, groups), zeros, "qzeros")
    return {f"{module}.{name}": one for name, one in parts.items()}


def _converted(change: Callable[[Tensor], Tensor], name: str, read: Read) -> Buffer:
    return from_torch(change(to_torch(read(name)))).data


def _transposed(tensor: Tensor) -> Tensor:
    return tensor.T


def _awq_codes(qweight: Tensor) -> Tensor:
    """[in_features, out_features / 8] to [out_features, in_features / 8]."""
    return pack_rows(unpack_columns(qweight), awq_format.BITS).T


def _awq_zeros(qzeros: Tensor) -> Tensor:
    """[groups, out_features / 8] to [out_features / 8, groups]."""
    return pack_rows(unpack_columns(qzeros).T, awq_format.BITS)
