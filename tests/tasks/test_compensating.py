"""The compensation stages: adapters beside compressed checkpoints, and what reads them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any

import plain_methods
import pytest
import torch
from coldpress.storage.artifacts import Artifact
from coldpress.storage.gc import find_garbage
from coldpress.storage.store import Store
from coldpress.tasks.catalogue import CATALOGUE, stage_named
from coldpress.tasks.stage import ModelFacts, StageError
from torch import Tensor

Tensors = dict[str, Tensor]
RANK = 8
WEIGHTS = 3 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 128 * 64)


def adapter_weights(tensors: Tensors) -> Tensors:
    """{weight name: B A} for PEFT's tensors."""
    modules = [name.removesuffix(".lora_A.weight") for name in tensors if name.endswith(".lora_A.weight")]
    assert len(tensors) == 2 * len(modules)
    return {
        f"{module.removeprefix('base_model.model.')}.weight": (
            tensors[f"{module}.lora_B.weight"].double() @ tensors[f"{module}.lora_A.weight"].double()
        )
        for module in modules
    }


@pytest.fixture
def pruned(import_model: Callable[..., Artifact], run_stage: Callable[..., Artifact]) -> Artifact:
    return run_stage("prune/magnitude", {"model": import_model("llama")}, pattern="2:4")


@pytest.fixture
def compensate(
    run_stage: Callable[..., Artifact], import_model: Callable[..., Artifact], make_tokens: Callable[..., Artifact]
) -> Callable[..., Artifact]:
    """`compensate(method, model, family="llama", **parameters)`: the adapter of a compressed tiny model."""

    def run(method: str, model: Artifact, family: str = "llama", **parameters: Any) -> Artifact:
        original = import_model(family)
        inputs = {"model": model, "original": original}
        if method == "eora":
            inputs["calibration"] = make_tokens(original)
        return run_stage(f"compensate/{method}", inputs, **{"rank": RANK, **parameters})

    return run


@pytest.mark.parametrize("family", ["llama", "opt", "gpt_neox", "gemma3_text"])
@pytest.mark.parametrize("compression", ["pruned", "gptq", "nf4"])
def test_eora_in_the_block_loop_is_that_of_a_whole_model_compensated_block_after_block(
    family: str,
    compression: str,
    import_model: Callable[..., Artifact],
    whole_model: Callable[..., Any],
    make_tokens: Callable[..., Artifact],
    windows: Callable[[Artifact], Tensor],
    run_stage: Callable[..., Artifact],
    compensate: Callable[..., Artifact],
    dense_weights: Callable[..., Tensors],
    read_tensors: Callable[..., Tensors],
    blocks_of: Callable[[str], str],
) -> None:
    base = import_model(family)
    tokens = make_tokens(base)
    model = {
        "pruned": lambda: run_stage("prune/magnitude", {"model": base}, sparsity=0.5),
        "gptq": lambda: run_stage("quantize/gptq", {"model": base, "calibration": tokens}, group_size=32),
        "nf4": lambda: run_stage("quantize/nf4", {"model": base}),
    }[compression]()
    compressed = {f"{name}.weight": weight for name, weight in dense_weights(model).items()}
    found = adapter_weights(read_tensors(compensate("eora", model, family)))
    assert found.keys() == compressed.keys()

    # Blocks before the one at hand are compensated, it and those after it are the original's.
    whole = whole_model(family)
    for inputs in plain_methods.progressively(whole, blocks_of(family), windows(tokens)):
        for name, windows_of_inputs in inputs.items():
            x = torch.cat(windows_of_inputs).double()
            delta = whole.get_parameter(name).double() - compressed[name].double()
            left = ((delta - found[name]) @ x.T).square().sum()
            values = torch.linalg.svdvals(delta @ x.T)
            least = values[RANK:].square().sum()
            assert abs(left - least) <= 1e-6 * values.square().sum(), name
            assert left < 0.8 * values.square().sum(), name
        for name in inputs:
            whole.get_parameter(name).copy_(compressed[name] + found[name])


def test_svd_is_the_nearest_term_to_what_compression_took(
    pruned: Artifact,
    import_model: Callable[..., Artifact],
    compensate: Callable[..., Artifact],
    dense_weights: Callable[..., Tensors],
    read_tensors: Callable[..., Tensors],
) -> None:
    dense, compressed = dense_weights(import_model("llama")), dense_weights(pruned)
    found = adapter_weights(read_tensors(compensate("svd", pruned)))
    for name, weight in compressed.items():
        delta = (dense[name] - weight).double()
        least = torch.linalg.svdvals(delta)[RANK:].square().sum()
        torch.testing.assert_close((delta - found[f"{name}.weight"]).square().sum(), least, rtol=1e-6, atol=0)


@pytest.mark.parametrize("compression", ["pruned", "gptq", "nf4"])
def test_whatever_reads_an_adapter_block_by_block_sees_its_checkpoints_weights_and_the_terms(
    compression: str,
    pruned: Artifact,
    make_tokens: Callable[..., Artifact],
    windows: Callable[[Artifact], Tensor],
    run_stage: Callable[..., Artifact],
    compensate: Callable[..., Artifact],
    dense_weights: Callable[..., Tensors],
    read_tensors: Callable[..., Tensors],
    read_metrics: Callable[[Artifact], dict[str, Any]],
    whole_model: Callable[..., Any],
) -> None:
    tokens = make_tokens(pruned)
    model = {
        "pruned": lambda: pruned,
        "gptq": lambda: run_stage("quantize/gptq", {"model": pruned, "calibration": tokens}, group_size=32),
        "nf4": lambda: run_stage("quantize/nf4", {"model": pruned}),
    }[compression]()
    adapter = compensate("eora", model)
    terms = adapter_weights(read_tensors(adapter))
    seen = dense_weights(adapter)
    expected = {f"{name}.weight": weight + terms[f"{name}.weight"] for name, weight in dense_weights(model).items()}
    assert {f"{name}.weight" for name in seen} == expected.keys()
    for name, weight in seen.items():
        torch.testing.assert_close(weight, expected[f"{name}.weight"].float(), rtol=1e-6, atol=1e-6)
    held_out = make_tokens(pruned, split="test")
    metrics = read_metrics(run_stage("evaluate/perplexity", {"model": adapter, "data": held_out}))
    with plain_methods.weights_of(whole_model("llama"), expected) as whole:
        perplexity = plain_methods.perplexity(whole, windows(held_out))
    assert metrics["perplexity"] == pytest.approx(perplexity, rel=1e-5)
    without = read_metrics(run_stage("evaluate/perplexity", {"model": model, "data": held_out}))
    assert without["perplexity"] != pytest.approx(perplexity, rel=1e-3)


def test_full_rank_brings_the_original_back(
    import_model: Callable[..., Artifact],
    run_stage: Callable[..., Artifact],
    compensate: Callable[..., Artifact],
    make_tokens: Callable[..., Artifact],
    windows: Callable[[Artifact], Tensor],
    block_loop_logits: Callable[..., Tensor],
) -> None:
    base = import_model("opt")  # all its layers have 64 at least; of the tiny Llama's some have 32
    pruned = run_stage("prune/magnitude", {"model": base}, sparsity=0.5)
    ids = windows(make_tokens(base))
    expected = block_loop_logits(base, ids)
    assert (block_loop_logits(pruned, ids) - expected).abs().max() > 0.1
    for method in ("eora", "svd"):
        adapter = compensate(method, pruned, "opt", rank=64)
        torch.testing.assert_close(block_loop_logits(adapter, ids), expected, rtol=0, atol=1e-3)


def test_the_adapter_is_stored_beside_its_checkpoint_which_stays_as_it_is(
    store: Store, pruned: Artifact, compensate: Callable[..., Artifact]
) -> None:
    before = store.manifest(pruned).to_json()
    adapter = store.manifest(compensate("eora", pruned))
    assert store.manifest(pruned).to_json() == before
    assert (adapter.kind, adapter.base) == ("adapter", pruned.id)
    assert not adapter.masks
    assert adapter.files.keys() == {"adapter_config.json"}
    assert {entry.dtype for entry in adapter.tensors.values()} == {"F32"}
    assert len(adapter.tensors) == 2 * 7 * 3


def test_factors_are_stored_in_the_checkpoints_dtype(
    store: Store,
    run_stage: Callable[..., Artifact],
    tiny_model_folder: Callable[..., str],
    make_tokens: Callable[..., Artifact],
) -> None:
    base = run_stage("source/model", {}, source=tiny_model_folder("llama"), dtype="bfloat16")
    tokens = make_tokens(base)
    quantized = run_stage("quantize/gptq", {"model": base, "calibration": tokens}, group_size=32)
    inputs = {"model": quantized, "original": base, "calibration": tokens}
    adapter = run_stage("compensate/eora", inputs, rank=4)
    assert {entry.dtype for entry in store.manifest(adapter).tensors.values()} == {"BF16"}


def test_gc_keeps_the_checkpoint_of_a_named_adapter(
    store: Store, pruned: Artifact, compensate: Callable[..., Artifact]
) -> None:
    store.set_ref("mine", compensate("svd", pruned))
    going = {one.path for one in find_garbage(store, keep_runs=0, grace=0)}
    assert not any(pruned.id.endswith(path.rsplit("/", 1)[1]) for path in going if path.startswith("artifacts"))
    store.delete_ref("mine")
    going = {one.path for one in find_garbage(store, keep_runs=0, grace=0)}
    assert any(pruned.id.endswith(path.rsplit("/", 1)[1]) for path in going if path.startswith("artifacts"))


def test_size_is_that_of_both_exports_and_sparsity_the_checkpoints(
    pruned: Artifact,
    compensate: Callable[..., Artifact],
    run_stage: Callable[..., Artifact],
    read_metrics: Callable[[Artifact], dict[str, Any]],
    export_folder: Callable[..., str],
) -> None:
    adapter = compensate("svd", pruned)
    alone, both = (read_metrics(run_stage("evaluate/size", {"model": model})) for model in (pruned, adapter))
    folders = [export_folder(model) for model in (pruned, adapter)]
    sizes = [os.path.getsize(os.path.join(folder, file)) for folder in folders for file in os.listdir(folder)]
    assert both["size_bytes"] == sum(sizes)
    layers = [(64, 64), (32, 64), (32, 64), (64, 64), (128, 64), (128, 64), (64, 128)]
    added = 3 * sum(RANK * (rows + columns) for rows, columns in layers)
    assert both["bits_per_weight"] == pytest.approx(32 + 32 * added / WEIGHTS)
    for same in ("sparsity", "zeros", "linear_weights"):
        assert both[same] == alone[same]


# PEFT's folder


def test_the_exported_configuration_is_a_lora_of_scale_one(
    pruned: Artifact, compensate: Callable[..., Artifact], export_folder: Callable[..., str]
) -> None:
    folder = export_folder(compensate("svd", pruned))
    assert sorted(os.listdir(folder)) == ["adapter_config.json", "adapter_model.safetensors"]
    with open(os.path.join(folder, "adapter_config.json")) as file:
        config = json.load(file)
    assert (config["peft_type"], config["task_type"], config["r"]) == ("LORA", "CAUSAL_LM", RANK)
    assert config["lora_alpha"] / config["r"] == 1
    assert (config["lora_dropout"], config["bias"], config["base_model_name_or_path"]) == (0, "none", None)


# Bad input


def facts(config: dict[str, Any], original: dict[str, Any] | None = None, packed: str = "dense") -> ModelFacts:
    return ModelFacts(config, original=ModelFacts(original, packed) if original else None)


@pytest.mark.parametrize(
    ("changes", "rank", "packed", "sentence"),
    [
        ({}, 33, "dense", r"rank 33 is above a dimension of self_attn\.k_proj\.weight, 32 x 64; 32 is the most"),
        ({}, 128, "dense", r"rank 128 is above a dimension of self_attn\.q_proj\.weight, 64 x 64; 32 is the most"),
        ({}, 8, "gptq", r"'original' is packed \(gptq\); name the checkpoint from before it was quantized"),
        ({"num_hidden_layers": 4}, 8, "dense", "the model has 3 blocks and 'original' 4"),
        (
            {"intermediate_size": 96}, 8, "dense",
            r"mlp\.gate_proj\.weight is 128 x 64 in the model and 96 x 64 in 'original'; name the dense checkpoint",
        ),
    ],
)  # fmt: skip
@pytest.mark.parametrize("method", ["eora", "svd"])
def test_what_cannot_work_is_known_before_anything_runs(
    method: str, changes: dict[str, Any], rank: int, packed: str, sentence: str, whole_model: Callable[..., Any]
) -> None:
    config = whole_model("llama").config.to_dict()
    entry = stage_named(f"compensate/{method}")
    (error,) = entry.check(entry.parameters(rank=rank), facts(config, {**config, **changes}, packed))
    with pytest.raises(AssertionError, match=sentence):
        raise AssertionError(error)


def test_the_usual_case_is_no_error_whether_or_not_the_original_is_known(whole_model: Callable[..., Any]) -> None:
    config = whole_model("llama").config.to_dict()
    entry = stage_named("compensate/eora")
    assert list(entry.check(entry.parameters(rank=32), facts(config, config))) == []
    assert list(entry.check(entry.parameters(rank=32), facts(config))) == []


def test_the_stage_itself_refuses_what_could_not_be_known_before(
    pruned: Artifact,
    compensate: Callable[..., Artifact],
    import_model: Callable[..., Artifact],
    run_stage: Callable[..., Artifact],
) -> None:
    with pytest.raises(StageError, match=r"rank 40 is above a dimension of self_attn\.k_proj\.weight"):
        compensate("svd", pruned, rank=40)
    with pytest.raises(StageError, match="the model has 3 blocks and 'original' 5"):
        run_stage("compensate/svd", {"model": pruned, "original": import_model("llama", num_hidden_layers=5)}, rank=4)


@pytest.mark.parametrize(
    "name",
    [name for name, entry in CATALOGUE.items() if "model" in entry.inputs and "adapter" not in entry.accepts],
)
def test_stages_that_take_a_checkpoint_refuse_an_adapter_in_a_sentence(name: str) -> None:
    refusal = CATALOGUE[name].refusal({"model": "adapter", "calibration": "tokens"})
    assert refusal == f"{name} can't take an adapter as 'model'; name the checkpoint that the adapter belongs to"


def test_an_adapter_given_as_a_model_is_refused_before_it_is_read(
    pruned: Artifact, compensate: Callable[..., Artifact], run_stage: Callable[..., Artifact]
) -> None:
    adapter = compensate("svd", pruned)
    with pytest.raises(StageError, match="prune/magnitude can't take an adapter as 'model'"):
        run_stage("prune/magnitude", {"model": adapter}, sparsity=0.5)
    with pytest.raises(StageError, match="compensate/svd can't take an adapter as 'original'"):
        run_stage("compensate/svd", {"model": pruned, "original": adapter}, rank=4)
