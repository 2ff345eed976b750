"""How a model goes on from given prompts: what compression did to its texts, to be read side by side."""

from __future__ import annotations

import time
from typing import Annotated, Any, Literal

from pydantic import Field

from ...storage.artifacts import Artifact, ArtifactWriter
from ..formats import FORMATS
from ..stage import Parameters, Run, StageError, json_file, stage


class GenerationsParameters(Parameters):
    """What to continue, and how."""

    prompts: tuple[Annotated[str, Field(min_length=1)], ...] = Field(min_length=1, description="texts to continue")
    tokens: int = Field(32, ge=1, description="at most so many new tokens for each")
    temperature: float = Field(0.0, ge=0, le=10, description="0: always the most likely token; else sampled")
    seed: int = Field(0, ge=0, description="of sampling")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="of the forward pass; auto is the checkpoint's own"
    )


@stage(
    "evaluate",
    "generations",
    version=1,
    parameters=GenerationsParameters,
    inputs={"model": "checkpoint"},
    output="metrics",
    accepts=frozenset((*FORMATS, "adapter")),
)
def generations(run: Run, parameters: GenerationsParameters, model: Artifact) -> Artifact:
    """Continuations of prompts, each until the model ends it or `tokens` are reached, kept as generations.json.

    Prompts go to the model one by one and without a chat template; no penalties, no top-k or top-p.
    """
    from ..blocks import StoredModel, resolve_dtype
    from .whole_model import tokenizer_of, whole_model

    journal = run.journal
    assert journal is not None
    tokenizer = tokenizer_of(run, model)
    prompts = [tokenizer(prompt, return_tensors="pt")["input_ids"] for prompt in parameters.prompts]
    with StoredModel(run, model) as stored:
        _check_lengths(prompts, parameters.tokens, stored.config.get("max_position_embeddings"))
        dtype = resolve_dtype(parameters.dtype, stored)
        network = whole_model(run, stored, dtype)
    begun = len(journal.steps)
    clock = time.perf_counter()
    run.progress("generating", begun, len(prompts))
    for number, prompt in enumerate(prompts[begun:], begun):
        text, count = _continue(network, tokenizer, prompt, parameters, number, run.device)
        now = time.perf_counter()
        journal.commit({"continuation": text, "tokens": count, "seconds": round(now - clock, 3)})
        clock = now
        run.progress("generating", number + 1, len(prompts))
        if number + 1 < len(prompts):
            run.stop_if_asked()
    if begun:
        before = round(sum(step["seconds"] for step in journal.steps[:begun]), 3)
        run.note("resumed", {"from_answer": begun, "of": len(prompts), "seconds_before": before})
    texts = [
        {"prompt": prompt, "continuation": step["continuation"]}
        for prompt, step in zip(parameters.prompts, journal.steps, strict=True)
    ]
    result = {
        "prompts": len(texts),
        "generated_tokens": sum(step["tokens"] for step in journal.steps),
        "runtime": f"transformers, {str(dtype).removeprefix('torch.')}",
    }
    with ArtifactWriter(run.store, "metrics") as writer:
        writer.add_file("metrics.json", json_file(result))
        writer.add_file("generations.json", json_file(texts))
        return writer.publish()


def _check_lengths(prompts: list[Any], tokens: int, context: int | None) -> None:
    for number, prompt in enumerate(prompts, start=1):
        length = prompt.shape[1]
        if length == 0:
            raise StageError(f"prompt {number} has no tokens; write some text")
        if context is not None and length + tokens > context:
            raise StageError(
                f"prompt {number} has {length} tokens, and {tokens} more exceed the model's context of {context}; "
                f"shorten it to {max(context - tokens, 0)} tokens or ask for fewer"
            )


def _continue(
    network: Any, tokenizer: Any, prompt: Any, parameters: GenerationsParameters, number: int, device: str
) -> tuple[str, int]:
    """The text that follows a prompt [1, length], and how many tokens it took."""
    import torch
    from transformers import GenerationConfig

    ends = network.generation_config
    settings = GenerationConfig(
        max_new_tokens=parameters.tokens,
        do_sample=parameters.temperature > 0,
        temperature=parameters.temperature or None,
        top_k=0 if parameters.temperature else None,
        top_p=1.0 if parameters.temperature else None,
        bos_token_id=ends.bos_token_id,
        eos_token_id=ends.eos_token_id,
        pad_token_id=tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
    )
    network.generation_config = settings
    ids = prompt.to(device)
    with torch.no_grad(), torch.random.fork_rng([device] if device.startswith("cuda") else []):
        torch.manual_seed(parameters.seed + number)  # each its own, so that what was drawn before makes no difference
        output = network.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)
    new = output[0, ids.shape[1] :]
    return tokenizer.decode(new, skip_special_tokens=True), len(new)
