"""Tensors as bytes in the safetensors layout."""

from __future__ import annotations

import json
import struct

import pytest
import safetensors
import safetensors.torch
import torch
from coldpress.storage.errors import DamagedBlob
from coldpress.storage.tensors import (
    BYTES_PER_ELEMENT,
    TensorBytes,
    decode,
    dtype_code,
    encode_header,
    from_torch,
    tensor_nbytes,
    to_torch,
    torch_dtype,
)
from hypothesis import given, settings
from hypothesis import strategies as st

CODES = sorted(BYTES_PER_ELEMENT)
SHAPES = st.lists(st.integers(0, 4), max_size=3).map(tuple)
NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(
    lambda name: name != "__metadata__"
)


@st.composite
def tensor_bytes(draw: st.DrawFn) -> TensorBytes:
    dtype, shape = draw(st.sampled_from(CODES)), draw(SHAPES)
    size = tensor_nbytes(dtype, shape)
    return TensorBytes(dtype, shape, draw(st.binary(min_size=size, max_size=size)))


TENSORS = st.dictionaries(NAMES, tensor_bytes(), max_size=5)


def encode(tensors: dict[str, TensorBytes]) -> bytes:
    """A whole file."""
    header = encode_header({name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()})
    return header + b"".join(tensor.data for tensor in tensors.values())


@settings(deadline=None)
@given(TENSORS)
def test_what_is_encoded_is_decoded_to_the_same_tensors(tensors: dict[str, TensorBytes]) -> None:
    assert decode(memoryview(encode(tensors)), "here") == tensors


@settings(deadline=None)
@given(TENSORS)
def test_the_safetensors_library_reads_the_same_from_our_files(tensors: dict[str, TensorBytes]) -> None:
    theirs = {
        name: TensorBytes(entry["dtype"], tuple(entry["shape"]), bytes(entry["data"]))
        for name, entry in safetensors.deserialize(encode(tensors))
    }
    assert theirs == tensors


@settings(deadline=None)
@given(TENSORS)
def test_a_header_ends_on_a_multiple_of_eight_bytes(tensors: dict[str, TensorBytes]) -> None:
    header = encode_header({name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()})
    assert len(header) % 8 == 0
    assert struct.unpack_from("<Q", header) == (len(header) - 8,)


def test_a_header_is_pinned_to_the_byte() -> None:
    text = b'{"tensor":{"dtype":"BF16","shape":[2,3],"data_offsets":[0,12]}} '
    assert encode_header({"tensor": ("BF16", (2, 3))}) == struct.pack("<Q", 64) + text


def test_a_file_of_the_safetensors_library_is_decoded_without_its_metadata() -> None:
    weight = torch.arange(6, dtype=torch.float32).reshape(2, 3)
    data = safetensors.torch.save({"weight": weight}, metadata={"format": "pt"})
    decoded = decode(memoryview(bytearray(data)), "here")
    assert list(decoded) == ["weight"]
    assert torch.equal(to_torch(decoded["weight"]), weight)


def test_decoded_tensors_are_views_and_no_copies() -> None:
    file = bytearray(encode({"a": TensorBytes("U8", (3,), b"abc")}))
    decoded = decode(memoryview(file), "here")
    file[-1:] = b"z"
    assert bytes(decoded["a"].data) == b"abz"


@settings(deadline=None)
@given(st.binary(max_size=64))
def test_bytes_that_are_no_safetensors_file_are_called_damaged(data: bytes) -> None:
    with pytest.raises(DamagedBlob, match="here is not a valid safetensors file"):
        decode(memoryview(data), "here")


@settings(deadline=None, max_examples=300)
@given(TENSORS, st.data())
def test_a_damaged_header_is_found_or_points_into_the_file(
    tensors: dict[str, TensorBytes], data: st.DataObject
) -> None:
    file = bytearray(encode(tensors))
    file[data.draw(st.integers(0, len(file) - 1))] = data.draw(st.integers(0, 255))
    try:
        decoded = decode(memoryview(file), "here")
    except DamagedBlob:
        return
    for tensor in decoded.values():
        assert len(tensor.data) == tensor_nbytes(tensor.dtype, tensor.shape)


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]},
        {"dtype": "F32", "shape": [2], "data_offsets": [-4, 4]},
        {"dtype": "F33", "shape": [2], "data_offsets": [0, 8]},
        {"dtype": "F32", "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [2], "data_offsets": [0]},
        {"dtype": "F32", "shape": 2, "data_offsets": [0, 8]},
        "F32",
    ],
    ids=["too short", "beyond the end", "before the start", "dtype", "no shape", "one offset", "bare shape", "string"],
)
def test_a_header_entry_that_does_not_fit_its_file_is_called_damaged(entry: object) -> None:
    text = json.dumps({"a": entry}).encode()
    file = struct.pack("<Q", len(text)) + text + bytes(8)
    with pytest.raises(DamagedBlob, match="here is not a valid safetensors file"):
        decode(memoryview(file), "here")


@pytest.mark.parametrize("code", CODES)
def test_dtypes_have_the_size_and_name_that_torch_gives_them(code: str) -> None:
    assert dtype_code(torch_dtype(code)) == code
    assert torch_dtype(code).itemsize == BYTES_PER_ELEMENT[code]


@pytest.mark.parametrize("shape", [(), (5,), (3, 4), (2, 0, 3), (0,)], ids=str)
@pytest.mark.parametrize("code", CODES)
def test_a_tensor_goes_to_bytes_and_back_bit_for_bit(code: str, shape: tuple[int, ...]) -> None:
    noise = bytes(range(1, 1 + tensor_nbytes(code, shape)))
    noise = bytes(byte & 1 for byte in noise) if code == "BOOL" else noise
    tensor = to_torch(TensorBytes(code, shape, bytearray(noise)))
    assert (tensor.dtype, tuple(tensor.shape)) == (torch_dtype(code), shape)
    assert from_torch(tensor) == TensorBytes(code, shape, noise)


def test_nan_and_negative_zero_keep_their_bits() -> None:
    bits = torch.tensor([0x7FC00001, -0x400000, -0x80000000], dtype=torch.int32)
    there_and_back = to_torch(from_torch(bits.view(torch.float32)))
    assert torch.equal(there_and_back.view(torch.int32), bits)


def test_a_transposed_or_sliced_tensor_is_stored_in_row_major_order() -> None:
    tensor = torch.arange(24, dtype=torch.int32).reshape(4, 6)
    for view in (tensor.T, tensor[:, 1:3], tensor[::2], tensor[0].expand(3, 6)):
        assert bytes(from_torch(view).data) == view.contiguous().numpy().tobytes()


def test_a_parameter_that_takes_gradients_can_be_stored() -> None:
    parameter = torch.nn.Parameter(torch.ones(2, 3))
    assert torch.equal(to_torch(from_torch(parameter)), torch.ones(2, 3))


def test_a_tensor_behind_one_of_odd_length_is_read_right() -> None:
    tensors = {"odd": torch.tensor([1, 2, 3], dtype=torch.uint8), "after": torch.tensor([0.5, -2.0])}
    file = encode({name: from_torch(tensor) for name, tensor in tensors.items()})
    ours = {name: to_torch(tensor) for name, tensor in decode(memoryview(bytearray(file)), "here").items()}
    theirs = safetensors.torch.load(file)
    for name, tensor in tensors.items():
        assert torch.equal(ours[name], tensor)
        assert torch.equal(theirs[name], tensor)
