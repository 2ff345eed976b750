"""LoRAPrune as a stage: no gradients of base weights, what goes, and that a sliced model is the masked one."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from coldpress.storage.artifacts import Artifact, ArtifactReader, ArtifactWriter
from coldpress.storage.inspect import verify
from coldpress.storage.journal import Journal
from coldpress.storage.store import Action, Store
from coldpress.tasks.adaptation.layers import Lora, MaskedWeight
from coldpress.tasks.adaptation.loraprune import (
    Parts,
)
from coldpress.tasks.adaptation.loraprune_stage import lora_of, train_pruned
from coldpress.tasks.adaptation.network import Network
from coldpress.tasks.architectures import widths
from coldpress.tasks.blocks import StoredModel
from coldpress.tasks.catalogue import stage_named
from coldpress.tasks.pruning.width import Counts
from coldpress.tasks.resuming import SavingPace
from coldpress.tasks.stage import ModelFacts, Preempted, Run, StageError, compute
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

TRAINING = {
    "steps": 10, "batch_size": 4, "micro_batch_size": 2, "learning_rate": 1e-2, "dtype": "float32", "rank": 4,
    "every": 2, "dropout": 0.0,
}  # fmt: skip


class Allocations(TorchDispatchMode):
    """Notes the shapes of all results in memory of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {one.untyped_storage().data_ptr() for one in args if isinstance(one, Tensor)}
        for one in result if isinstance(result, tuple | list) else [result]:
            if isinstance(one, Tensor) and one.untyped_storage().data_ptr() not in given:
                self.shapes.append(tuple(one.shape))
        return result


@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_no_gradient_of_a_base_weight_is_ever_allocated(
    base: str,
    store: Store,
    import_model: Callable[..., Artifact],
    run_stage: Callable[..., Artifact],
    make_tokens: Callable[..., Artifact],
    windows: Callable[[Artifact], Tensor],
) -> None:
    model = import_model("llama", hidden_size=128, intermediate_size=192)
    ids = windows(make_tokens(model))[:3, :29]  # 87 tokens: no activation is as large as a weight
    stored_as = run_stage("quantize/nf4", {"model": model}) if base == "nf4" else model
    counted = torch.ones(3, 28, dtype=torch.bool)

    def allocated(make: Callable[..., torch.nn.Module]) -> tuple[Network, set[tuple[int, ...]], set[tuple[int, ...]]]:
        with StoredModel(Run(store), stored_as) as stored:
            network = Network(Run(store), stored, torch.float32, make)
            shapes = {shape for index in range(stored.blocks) for shape in stored.linear_shapes(index).values()}
        with torch.enable_grad():
            loss = network.loss(ids, counted)
            with Allocations() as seen:
                loss.backward()
        return network, shapes, set(seen.shapes)

    network, shapes, seen = allocated(lambda name, frozen, shape, mask: Lora(frozen, shape, 4, 2.0, 0.0))
    if base == "dense":  # a packed weight is unpacked for the backward pass and let go
        assert not shapes & seen
        assert not {(columns, rows) for rows, columns in shapes} & seen
    for name, parameter in network.model.named_parameters():
        assert (parameter.grad is not None) == name.endswith((".a", ".b")), name
    for layer in network.layers.values():
        assert isinstance(layer, Lora)
        weight = layer.frozen.weight_of()
        assert not weight.requires_grad
        assert weight.grad is None
    # The eye sees gradients of weights where there are some.
    _, shapes, seen = allocated(lambda name, frozen, shape, mask: MaskedWeight(frozen, mask))
    assert shapes <= seen


@pytest.fixture
def pruned_with_masks(store: Store) -> Callable[..., tuple[Network, Parts]]:
    """The network in training just before it is sliced, and what it keeps."""

    def run(model: Artifact, data: Artifact, **parameters: Any) -> tuple[Network, Parts]:
        journal = Journal(store, {"stage": "testing"}, {})
        values = stage_named("adapt/loraprune").parameters(**parameters)
        one = Run(store, journal=journal)
        with StoredModel(one, model) as stored:
            return train_pruned(one, values, stored, data)

    return run


@torch.no_grad()
def logits_of(network: Network, ids: Tensor) -> Tensor:
    return network.logits(network.features(ids))


@pytest.mark.parametrize(
    ("family", "changes", "parameters"),
    [
        ("llama", {}, {}),
        ("llama", {"num_key_value_heads": 4}, {}),
        ("llama", {}, {"spare_first": 1, "spare_last": 1, "sparsity": 0.2}),
        ("mistral", {}, {"parts": "attention"}),
        ("qwen2", {}, {"multiple_of": 16}),
        ("qwen3", {}, {"modules": ["q_proj", "down_proj"]}),
        ("gemma2", {}, {}),
        ("opt", {}, {"parts": "ffn"}),
        ("gpt_neox", {}, {"parts": "ffn"}),
    ],
)
def test_the_sliced_model_computes_what_the_masked_one_does(
    family: str, changes: dict[str, Any], parameters: dict[str, Any], import_model: Callable[..., Artifact],
    run_stage: Callable[..., Artifact], make_tokens: Callable[..., Artifact], windows: Callable[[Artifact], Tensor],
    block_loop_logits: Callable[..., Tensor], pruned_with_masks: Callable[..., tuple[Network, Parts]],
) -> None:  # fmt: skip
    model = import_model(family, **changes)
    data = make_tokens(model, samples=8)
    ids, settings = windows(data), {**TRAINING, "sparsity": 0.5, **parameters}
    sliced = run_stage("adapt/loraprune", {"model": model, "data": data}, **settings)
    network, parts = pruned_with_masks(model, data, **settings)
    assert not bool(parts.kept["channel"].all()) or parameters.get("parts") == "attention"
    torch.testing.assert_close(block_loop_logits(sliced, ids), logits_of(network, ids), rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("heads", [2, 4])
def test_the_share_is_met_exactly_and_transformers_loads_what_is_smaller(
    heads: int, import_model: Callable[..., Artifact], run_stage: Callable[..., Artifact], store: Store,
    make_tokens: Callable[..., Artifact], windows: Callable[[Artifact], Tensor], export_folder: Callable[..., str],
    block_loop_logits: Callable[..., Tensor],
) -> None:  # fmt: skip
    model = import_model("llama", num_key_value_heads=heads)
    data = make_tokens(model, samples=8)
    sliced = run_stage("adapt/loraprune", {"model": model, "data": data}, **TRAINING, sparsity=0.5)
    config = json.loads(store.read_file(sliced, "config.json"))
    assert (config["num_attention_heads"], config["num_key_value_heads"]) == (2, heads // 2)
    assert config["intermediate_size"] == 64
    assert widths(config).weights * 2 == widths(json.loads(store.read_file(model, "config.json"))).weights
    assert not store.manifest(sliced).masks
    loaded = AutoModelForCausalLM.from_pretrained(export_folder(sliced), dtype=torch.float32).eval()
    with torch.no_grad():
        found = loaded(windows(data), use_cache=False).logits
    torch.testing.assert_close(found, block_loop_logits(sliced, windows(data)), rtol=1e-4, atol=1e-4)


def test_blocks_that_are_spared_stay_whole_and_the_others_make_up_for_them(
    import_model: Callable[..., Artifact], run_stage: Callable[..., Artifact], store: Store,
    make_tokens: Callable[..., Artifact], read_metrics: Callable[[Artifact], dict[str, Any]],
) -> None:  # fmt: skip
    model = import_model("llama", num_hidden_layers=4)
    inputs = {"model": model, "data": make_tokens(model)}
    adapted = run_stage("adapt/loraprune", inputs, **TRAINING, sparsity=0.3, spare_first=1, spare_last=1)
    config = json.loads(store.read_file(adapted, "config.json"))
    wide = widths(config)
    assert (wide.groups, wide.channels) == (2, 128)
    with ArtifactReader(store, adapted) as reader:
        shapes = {name: reader.manifest.tensors[name].shape for name in reader.manifest.masks}
        masks = reader.masks(shapes)  # type: ignore[arg-type]
        weights = reader.tensors(masks)
    assert {int(name.split(".")[2]) for name in masks} == {1, 2}
    gone = [0, 0, 0, 0]
    for name, mask in masks.items():
        gone[int(name.split(".")[2])] += int((~mask).sum())
        assert bool((weights[name][~mask] == 0).all())
    assert gone[1] == gone[2]
    assert 0 <= 0.6 * wide.weights - gone[1] < wide.channel_weights
    assert read_metrics(run_stage("evaluate/size", {"model": adapted}))["sparsity"] == pytest.approx(0.3, abs=0.01)


@pytest.mark.parametrize("heads", [4, 2])
def test_the_choice_is_that_of_dense_gradients_seen_through_the_first_factors(
    heads: int, import_model: Callable[..., Artifact], make_tokens: Callable[..., Artifact],
    windows: Callable[[Artifact], Tensor], whole_model: Callable[..., Any],
    pruned_with_masks: Callable[..., tuple[Network, Parts]],
) -> None:  # fmt: skip
    """In the first step B is zero, so g = scale^2 G A^T A with the gradient G of the weight itself."""
    model = import_model("llama", num_key_value_heads=heads)
    data = make_tokens(model, samples=4)
    network, parts = pruned_with_masks(model, data, **{**TRAINING, "steps": 1}, sparsity=0.5)
    whole, ids = whole_model("llama", num_key_value_heads=heads).requires_grad_(True), windows(data)
    logits = whole(ids, use_cache=False).logits
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    for index, block in enumerate(whole.model.layers):
        totals = {"group": torch.zeros(heads), "channel": torch.zeros(128)}
        for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
                     "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"):  # fmt: skip
            lora = lora_of(network.layers[f"model.layers.{index}.{name}.weight"])
            assert lora is not None
            weight, a = block.get_submodule(name).weight, lora.a.detach()
            seen = (4.0**2 * weight.grad @ a.T @ a * weight.detach()).abs()  # alpha 16 over rank 4
            lines = seen.sum(0 if name.endswith(("o_proj", "down_proj")) else 1)
            part = "group" if name.startswith("self_attn") else "channel"
            score = lines.view(len(totals[part]), -1).sum(1)
            totals[part] += score / score.norm()
        left = parts.left(index)
        assert left.groups.tolist() == totals["group"].argsort()[heads // 2 :].sort().values.tolist()
        assert left.channels.tolist() == totals["channel"].argsort()[64:].sort().values.tolist()
        for part, total in totals.items():
            torch.testing.assert_close(parts.importance[part][index], 0.1 * total, rtol=1e-3, atol=1e-5)


def test_what_is_removed_is_what_the_loss_does_not_need(
    import_model: Callable[..., Artifact], make_tokens: Callable[..., Artifact], store: Store,
    read_tensors: Callable[..., dict[str, Tensor]],
    pruned_with_masks: Callable[..., tuple[Network, Parts]],
) -> None:  # fmt: skip
    """Channels that down_proj hardly reads go first."""
    model = import_model("llama")
    dull = torch.randperm(128, generator=torch.Generator().manual_seed(0))[:40]
    with ArtifactWriter(store, "checkpoint") as writer:
        tensors = read_tensors(model)
        for name, tensor in tensors.items():
            if name.endswith("down_proj.weight"):
                tensor[:, dull] *= 1e-3
        writer.share_files(store.manifest(model))
        writer.add_tensors(tensors)
        damaged = writer.publish()
    data = make_tokens(model, samples=8)
    settings = {**TRAINING, "learning_rate": 1e-4, "sparsity": 40 / 128, "parts": "ffn"}
    _, parts = pruned_with_masks(damaged, data, **settings)
    for index in range(3):
        gone = set(range(128)) - set(parts.left(index).channels.tolist())
        assert gone == set(dull.tolist())
    assert bool(parts.kept["group"].all())


@pytest.mark.parametrize("packed", ["quantize/nf4", "quantize/int8", "quantize/rtn"])
def test_packed_weights_are_learned_beside_and_the_result_is_dense(
    packed: str, import_model: Callable[..., Artifact], run_stage: Callable[..., Artifact], store: Store,
    make_tokens: Callable[..., Artifact], windows: Callable[[Artifact], Tensor],
    block_loop_logits: Callable[..., Tensor], pruned_with_masks: Callable[..., tuple[Network, Parts]],
) -> None:  # fmt: skip
    settings = {"bits": 4, "group_size": 32} if packed == "quantize/rtn" else {}
    dense = import_model("llama")
    model = run_stage(packed, {"model": dense}, **settings)
    data = make_tokens(dense, samples=8)
    sliced = run_stage("adapt/loraprune", {"model": model, "data": data}, **TRAINING, sparsity=0.5)
    manifest = store.manifest(sliced)
    assert (manifest.format, manifest.quantization) == ("dense", None)
    assert manifest.tensors.keys() == store.manifest(dense).tensors.keys()
    network, _ = pruned_with_masks(model, data, **TRAINING, sparsity=0.5)
    ids = windows(data)
    torch.testing.assert_close(block_loop_logits(sliced, ids), logits_of(network, ids), rtol=1e-3, atol=2e-4)
    facts = ModelFacts(json.loads(store.read_file(model, "config.json")), manifest.format)
    entry = stage_named("adapt/loraprune")
    assert entry.after(entry.parameters(sparsity=0.5), facts).format == "dense"


class Killed(Exception):
    """Stands for the end of the process."""


@pytest.mark.parametrize("asked", [False, True], ids=["killed", "asked to stop"])
@pytest.mark.parametrize("after", range(1, 11))
def test_training_goes_on_where_it_ended_with_what_it_had_learned_of_importance(
    after: int, asked: bool, store: Store, import_model: Callable[..., Artifact], make_tokens: Callable[..., Artifact],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(SavingPace, "due", lambda self: True)
    model = import_model("llama")
    data = make_tokens(model, samples=10)
    seen: list[int] = []

    def attempt(dies: bool) -> Action:
        seen.clear()

        def progress(what: str, done: int, total: int) -> None:
            if what.startswith("training"):
                seen.append(done)
                if dies and not asked and done == after:
                    raise Killed

        entry = stage_named("adapt/loraprune")
        run = Run(store, progress=progress, stop_asked=lambda: dies and asked and bool(seen) and seen[-1] >= after)
        values = entry.parameters(**{**TRAINING, "dropout": 0.1}, sparsity=0.5)
        return compute(run, entry, values, {"model": model, "data": data})

    with pytest.raises(Preempted if asked else Killed):
        attempt(dies=True)
    resumed = attempt(dies=False)
    kept = after if asked else after - 1
    assert seen == list(range(kept + 1, 11))
    assert list(store.files.list("journals")) == []
    assert verify(store) == []
    store.files.delete(f"actions/adapt/loraprune/{resumed.key}")
    undisturbed = attempt(dies=False)
    assert "resumed" not in undisturbed.provenance
    assert resumed.artifact == undisturbed.artifact
    assert resumed.provenance["training"]["losses"] == undisturbed.provenance["training"]["losses"]


def test_the_provenance_says_what_went(
    store: Store, import_model: Callable[..., Artifact], make_tokens: Callable[..., Artifact]
) -> None:
    model = import_model("llama")
    entry = stage_named("adapt/loraprune")
    values = entry.parameters(**TRAINING, sparsity=0.5)
    said = compute(Run(store), entry, values, {"model": model, "data": make_tokens(model)}).provenance
    assert said["left"] == {"groups": 1, "channels": 64}
    assert said["share_of_block"] == {"0": 0.5, "1": 0.5, "2": 0.5}
    assert said["sparsity"]["model.layers.1.mlp.down_proj.weight"] == 0.5


def test_half_of_a_channel_more_is_not_removed(
    import_model: Callable[..., Artifact], make_tokens: Callable[..., Artifact], store: Store,
    pruned_with_masks: Callable[..., tuple[Network, Parts]],
) -> None:  # fmt: skip
    model = import_model("llama")
    data = make_tokens(model)
    _, parts = pruned_with_masks(model, data, **TRAINING, sparsity=0.3)
    wide = widths(json.loads(store.read_file(model, "config.json")))
    for index in range(3):
        left = Counts(*map(len, parts.left(index)))
        gone = (wide.groups - left.groups) * wide.group_weights + (wide.channels - left.channels) * wide.channel_weights
        assert 0 <= 0.3 * wide.weights - gone < wide.channel_weights


@pytest.mark.parametrize(
    ("parameters", "sentence"),
    [
        ({"sparsity": 0.95}, "sparsity 0.95 can't be met"),
        ({"sparsity": 0.6, "spare_first": 1, "spare_last": 1}, "more than the 3 blocks that are not spared can lose"),
        ({"sparsity": 0.1, "spare_first": 2, "spare_last": 1}, "leave none of the 3 blocks"),
        ({"sparsity": 0.2, "rank": 4096}, "rank 4096 is more than"),
        ({"sparsity": 0.2, "modules": ["q_proj"]}, "how much FFN channels matter .* add one of gate_proj, up_proj"),
        ({"sparsity": 0.5, "parts": "attention", "modules": ["up_proj"]}, "how much heads matter"),
    ],
)
def test_bad_input_is_told_in_a_sentence(
    parameters: dict[str, Any], sentence: str, import_model: Callable[..., Artifact],
    run_stage: Callable[..., Artifact], make_tokens: Callable[..., Artifact],
) -> None:  # fmt: skip
    model = import_model("llama")
    with pytest.raises(StageError, match=sentence):
        run_stage("adapt/loraprune", {"model": model, "data": make_tokens(model)}, **parameters)


def test_a_pruned_model_and_a_family_that_cannot_lose_heads_are_refused(
    import_model: Callable[..., Artifact], run_stage: Callable[..., Artifact], make_tokens: Callable[..., Artifact]
) -> None:
    model = run_stage("prune/magnitude", {"model": import_model("llama")}, sparsity=0.5)
    with pytest.raises(StageError, match="dense again; name the checkpoint from before"):
        run_stage("adapt/loraprune", {"model": model, "data": make_tokens(model)}, sparsity=0.2)
    model = import_model("opt")
    with pytest.raises(StageError, match="set parts to ffn"):
        run_stage("adapt/loraprune", {"model": model, "data": make_tokens(model)}, sparsity=0.2, rank=4)
    with pytest.raises(ValueError, match="less than 1"):
        stage_named("adapt/loraprune").parameters(sparsity=1.0)


def test_a_loss_that_rises_since_parts_go_is_no_error(
    import_model: Callable[..., Artifact], run_stage: Callable[..., Artifact], make_tokens: Callable[..., Artifact],
    store: Store,
) -> None:  # fmt: skip
    model = import_model("llama")
    inputs = {"model": model, "data": make_tokens(model, samples=8)}
    training = {"batch_size": 4, "dtype": "float32"}
    inputs["model"] = run_stage("adapt/full", inputs, **training, steps=100, learning_rate=1e-2)
    entry = stage_named("adapt/loraprune")
    values = entry.parameters(**training, steps=24, learning_rate=1e-6, sparsity=0.8, every=1)
    losses = compute(Run(store), entry, values, inputs).provenance["training"]["losses"]
    assert losses[-1] > 1.5 * losses[0] + 0.5
    with pytest.raises(StageError, match="is not finite"):
        run_stage("adapt/loraprune", inputs, **training, steps=24, learning_rate=1e30, sparsity=0.5)
