"""From raw timings to the figures of a report: medians and their spread. Pure functions."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple


class Summary(NamedTuple):
    """The median of some values, and their interquartile range: how far apart the middle half of them lies."""

    median: float
    spread: float


def summary(values: Sequence[float]) -> Summary:
    """Median and interquartile range, quartiles interpolated between values. At least two values."""
    lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
    return Summary(median, upper - lower)


def speeds(
    prefill_seconds: Sequence[float], decode_seconds: Sequence[float], *, batch_size: int, generate: int
) -> dict[str, Any]:
    """Figures of repeats that each read a batch of prompts and then decode `generate` tokens one after the other.

    prefill_seconds, decode_seconds: of each repeat, in the same order. Returns prefill_ms (of the whole batch),
    decode_ms_per_token (of one step, which gives each sequence of the batch a token) and tokens_per_second (tokens of
    all sequences by the time of prompt and decoding together), the spread of each as …_iqr, and the raw timings as
    lists.
    """
    if len(prefill_seconds) != len(decode_seconds):
        raise ValueError(f"{len(prefill_seconds)} timings of prompts and {len(decode_seconds)} of decoding")
    tokens = batch_size * generate
    both = [prefill + decode for prefill, decode in zip(prefill_seconds, decode_seconds, strict=True)]
    figures = {
        "prefill_ms": [1000 * seconds for seconds in prefill_seconds],
        "decode_ms_per_token": [1000 * seconds / generate for seconds in decode_seconds],
        "tokens_per_second": [tokens / seconds for seconds in both],
    }
    found: dict[str, Any] = {"prefill_seconds": list(prefill_seconds), "decode_seconds": list(decode_seconds)}
    for name, values in figures.items():
        found[name], found[f"{name}_iqr"] = summary(values)
    return found
