"""GPTQ's checkpoint format: where each code lies, and that nothing is lost on the way there and back."""

from __future__ import annotations

import math

import plain_methods
import pytest
import torch
from coldpress.tasks.quantization.gptq_format import pack, pack_rows, unpack, unpack_all, unpack_rows
from coldpress.tasks.quantization.grid import Solution


def random_solution(bits: int, rows: int = 32, columns: int = 64, groups: int = 4) -> Solution:
    draw = torch.Generator().manual_seed(bits)
    return Solution(
        codes=torch.randint(0, 2**bits, (rows, columns), generator=draw).to(torch.uint8),
        scales=(torch.rand(groups, rows, generator=draw) + 0.1).half().float(),
        zeros=torch.randint(1, 2**bits, (groups, rows), generator=draw).to(torch.uint8),
        group_index=torch.randint(0, groups, (columns,), generator=draw).to(torch.int32),
    )


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_packed_codes_come_back_as_they_were(bits: int) -> None:
    codes = torch.randint(0, 2**bits, (64, 5), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    packed = pack_rows(codes, bits)
    assert packed.dtype == torch.int32
    assert packed.shape == (64 * bits // 32, 5)
    assert torch.equal(unpack_rows(packed, bits), codes)


def test_the_first_code_lies_in_the_lowest_bits() -> None:
    codes = torch.tensor([[1], [2], [3], [4], [5], [6], [7], [8]], dtype=torch.uint8)
    assert pack_rows(codes, 4).tolist() == [[0x87654321 - 2**32]]


def test_3_bit_codes_are_one_stream_of_bits_over_three_words() -> None:
    codes = torch.zeros(32, 3, dtype=torch.uint8)
    codes[10, 0] = 0b110  # its lower two bits end the first word, the third begins the second
    codes[21, 1] = 0b101  # its lowest bit ends the second word, the others begin the third
    codes[31, 2] = 0b100  # the highest bit of all
    assert pack_rows(codes, 3).T.tolist() == [[-(2**31), 1, 0], [0, -(2**31), 0b10], [0, 0, -(2**31)]]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_words_full_of_the_highest_code_are_minus_one(bits: int) -> None:
    words = bits // math.gcd(bits, 32)
    full = torch.full((32 * words // bits, 1), 2**bits - 1, dtype=torch.uint8)
    assert pack_rows(full, bits).tolist() == [[-1]] * words


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_packed_layers_have_the_shapes_and_dtypes_of_the_format(bits: int) -> None:
    packed = pack("model.layer", random_solution(bits), {"bits": bits})
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in packed.items()} == {
        "model.layer.qweight": (torch.int32, (64 * bits // 32, 32)),
        "model.layer.qzeros": (torch.int32, (4, 32 * bits // 32)),
        "model.layer.scales": (torch.float16, (4, 32)),
        "model.layer.g_idx": (torch.int32, (64,)),
    }


@pytest.mark.parametrize("checkpoint_format", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_unpacked_weights_are_codes_minus_zero_point_times_scale(bits: int, checkpoint_format: str) -> None:
    solution = random_solution(bits)
    settings = {"bits": bits, "checkpoint_format": checkpoint_format}
    packed = pack("layer", solution, settings)
    group = solution.group_index.long()
    expected = (solution.codes.float() - solution.zeros[group].T.float()) * solution.scales[group].T
    assert torch.equal(unpack(packed, "layer", settings, "cpu"), expected)
    offset = 1 if checkpoint_format == "gptq" else 0
    assert torch.equal(plain_methods.gptq_weight(packed, "layer", bits, offset), expected)


def test_a_zero_point_of_zero_survives_the_subtraction_of_one() -> None:
    solution = random_solution(4)._replace(zeros=torch.zeros(4, 32, dtype=torch.uint8))
    expected = solution.codes.float() * solution.scales[solution.group_index.long()].T
    assert torch.equal(unpack(pack("layer", solution, {"bits": 4}), "layer", {"bits": 4}, "cpu"), expected)


def test_all_packed_layers_among_other_tensors_are_unpacked_under_their_weights_names() -> None:
    four = {"bits": 4}
    tensors = {
        **pack("a", random_solution(4), four),
        **pack("b.c", random_solution(4, rows=8), four),
        "norm": torch.ones(3),
    }
    weights = unpack_all(tensors, four, "cpu")
    assert {name: tuple(weight.shape) for name, weight in weights.items()} == {
        "a.weight": (32, 64),
        "b.c.weight": (8, 64),
    }
