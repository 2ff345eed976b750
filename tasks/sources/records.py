"""Instruction data: records of a prompt and a response, each a window of its own, padded on the right.

Which tokens count in a training loss is stored beside the windows: never the padding, and the prompt only if asked for.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch

# The instructions of Taori et al. 2023 (Stanford Alpaca), for records with and without an input.
_BELOW = "Below is an instruction that describes a task"
_ALPACA = _BELOW + (
    ". Write a response that appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n### Response:\n"
)
_ALPACA_WITH_INPUT = _BELOW + (
    ", paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
ALPACA_FIELDS = ("instruction", "input", "output")


class Pair(NamedTuple):
    """What is given and what is to be said."""

    prompt: str
    response: str


def pair_of(record: Mapping[str, str], prompt: str | None, response: str | None) -> Pair:
    """The prompt and the response in the fields of those names, or, without names, of a record as Alpaca has them."""
    if prompt is not None and response is not None:
        return Pair(record[prompt], record[response])
    instruction, context, output = (record[field] for field in ALPACA_FIELDS)
    template = _ALPACA_WITH_INPUT if context.strip() else _ALPACA
    return Pair(template.format(instruction=instruction, input=context), output)


def token_ids(tokenizer: Any, pairs: Iterable[Pair], *, at_once: int = 256) -> Iterator[tuple[list[int], int]]:
    """(ids of prompt, response and end of sequence, the place of the first that is the response's) of each pair.

    Prompt and response are tokenized in one piece. The response begins where that first differs from the prompt alone:
    a token of both of them is the response's.
    """
    import itertools

    waiting = iter(pairs)
    while batch := list(itertools.islice(waiting, at_once)):
        prompts = _ids(tokenizer, [pair.prompt for pair in batch])
        wholes = _ids(tokenizer, [pair.prompt + pair.response for pair in batch])
        for alone, whole in zip(prompts, wholes, strict=True):
            if not whole or whole[-1] != tokenizer.eos_token_id:
                whole.append(tokenizer.eos_token_id)
            same = (place for place, (one, other) in enumerate(zip(alone, whole, strict=False)) if one != other)
            yield whole, next(same, min(len(alone), len(whole) - 1))


def _ids(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    found: list[list[int]] = tokenizer(texts, return_attention_mask=False)["input_ids"]
    return found


def padded(
    examples: list[tuple[list[int], int]], length: int, padding: int, *, prompts_count: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Windows int32 [examples, length], cut or padded on the right, and which of their tokens 1.. count in the loss.

    counted: uint8 [examples, length - 1], one for each token of the response, or with prompts_count of both.
    """
    import torch

    windows = torch.full((len(examples), length), padding, dtype=torch.int32)
    counted = torch.zeros(len(examples), length - 1, dtype=torch.uint8)
    for row, (ids, response) in enumerate(examples):
        kept = ids[:length]
        windows[row, : len(kept)] = torch.tensor(kept, dtype=torch.int32)
        first = 1 if prompts_count else max(response, 1)
        counted[row, first - 1 : len(kept) - 1] = 1
    return windows, counted
