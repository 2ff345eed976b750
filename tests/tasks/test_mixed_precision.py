"""Layers with their own bits and group sizes: as a recipe says it, or as a budget is spent by measured losses."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import plain_methods
import pytest
import torch
from coldpress.storage.artifacts import Artifact
from coldpress.storage.store import Store
from coldpress.tasks.architectures import block_count, family_of
from coldpress.tasks.catalogue import stage_named
from coldpress.tasks.quantization.precision import GroupParameters, Precision, dynamic_of, precision_of
from coldpress.tasks.sources.locate import SourceError
from coldpress.tasks.stage import ModelFacts, preimage
from pydantic import ValidationError
from torch import Tensor

Tensors = dict[str, Tensor]

LLAMA = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 128,
}  # fmt: skip
MIXED = [
    {"modules": ["down_proj"], "bits": 8, "group_size": 64},
    {"layers": [0], "bits": 3},
    {"modules": ["mlp.down_proj", "v_proj"], "layers": [2, 0], "bits": 2},
    {"modules": ["o_proj"], "layers": [1], "bits": 16},
]


def precision_by_hand(index: int, name: str) -> tuple[int, int] | None:
    """What `MIXED` says of a layer beside 4 bits in groups of 32."""
    last = name.rpartition(".")[2]
    size = 64 if last == "down_proj" else 32
    if last in ("down_proj", "v_proj") and index in (0, 2):
        return 2, size
    if (last, index) == ("o_proj", 1):
        return None
    if index == 0:
        return 3, size
    return (8 if last == "down_proj" else 4), size


def settings_of(store: Store, model: Artifact) -> Mapping[str, Any]:
    found = store.manifest(model).quantization
    assert found is not None
    return found


@pytest.fixture
def llama(import_model: Callable[..., Artifact]) -> Artifact:
    return import_model("llama")


@pytest.fixture
def quantize(
    llama: Artifact, make_tokens: Callable[..., Artifact], run_stage: Callable[..., Artifact]
) -> Callable[..., Artifact]:
    """`quantize("gptq", **parameters)`: the tiny Llama in groups of 32."""

    def run(method: str, **parameters: Any) -> Artifact:
        inputs = {"model": llama, "calibration": make_tokens(llama)}
        return run_stage(f"quantize/{method}", inputs, **{"group_size": 32, **parameters})

    return run


def test_later_overrides_win_and_what_they_leave_out_stays() -> None:
    parameters = GroupParameters.model_validate({"group_size": 32, "overrides": MIXED})
    for module, precision in parameters.precisions(LLAMA).items():
        index, name = int(module.split(".")[2]), module.split(".", 3)[3]
        expected = precision_by_hand(index, name) or (16, 32)
        assert precision == expected, module


def test_room_on_disk_is_planned_for_the_most_that_a_layer_can_get() -> None:
    assert GroupParameters.model_validate({"bits": 3}).most_bits == 3
    assert GroupParameters.model_validate({"overrides": MIXED}).most_bits == 16
    assert GroupParameters.model_validate({"budget": {"megabytes": 1}}).most_bits == 8
    assert GroupParameters.model_validate({"budget": {"megabytes": 1}, "choices": [{"bits": 2}]}).most_bits == 2


def test_the_settings_say_of_every_module_what_was_planned() -> None:
    for family in ("llama", "opt", "gpt_neox"):
        config = {**LLAMA, "model_type": family, "ffn_dim": 128, "num_hidden_layers": 12}
        draw = random.Random(family)
        linears = family_of(config).linears
        plan = {
            f"{family_of(config).block_prefix(index)}{linear.name}": draw.choice(
                [*map(Precision, (2, 4, 16), (32, 64, 32))]
            )
            for index in range(block_count(config))
            for linear in linears
        }
        usual = Precision(4, 64)
        settings = {"bits": 4, "group_size": 64, "dynamic": dynamic_of(plan, usual, config)}
        found = {module: precision_of(settings, module) for module in plan}
        assert found == {module: None if one.bits == 16 else one for module, one in plan.items()}
        shuffled = {**settings, "dynamic": dict(reversed(settings["dynamic"].items()))}  # files have sorted keys
        assert found == {module: precision_of(shuffled, module) for module in plan}


def test_gptqmodel_reads_the_same_of_the_settings() -> None:
    pytest.importorskip("gptqmodel")
    from gptqmodel.quantization.config import dynamic_get

    parameters = GroupParameters.model_validate({"group_size": 32, "overrides": MIXED})
    plan = parameters.precisions(LLAMA)
    dynamic = dynamic_of(plan, Precision(4, 32), LLAMA)
    for module, precision in plan.items():
        found = dynamic_get(dynamic, module, default={"bits": 4, "group_size": 32})
        assert found == (False if precision.bits == 16 else precision._asdict()), module
    foreign = {
        "dynamic": {r"-:.*\.1\.": {}, r"model\.layers\.[01]\..*v_proj": {"bits": 8}},
        "bits": 4,
        "group_size": 32,
    }
    for module in plan:
        theirs = dynamic_get(foreign["dynamic"], module, default={})
        ours = precision_of(foreign, module)
        assert ours == (None if theirs is False else (theirs.get("bits", 4), 32)), module


def test_layers_that_inference_engines_merge_are_found_under_the_merged_name() -> None:
    parameters = GroupParameters.model_validate(
        {"overrides": [{"layers": [1], "bits": 8}, {"modules": ["up_proj"], "layers": [1], "bits": 2}]}
    )
    settings = {
        "bits": 4,
        "group_size": 128,
        "dynamic": dynamic_of(parameters.precisions(LLAMA), Precision(4, 128), LLAMA),
    }
    assert precision_of(settings, "model.layers.1.self_attn.qkv_proj") == (8, 128)
    assert precision_of(settings, "model.layers.1.mlp.gate_up_proj") == (4, 128)  # the two differ
    assert precision_of(settings, "model.layers.11.self_attn.qkv_proj") == (4, 128)


def test_without_overrides_and_budget_keys_and_settings_are_what_they_were(
    store: Store, quantize: Callable[..., Artifact]
) -> None:
    entry = stage_named("quantize/gptq")
    parameters = entry.parameters(overrides=[], budget=None, choices=None)
    assert preimage(entry, parameters, {})["parameters"] == {}
    assert "dynamic" not in settings_of(store, quantize("rtn"))
    ruled = entry.parameters(overrides=MIXED)
    assert preimage(entry, ruled, {})["parameters"] == {"overrides": MIXED}


def test_parameters_stay_what_they_are_on_their_way_to_another_process() -> None:
    budget = {"budget": {"megabytes": 3}, "choices": [{"bits": 3}, {"bits": 8, "group_size": 32}]}
    for given in ({"overrides": MIXED}, budget, {}):
        for method in ("rtn", "gptq", "awq"):
            parameters = stage_named(f"quantize/{method}").parameters(**given)
            sent = json.loads(json.dumps(parameters.model_dump(mode="json")))
            again = type(parameters).model_validate(sent)
            assert again == parameters
            assert again.for_key() == parameters.for_key()


@pytest.mark.parametrize("method", ["rtn", "gptq", "awq"])
def test_each_layer_is_what_a_checkpoint_of_its_precision_alone_has(
    method: str, store: Store, quantize: Callable[..., Artifact], dense_weights: Callable[..., Tensors], llama: Artifact
) -> None:
    options: dict[str, Any] = {"symmetric": False}
    mixed = quantize(method, overrides=MIXED, **options)
    weights, dense = dense_weights(mixed), dense_weights(llama)
    assert weights.keys() == dense.keys()
    for module, weight in weights.items():
        index, name = int(module.split(".")[2]), module.split(".", 3)[3]
        precision = precision_by_hand(index, name)
        if precision is None:
            assert method == "awq" or torch.equal(weight, dense[module])
            continue
        bits, size = precision
        assert precision_of(settings_of(store, mixed), module) == precision
        rows, columns = weight.shape
        grouped = weight.reshape(rows, columns // size, size)
        counts = torch.tensor([[len(group.unique()) for group in row] for row in grouped])
        assert int(counts.max()) <= 2**bits, module
        assert bits == 8 or int(counts.max()) > 2 ** (bits - 1), module
        if method == "rtn":
            expected = plain_methods.round_to_nearest(dense[module], bits, size, False).float()
            assert torch.isclose(weight, expected, rtol=1e-6).double().mean() >= 0.999, module


def test_awq_with_its_own_precisions_computes_with_what_is_stored(
    quantize: Callable[..., Artifact],
    whole_model: Callable[..., Any],
    make_tokens: Callable[..., Artifact],
    windows: Callable[[Artifact], Tensor],
    llama: Artifact,
    block_loop_logits: Callable[..., Tensor],
) -> None:
    ids = windows(make_tokens(llama))
    fine = [{"bits": 8}, {"modules": ["q_proj", "o_proj", "up_proj"], "bits": 16}]
    logits = block_loop_logits(quantize("awq", overrides=fine), ids)
    with torch.no_grad():
        expected = torch.cat([whole_model("llama")(window[None]).logits for window in ids])
    assert (logits - expected).abs().mean() < 0.02 * expected.std()  # scales came out where they went in


def test_joint_pruning_takes_overrides(
    quantize: Callable[..., Artifact], dense_weights: Callable[..., Tensors]
) -> None:
    weights = dense_weights(quantize("sparsegpt-gptq", sparsity=0.5, overrides=[{"modules": ["k_proj"], "bits": 2}]))
    for module, weight in weights.items():
        values = max(len(group.unique()) for group in weight.reshape(-1, 32))
        assert values <= (4 if module.endswith("k_proj") else 16), module
        assert float((weight == 0).double().mean()) >= 0.5


def test_size_counts_what_mixed_layers_take(
    quantize: Callable[..., Artifact], run_stage: Callable[..., Artifact], read_metrics: Callable[..., dict[str, Any]]
) -> None:
    overrides = [{"bits": 2}, {"layers": [1], "bits": 16}]
    found = read_metrics(run_stage("evaluate/size", {"model": quantize("rtn", overrides=overrides)}))
    uniform = read_metrics(run_stage("evaluate/size", {"model": quantize("rtn", bits=2)}))
    assert found["bits_per_weight"] == pytest.approx((2 * uniform["bits_per_weight"] + 32) / 3)


def test_a_mixed_checkpoint_comes_back_from_its_export(
    store: Store,
    quantize: Callable[..., Artifact],
    run_stage: Callable[..., Artifact],
    export_folder: Callable[..., str],
    dense_weights: Callable[..., Tensors],
) -> None:
    mixed = quantize("gptq", overrides=MIXED)
    again = run_stage("source/model", {}, source=export_folder(mixed))
    assert settings_of(store, again) == settings_of(store, mixed)
    before, after = dense_weights(mixed), dense_weights(again)
    assert all(torch.equal(before[module], after[module]) for module in before)


def test_compensation_makes_up_for_mixed_layers(
    quantize: Callable[..., Artifact],
    llama: Artifact,
    run_stage: Callable[..., Artifact],
    dense_weights: Callable[..., Tensors],
) -> None:
    mixed = quantize("rtn", overrides=MIXED)
    adapter = run_stage("compensate/svd", {"model": mixed, "original": llama}, rank=8)
    dense, before, after = (dense_weights(model) for model in (llama, mixed, adapter))
    for module, weight in dense.items():
        if not torch.equal(before[module], weight):
            assert (after[module] - weight).norm() < (before[module] - weight).norm(), module


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        ([{"bits": 8}, {"modules": ["downproj"], "bits": 8}], "overrides[1]: a block has no module 'downproj'; it has"),
        ([{"layers": [3], "bits": 8}], "overrides[0]: there is no layer 3; the model has 3, 0 to 2"),
        ([{"layers": [-1], "bits": 8}], "there is no layer -1"),
        (
            [{"modules": ["down_proj"], "group_size": 48}],
            "group_size 48 does not divide the 128 inputs of mlp.down_proj",
        ),
        ([{"layers": [1], "group_size": 0}], "group_size 0 is neither positive nor -1"),
        ([{"bits": 16}], "leaves nothing to quantize"),
    ],
)
@pytest.mark.parametrize("method", ["rtn", "gptq", "awq", "sparsegpt-gptq"])
def test_impossible_overrides_are_known_before_anything_runs(
    method: str, overrides: list[dict[str, Any]], sentence: str
) -> None:
    entry = stage_named(f"quantize/{method}")
    sparsity = {"sparsity": 0.5} if method == "sparsegpt-gptq" else {}
    errors = list(entry.check(entry.parameters(group_size=32, overrides=overrides, **sparsity), ModelFacts(LLAMA)))
    assert any(sentence in error for error in errors), errors


@pytest.mark.parametrize(
    ("parameters", "sentence"),
    [
        ({"overrides": [{"layers": [1]}]}, "says neither bits nor group_size"),
        ({"overrides": [{"bits": 16, "group_size": 32}]}, "drop group_size"),
        ({"overrides": [{"bits": 5}]}, "2, 3, 4, 8 or 16"),
        ({"choices": [{"bits": 3}]}, "choices are for 'budget'"),
        ({"budget": {"bits_per_weight": 3}, "bits": 3}, "drop bits"),
        ({"budget": {"bits_per_weight": 3}, "overrides": [{"bits": 8}]}, "drop one of them"),
        ({"budget": {}}, "write either"),
        ({"budget": {"bits_per_weight": 3, "megabytes": 3}}, "write either"),
        ({"budget": {"megabytes": 3}, "choices": [{"bits": 3}, {"bits": 3, "group_size": 128}]}, "an entry twice"),
    ],
    ids=str,
)
def test_contradictions_are_refused(parameters: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValidationError, match=sentence):
        stage_named("quantize/rtn").parameters(**parameters)


def test_awqs_own_format_has_one_precision() -> None:
    entry = stage_named("quantize/awq")
    for parameters in ({"overrides": [{"layers": [1], "group_size": 64}]}, {"budget": {"bits_per_weight": 5}}):
        (error,) = entry.check(entry.parameters(group_size=32, format="awq", **parameters), ModelFacts(LLAMA))
        assert "write format: gptq" in error


def test_foreign_patterns_whose_order_counts_are_refused(
    quantize: Callable[..., Artifact], export_folder: Callable[..., str], run_stage: Callable[..., Artifact]
) -> None:

    folder = export_folder(quantize("rtn"))
    path = Path(folder) / "config.json"
    config = json.loads(path.read_text())
    for dynamic, says in (
        ({r".*v_proj": {"bits": 8}, r".*\.1\.": {"bits": 2}}, r"several patterns .* model.layers.1.self_attn.v_proj"),
        ({r".*v_proj": {"bits": 5}}, "v_proj is quantized to 5 bits"),
    ):
        config["quantization_config"]["dynamic"] = dynamic
        path.write_text(json.dumps(config))
        with pytest.raises(SourceError, match=says):
            run_stage("source/model", {}, source=folder)
