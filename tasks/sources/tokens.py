"""Text to windows: tokenized once, cut into windows of equal length, dealt by a seed."""

from __future__ import annotations

import os
import random
import tempfile
from typing import TYPE_CHECKING, Any

from pydantic import Field

from ...storage.artifacts import Artifact, ArtifactReader, ArtifactWriter
from ..formats import FORMATS
from ..stage import Parameters, Run, StageError, json_file, stage
from .locate import MODEL_FILES
from .texts import documents, text_content

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


@stage(
    "source",
    "tokens",
    version=1,
    parameters=TokensParameters,
    inputs={"model": "checkpoint"},
    output="tokens",
    accepts=frozenset(FORMATS),
    content=lambda parameters: text_content(parameters.source, parameters.revision, parameters.name),
)
def tokens(run: Run, parameters: TokensParameters, model: Artifact) -> Artifact:
    """Non-overlapping windows of the text joined by blank lines, tokenized in one piece by the model's tokenizer."""
    import itertools

    import torch

    run.progress("tokenizing", 0, 1)
    texts = documents(parameters.source, parameters.split, parameters.field, parameters.name, parameters.revision)
    text = "\n\n".join(itertools.islice(texts, parameters.documents))
    ids = _tokenize(run, model, text)
    there = len(ids) // parameters.length
    wanted = there if parameters.samples is None else parameters.samples
    if there < max(wanted, 1):
        raise StageError(
            f"{parameters.source} (split {parameters.split}) has {len(ids)} tokens, enough for {there} windows of "
            f"{parameters.length}, but {max(wanted, 1)} are asked for; lower samples or length, or give more text"
        )
    chosen = choose_windows(there, parameters.samples, parameters.seed)
    windows = ids[: there * parameters.length].reshape(there, parameters.length)[chosen]
    with ArtifactWriter(run.store, "tokens") as writer:
        writer.add_tensors({"input_ids": windows.to(torch.int32).contiguous()})
        facts: dict[str, Any] = {"windows": wanted, "length": parameters.length, "windows_available": there}
        writer.add_file("tokens.json", json_file(facts))
        run.progress("tokenizing", 1, 1)
        return writer.publish()


def choose_windows(available: int, samples: int | None, seed: int) -> list[int]:
    """Which windows: all in order, or `samples` different ones drawn by `seed`, in the order of the text."""
    if samples is None:
        return list(range(available))
    return sorted(random.Random(seed).sample(range(available), samples))


def _tokenize(run: Run, model: Artifact, text: str) -> torch.Tensor:
    """Token ids [tokens] of the whole text, special tokens (a BOS, for some) at its beginning only."""
    import torch
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as folder, ArtifactReader(run.store, model) as reader:
        for name in MODEL_FILES:
            if name in reader.manifest.files:
                with open(os.path.join(folder, name), "wb") as file:
                    file.write(reader.file(name))
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder)
        except (OSError, ValueError) as error:
            raise StageError(f"the model's tokenizer can't be loaded from its files: {error}") from error
    tokenizer.model_max_length = 10**30  # windows are cut below; no warning about the length of the whole
    return torch.tensor(tokenizer(text, return_attention_mask=False)["input_ids"], dtype=torch.int64)
