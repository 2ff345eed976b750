"""Tensors as bytes: the safetensors layout, with headers that we write ourselves.

A header of our own is deterministic: no metadata, keys in the order given, padded to 8 bytes. So equal tensors
are equal files, whatever they are called in a model.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

from .digests import Buffer
from .errors import DamagedBlob

if TYPE_CHECKING:
    import torch

BYTES_PER_ELEMENT = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip
_TORCH_NAMES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip
_FROM_TORCH = {name: code for code, name in _TORCH_NAMES.items()}


class TensorBytes(NamedTuple):
    """A tensor in safetensors terms: dtype code ("BF16"), shape, and its row-major little-endian bytes."""

    dtype: str
    shape: tuple[int, ...]
    data: Buffer


def tensor_nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor."""
    count = BYTES_PER_ELEMENT[dtype]
    for size in shape:
        count *= size
    return count


def encode_header(tensors: Mapping[str, tuple[str, tuple[int, ...]]], metadata: dict[str, str] | None = None) -> bytes:
    """The safetensors header for tensors {name: (dtype, shape)} laid one after the other."""
    header: dict[str, object] = {} if metadata is None else {"__metadata__": metadata}
    offset = 0
    for name, (dtype, shape) in tensors.items():
        end = offset + tensor_nbytes(dtype, shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def decode(data: memoryview, where: str) -> dict[str, TensorBytes]:
    """All tensors of a safetensors file, as views into `data`. Raises DamagedBlob."""
    try:
        (length,) = struct.unpack_from("<Q", data)
        header = json.loads(bytes(data[8 : 8 + length]))
        header.pop("__metadata__", None)
        body = data[8 + length :]
        tensors = {}
        for name, entry in header.items():
            start, end = entry["data_offsets"]
            shape = tuple(entry["shape"])
            if not 0 <= start <= end <= len(body) or end - start != tensor_nbytes(entry["dtype"], shape):
                raise ValueError(f"tensor {name} lies outside the file")
            tensors[name] = TensorBytes(entry["dtype"], shape, body[start:end])
        return tensors
    except (ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise DamagedBlob(f"{where} is not a valid safetensors file: {error}") from error


def dtype_code(dtype: torch.dtype) -> str:
    """ "BF16" for torch.bfloat16, and so on."""
    return _FROM_TORCH[str(dtype).removeprefix("torch.")]


def torch_dtype(code: str) -> torch.dtype:
    """torch.bfloat16 for "BF16", and so on."""
    import torch

    dtype = getattr(torch, _TORCH_NAMES[code])
    assert isinstance(dtype, torch.dtype)
    return dtype


def from_torch(tensor: torch.Tensor) -> TensorBytes:
    """A tensor's bytes; a view of its memory where it is contiguous and on the CPU."""
    import torch

    tensor = tensor.detach().contiguous().cpu()
    data = tensor.reshape(-1).view(torch.uint8).numpy().data
    return TensorBytes(dtype_code(tensor.dtype), tuple(tensor.shape), data)


def to_torch(tensor: TensorBytes) -> torch.Tensor:
    """The bytes as a CPU tensor that shares their memory."""
    import torch

    if not len(tensor.data):
        return torch.empty(tensor.shape, dtype=torch_dtype(tensor.dtype))
    return torch.frombuffer(tensor.data, dtype=torch_dtype(tensor.dtype)).reshape(tensor.shape)
