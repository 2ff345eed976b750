"""Layer recipes: in which order the blocks of a model run, some not at all, some more than once.

`CONFIGURATIONS` are the 25 that the study Franken-LLaMA tried on Llama 2 7B chat. Where its
documentation and its code differ, the order is what its code ran, except "skip_every_2_layers_r2", which ran its blocks
once. "0_7_15_23_31" runs nine blocks, whatever its name says.
"""

from __future__ import annotations

import re

CONFIGURED_BLOCKS = 32

CONFIGURATIONS = {
    "baseline": "0-31",
    "0-7": "0-7",
    "23-31r3": "23-31x3",
    "0_7_15_23_31": "0 3 7 11 15 19 23 27 31",
    "11-19": "11-19",
    "15r3_23r3_31r3": "15x3 23x3 31x3",
    "0-3_28-31": "0-3 28-31",
    "0-7r3": "0-7x3",
    "9-19r2": "9-19x2",
    "27-31r5": "27-31x5",
    "0_7r2_15r2_23r2_31r2": "0x2 7x2 15x2 23x2 31x2",
    "0-23_27-31": "0-23 27-31",
    "15_single_skip": "0-14 16-31",
    "all_except_last_two": "30-31",
    "only_even_layers": "0 2 4 6 8 10 12 14 16 18 20 22 24 26 28 30",
    "only_odd_layers": "1 3 5 7 9 11 13 15 17 19 21 23 25 27 29 31",
    "first_last_8r2": "0-7x2 24-31x2",
    "first_last_2_with_skips": "0x2 1-14 17-23 26-30 31x2",
    "mid_expansion_with_repeats": "0-5 10-13 14-18x2 19-24 29-31",
    "2_3rd_of_llama": "0-10 21-31",
    "2_3rds_plus_llama": "0-10 12 14 16 18 20-31",
    "skip_every_2_layers": "0 3 6 9 12 15 18 21 24 27 30",
    "skip_every_2_layers_r2": "0x2 3x2 6x2 9x2 12x2 15x2 18x2 21x2 24x2 27x2 30x2",
    "skip_near_end_keep_last_two": "0-26 30-31",
    "essential_layers_with_final_repeats": "0-9 26-29 30-31x2",
}

_PART = re.compile(r"(\d+)(?:-(\d+))?(?:x(\d+))?")


def parse_order(text: str) -> list[int]:
    """ "0-2 5x2" -> [0, 1, 2, 5, 5]: numbers or ranges, each block so many times in a row. Raises ValueError."""
    order = []
    for part in text.split():
        match = _PART.fullmatch(part)
        first = int(match[1]) if match else 0
        last = int(match[2]) if match and match[2] else first
        times = int(match[3]) if match and match[3] else 1
        if match is None or last < first or times == 0:
            raise ValueError(f"order has '{part}'; write block numbers and ranges, 'x2' for twice: '0-5 14-18x2 19-31'")
        order += [block for block in range(first, last + 1) for _ in range(times)]
    if not order:
        raise ValueError("order names no block")
    return order
