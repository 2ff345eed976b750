"""Perplexity, against ten lines on the whole model."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import plain_methods
import pytest
import torch
from coldpress.storage.artifacts import Artifact, ArtifactWriter
from coldpress.storage.store import Store
from coldpress.tasks.stage import StageError
from torch import Tensor
from transformers import AutoTokenizer


@pytest.fixture
def measure(
    run_stage: Callable[..., Artifact], read_metrics: Callable[[Artifact], dict[str, Any]]
) -> Callable[..., dict[str, Any]]:
    """`measure(model, data, **parameters)`: the stage's metrics."""
    return lambda model, data, **parameters: read_metrics(
        run_stage("evaluate/perplexity", {"model": model, "data": data}, **parameters)
    )


@pytest.mark.parametrize("family", ["llama", "gemma2", "opt", "gpt_neox"])
def test_perplexity_is_that_of_the_whole_model(
    family: str,
    import_model: Callable[..., Artifact],
    whole_model: Callable[..., Any],
    make_tokens: Callable[..., Artifact],
    windows: Callable[[Artifact], Tensor],
    measure: Callable[..., dict[str, Any]],
) -> None:
    base = import_model(family)
    data = make_tokens(base, split="test", samples=None, length=64)
    expected = plain_methods.perplexity(whole_model(family), windows(data))
    assert measure(base, data)["perplexity"] == pytest.approx(expected, rel=1e-5)


def test_windows_longer_than_the_heads_chunks_are_scored_whole(
    import_model: Callable[..., Artifact],
    whole_model: Callable[..., Any],
    make_tokens: Callable[..., Artifact],
    windows: Callable[[Artifact], Tensor],
    measure: Callable[..., dict[str, Any]],
) -> None:
    changes = {"max_position_embeddings": 1100}
    base = import_model("llama", **changes)
    data = make_tokens(base, samples=2, length=1030)
    expected = plain_methods.perplexity(whole_model("llama", **changes), windows(data))
    assert measure(base, data)["perplexity"] == pytest.approx(expected, rel=1e-5)


def test_metrics_say_how_they_were_measured_and_what_each_window_lost(
    import_model: Callable[..., Artifact], make_tokens: Callable[..., Artifact], measure: Callable[..., dict[str, Any]]
) -> None:
    base = import_model("llama")
    found = measure(base, make_tokens(base, samples=5, length=48))
    assert (found["windows"], found["length"]) == (5, 48)
    assert found["runtime"] == "coldpress block loop, float32"
    assert len(found["window_losses_nats"]) == 5
    assert found["loss_nats"] == pytest.approx(sum(found["window_losses_nats"]) / 5)
    assert found["perplexity"] == pytest.approx(math.exp(found["loss_nats"]))


@pytest.mark.usefixtures("torchs_own_products")
def test_perplexity_in_another_dtype_is_that_of_the_whole_model_in_it(
    import_model: Callable[..., Artifact],
    whole_model: Callable[..., Any],
    make_tokens: Callable[..., Artifact],
    windows: Callable[[Artifact], Tensor],
    measure: Callable[..., dict[str, Any]],
) -> None:
    base = import_model("llama")
    data = make_tokens(base)
    found = measure(base, data, dtype="bfloat16")
    expected = plain_methods.perplexity(whole_model("llama", torch.bfloat16), windows(data))
    assert found["perplexity"] == pytest.approx(expected, rel=1e-5)
    assert found["runtime"] == "coldpress block loop, bfloat16"


def test_a_loss_that_is_no_number_is_reported_rather_than_recorded(
    store: Store,
    import_model: Callable[..., Artifact],
    make_tokens: Callable[..., Artifact],
    measure: Callable[..., dict[str, Any]],
) -> None:
    base = import_model("llama")
    manifest = store.manifest(base)
    name = "model.layers.1.input_layernorm.weight"
    with ArtifactWriter(store, "checkpoint") as writer:
        writer.share(manifest, [other for other in manifest.tensors if other != name])
        writer.share_files(manifest)
        writer.add_tensors({name: torch.full((64,), math.inf)})
        broken = writer.publish()
    with pytest.raises(StageError, match="not a finite number"):
        measure(broken, make_tokens(base))
    assert not list(store.actions("evaluate/perplexity"))


def test_a_manifest_with_an_unknown_format_is_refused(
    store: Store,
    import_model: Callable[..., Artifact],
    make_tokens: Callable[..., Artifact],
    measure: Callable[..., dict[str, Any]],
) -> None:
    base = import_model("llama")
    strange = store.put_manifest(replace(store.manifest(base), format="marlin"))
    with pytest.raises(StageError, match="can't read a checkpoint in the format 'marlin'; it takes adapter, awq, "):
        measure(strange, make_tokens(base))


def test_lines_are_scored_each_for_itself_and_padding_never_counts(
    tmp_path: Path,
    import_model: Callable[..., Artifact],
    whole_model: Callable[..., Any],
    make_tokens: Callable[..., Artifact],
    tiny_model_folder: Callable[..., str],
    measure: Callable[..., dict[str, Any]],
) -> None:
    lines = ["the cat", "  ", "a dog and another dog and a third one", "it was"]
    path = tmp_path / "lines.txt"
    path.write_text("\n".join(lines))
    base = import_model("llama")
    found = measure(base, make_tokens(base, source=str(path), split="all", samples=None, length=24, unit="lines"))
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder("llama"))
    model, losses = whole_model("llama"), []
    for line in (lines[0], lines[2], lines[3]):
        ids = torch.tensor(tokenizer(line)["input_ids"][:24])
        losses.append(torch.nn.functional.cross_entropy(model(ids[None]).logits[0, :-1], ids[1:], reduction="none"))
    each = [math.exp(loss.mean()) for loss in losses]
    assert "perplexity" not in found
    assert found["windows"] == 3
    assert found["window_tokens"] == [len(loss) for loss in losses]
    assert found["perplexity_per_token"] == pytest.approx(math.exp(torch.cat(losses).mean()), rel=1e-4)
    assert found["perplexity_mean_of_windows"] == pytest.approx(sum(each) / 3, rel=1e-4)
    assert found["perplexity_median_of_windows"] == pytest.approx(sorted(each)[1], rel=1e-4)
