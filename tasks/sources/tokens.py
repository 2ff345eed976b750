"""Text to windows: tokenized once, cut into windows of equal length, dealt by a seed; or a window for each record."""

from __future__ import annotations

import os
import random
import tempfile
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from ...storage.artifacts import Artifact, ArtifactReader, ArtifactWriter
from ..formats import FORMATS
from ..stage import Parameters, Run, StageError, json_file, stage
from .locate import MODEL_FILES
from .records import ALPACA_FIELDS, Pair, padded, pair_of, token_ids
from .texts import documents, records, text_content

if TYPE_CHECKING:
    import torch


class TokensParameters(Parameters):
    """Which text, and how it is cut into windows."""

    location = frozenset({"source", "revision"})

    source: str = Field(description="text or jsonl file, Hub data set, or python-docs")
    split: str = Field("train", description="of a file or python-docs: train, test or all; else the data set's own")
    samples: int | None = Field(None, ge=1, description="windows, drawn by the seed; left out: all there are, in order")
    length: int = Field(2048, ge=2, description="tokens of a window")
    seed: int = Field(0, ge=0, description="of the draw")
    field: str = Field("text", description="of a jsonl record or data set row")
    name: str | None = Field(None, description="configuration of a Hub data set, e.g. wikitext-2-raw-v1")
    revision: str | None = Field(None, description="of a Hub data set: branch, tag or commit")
    documents: int | None = Field(None, ge=1, description="read only so many documents, for very large data sets")
    prompt: str | None = Field(None, description="field with the prompt: each record is then a window, padded")
    response: str | None = Field(None, description="field with the response to it")
    template: Literal["alpaca"] | None = Field(
        None, description="instead of both: prompts are made of 'instruction' and 'input', 'output' is the response"
    )
    loss_on: Literal["response", "all"] = Field("response", description="tokens of a record that training learns from")
    unit: Literal["windows", "lines"] = Field(
        "windows", description="lines: each line of the text that is not blank is a window of its own, padded"
    )
    joined_by: Literal["blank line", "line", "space"] = Field(
        "blank line", description="what stands between documents; space for Penn Treebank"
    )
    draw: Literal["random", "first"] = Field("random", description="which `samples` windows; first: as C4's protocol")

    @model_validator(mode="after")
    def _records_or_text(self) -> TokensParameters:
        if (self.prompt is None) != (self.response is None):
            raise ValueError("records need both 'prompt' and 'response', the names of their fields")
        if self.template is not None and self.prompt is not None:
            raise ValueError(
                f"template '{self.template}' makes the prompts itself; drop it, or 'prompt' and 'response'"
            )
        if self.of_records and self.field != "text":
            raise ValueError("'field' is of running text; records have 'prompt' and 'response', or a template")
        if self.of_records and (self.unit, self.joined_by) != ("windows", "blank line"):
            raise ValueError("'unit' and 'joined_by' are of running text; records are windows of their own")
        if self.draw == "first" and self.samples is None:
            raise ValueError("'draw: first' needs 'samples', how many windows")
        if not self.of_records and self.loss_on != "response":
            raise ValueError("'loss_on' is of records; give 'prompt' and 'response', or a template")
        return self

    @property
    def of_records(self) -> bool:
        """Whether each record is a window, padded, rather than a piece of running text."""
        return self.prompt is not None or self.template is not None

    @property
    def padded(self) -> bool:
        """Whether windows are padded to one length."""
        return self.of_records or self.unit == "lines"


@stage(
    "source",
    "tokens",
    version=1,
    parameters=TokensParameters,
    inputs={"model": "checkpoint"},
    output="tokens",
    accepts=frozenset(FORMATS),
    content=lambda parameters: text_content(parameters.source, parameters.revision, parameters.name),
    on_device=False,
)
def tokens(run: Run, parameters: TokensParameters, model: Artifact) -> Artifact:
    """Non-overlapping windows of the text joined by blank lines, tokenized in one piece by the model's tokenizer.

    Or, of records with a prompt and a response, a window for each, padded; what training learns from is marked. Or a
    window for each line.
    """
    run.progress("tokenizing", 0, 1)
    tokenizer = load_tokenizer(run, model)
    tokenizer.model_max_length = 10**30  # windows are cut later; no warning about the length of the whole
    make = _records if parameters.of_records else _lines if parameters.unit == "lines" else _text
    tensors, facts = make(parameters, tokenizer)
    with ArtifactWriter(run.store, "tokens") as writer:
        writer.add_tensors(tensors)
        windows, length = tensors["input_ids"].shape
        writer.add_file("tokens.json", json_file({"windows": windows, "length": length, **facts}))
        run.progress("tokenizing", 1, 1)
        return writer.publish()


def _text(parameters: TokensParameters, tokenizer: Any) -> tuple[dict[str, torch.Tensor], dict[str, int]]:
    """Windows of running text; facts on what there was."""
    import itertools

    import torch

    texts = documents(parameters.source, parameters.split, parameters.field, parameters.name, parameters.revision)
    between = {"blank line": "\n\n", "line": "\n", "space": " "}[parameters.joined_by]
    text = between.join(itertools.islice(texts, parameters.documents))
    # Special tokens (a BOS, for some) stand at the beginning of the whole text only.
    ids = torch.tensor(tokenizer(text, return_attention_mask=False)["input_ids"], dtype=torch.int64)
    there = len(ids) // parameters.length
    wanted = there if parameters.samples is None else parameters.samples
    if there < max(wanted, 1):
        raise StageError(
            f"{parameters.source} (split {parameters.split}) has {len(ids)} tokens, enough for {there} windows of "
            f"{parameters.length}, but {max(wanted, 1)} are asked for; lower samples or length, or give more text"
        )
    chosen = list(range(wanted)) if parameters.draw == "first" else choose_windows(there, wanted, parameters.seed)
    windows = ids[: there * parameters.length].reshape(there, parameters.length)[chosen]
    return {"input_ids": windows.to(torch.int32).contiguous()}, {"windows_available": there}


def _lines(parameters: TokensParameters, tokenizer: Any) -> tuple[dict[str, torch.Tensor], dict[str, int]]:
    """A window for each line that has a token to predict, with the special tokens that the tokenizer adds to a text."""
    import itertools

    texts = documents(parameters.source, parameters.split, parameters.field, parameters.name, parameters.revision)
    lines = [
        line for text in itertools.islice(texts, parameters.documents) for line in text.split("\n") if line.strip()
    ]
    found: list[list[int]] = tokenizer(lines, return_attention_mask=False)["input_ids"] if lines else []
    examples = [(ids, 1) for ids in found if len(ids) > 1]
    wanted = len(examples) if parameters.samples is None else parameters.samples
    if len(examples) < max(wanted, 1):
        raise StageError(
            f"{parameters.source} (split {parameters.split}) has {len(examples)} lines of two tokens or more, but "
            f"{max(wanted, 1)} are asked for; lower samples, or give more text"
        )
    places = (
        list(range(wanted)) if parameters.draw == "first" else choose_windows(len(examples), wanted, parameters.seed)
    )
    chosen = [examples[place] for place in places]
    windows, counted = padded(chosen, parameters.length, 0, prompts_count=True)
    cut = sum(len(ids) > parameters.length for ids, _ in chosen)
    return {"input_ids": windows, "counted": counted}, {"windows_available": len(examples), "lines_cut": cut}


def _records(parameters: TokensParameters, tokenizer: Any) -> tuple[dict[str, torch.Tensor], dict[str, int]]:
    """Windows of records and what counts in them; facts on what there was."""
    import itertools

    if tokenizer.eos_token_id is None:
        raise StageError(
            "the model's tokenizer has no end-of-sequence token, with which a response must end; add eos_token to its "
            "tokenizer_config.json"
        )
    everything = token_ids(tokenizer, itertools.islice(_pairs(parameters), parameters.documents))
    examples, read, cut = [], 0, 0
    for ids, response in everything:
        read += 1
        if len(ids) > 1 and (parameters.loss_on == "all" or response < parameters.length):
            examples.append((ids[: parameters.length], response))
            cut += len(ids) > parameters.length
    wanted = len(examples) if parameters.samples is None else parameters.samples
    if len(examples) < max(wanted, 1):
        rest = f", {read - len(examples)} of them with a prompt that leaves no room in {parameters.length} tokens"
        raise StageError(
            f"{parameters.source} (split {parameters.split}) has {read} records{rest if read else ''}, but "
            f"{max(wanted, 1)} are asked for; lower samples, raise length, or give more records"
        )
    chosen = [examples[place] for place in choose_windows(len(examples), parameters.samples, parameters.seed)]
    windows, counted = padded(
        chosen, parameters.length, tokenizer.eos_token_id, prompts_count=parameters.loss_on == "all"
    )
    facts = {"windows_available": len(examples), "records": read, "records_cut": cut}
    return {"input_ids": windows, "counted": counted}, facts


def _pairs(parameters: TokensParameters) -> Iterator[Pair]:
    fields = ALPACA_FIELDS if parameters.template else (str(parameters.prompt), str(parameters.response))
    optional = frozenset({"input"} if parameters.template else ())
    found = records(
        parameters.source, parameters.split, fields, parameters.name, parameters.revision, optional=optional
    )
    for record in found:
        yield pair_of(record, parameters.prompt, parameters.response)


def choose_windows(available: int, samples: int | None, seed: int) -> list[int]:
    """Which windows: all in order, or `samples` different ones drawn by `seed`, in the order of the text."""
    if samples is None:
        return list(range(available))
    return sorted(random.Random(seed).sample(range(available), samples))


def load_tokenizer(run: Run, model: Artifact) -> Any:
    """The tokenizer of a checkpoint. Raises StageError when it has none."""
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as folder, ArtifactReader(run.store, model) as reader:
        for name in MODEL_FILES:
            if name in reader.manifest.files:
                with open(os.path.join(folder, name), "wb") as file:
                    file.write(reader.file(name))
        try:
            return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise StageError(f"the model's tokenizer can't be loaded from its files: {error}") from error
