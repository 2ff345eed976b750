"""Depth pruning and layer recipes: which blocks go, and that a rearranged checkpoint computes what it says."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from coldpress.storage.artifacts import Artifact
from coldpress.storage.store import Store
from coldpress.tasks.catalogue import stage_named
from coldpress.tasks.pruning.depth import least_important
from coldpress.tasks.pruning.order import CONFIGURATIONS, CONFIGURED_BLOCKS, parse_order
from coldpress.tasks.pruning.statistics import read_blocks
from coldpress.tasks.stage import ModelFacts, StageError
from elsewhere import TRANSFORMERS, Loaded
from torch import Tensor, nn

BLOCKS = 7


@pytest.fixture
def deep(import_model: Callable[..., Artifact]) -> Artifact:
    return import_model("llama", num_hidden_layers=BLOCKS)


@pytest.fixture
def inputs(deep: Artifact, make_tokens: Callable[..., Artifact]) -> dict[str, Artifact]:
    return {"model": deep, "calibration": make_tokens(deep)}


@pytest.fixture
def whole(whole_model: Callable[..., Any]) -> Any:
    return whole_model("llama", num_hidden_layers=BLOCKS)


@pytest.fixture
def order_of(store: Store) -> Callable[[str], list[int]]:
    """The order that the one action of a stage noted."""

    def read(name: str) -> list[int]:
        (action,) = store.actions(name)
        order: list[int] = action.provenance["order"]
        return order

    return read


def rearranged(model: Any, order: list[int]) -> Any:
    """The whole model with its blocks in another order, each execution with its own place in the cache."""
    blocks = [model.model.layers[index] for index in order]
    model.model.layers = nn.ModuleList(blocks)
    model.config.num_hidden_layers = len(order)
    return model


# Which blocks


def test_the_least_important_go_and_the_first_of_equals() -> None:
    assert least_important([3, 1, 2, 1, 5, 0, 9], 3, plus=False) == [5, 1, 3]
    assert least_important([0, 0, 0, 0, 5, 4, 0, 0], 1, plus=True) == [5]


def test_influence_is_one_minus_the_mean_cosine_of_inputs_and_outputs(
    inputs: dict[str, Artifact], run_stage: Callable[..., Artifact], windows: Callable[[Artifact], Tensor], whole: Any,
    store: Store, order_of: Callable[[str], list[int]],
) -> None:  # fmt: skip
    states: list[Tensor] = []
    for block in whole.model.layers:
        block.register_forward_hook(lambda module, given, output: states.extend([given[0], output]))
    with torch.no_grad():
        whole(windows(inputs["calibration"]), use_cache=False)
    expected = [
        float((1 - torch.cosine_similarity(before.double(), after.double(), dim=-1)).mean())
        for before, after in zip(states[::2], states[1::2], strict=True)
    ]
    assert read_blocks(store, run_stage("statistics/influence", inputs)) == pytest.approx(expected, rel=1e-4)
    run_stage("prune/shortgpt", inputs, blocks=2)
    gone = sorted(range(BLOCKS), key=lambda block: expected[block])[:2]
    assert order_of("prune/shortgpt") == [block for block in range(BLOCKS) if block not in gone]


def test_removal_is_the_perplexity_without_each_block(
    inputs: dict[str, Artifact], run_stage: Callable[..., Artifact], windows: Callable[[Artifact], Tensor],
    whole_model: Callable[..., Any], store: Store, order_of: Callable[[str], list[int]],
) -> None:  # fmt: skip
    expected = []
    for gone in range(BLOCKS):
        model = rearranged(whole_model("llama", num_hidden_layers=BLOCKS), [b for b in range(BLOCKS) if b != gone])
        with torch.no_grad():
            losses = [
                float(model(window[None], labels=window[None], use_cache=False).loss)
                for window in windows(inputs["calibration"])
            ]
        expected.append(torch.tensor(losses).double().mean().exp().item())
    assert read_blocks(store, run_stage("statistics/removal", inputs)) == pytest.approx(expected, rel=1e-4)
    run_stage("prune/shortened-perplexity", inputs, sparsity=0.43)  # 3 of 7
    gone = sorted(range(BLOCKS), key=lambda block: expected[block])[:3]
    assert order_of("prune/shortened-perplexity") == [block for block in range(BLOCKS) if block not in gone]


def test_copies_that_would_fill_the_memory_are_refused(
    inputs: dict[str, Artifact], run_stage: Callable[..., Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("coldpress.tasks.pruning.depth._MOST_COPIES_BYTES", 8 * 6 * 32 * 64 * 4 - 1)
    with pytest.raises(StageError, match="6 windows of 32 tokens without each of 7 blocks"):
        run_stage("statistics/removal", inputs)


def test_taylor_and_magnitude_keep_the_ends_unless_told(
    inputs: dict[str, Artifact], run_stage: Callable[..., Artifact], whole: Any, order_of: Callable[[str], list[int]],
) -> None:  # fmt: skip
    run_stage("prune/shortened-taylor", inputs, blocks=1)
    assert order_of("prune/shortened-taylor") == [0, 1, 2, 3, 5, 6]  # seven blocks without the ends are one
    sums = [sum(float(p.double().abs().sum()) for p in block.parameters()) for block in whole.model.layers]
    run_stage("prune/shortened-magnitude", {"model": inputs["model"]}, blocks=3, plus=False)
    gone = sorted(range(BLOCKS), key=lambda block: sums[block])[:3]
    assert order_of("prune/shortened-magnitude") == [block for block in range(BLOCKS) if block not in gone]


# What the result is


def test_an_arranged_model_is_the_whole_one_with_its_blocks_in_that_order(
    import_model: Callable[..., Artifact], run_stage: Callable[..., Artifact],
    make_tokens: Callable[..., Artifact], windows: Callable[[Artifact], Tensor],
    block_loop_logits: Callable[..., Tensor], read_tensors: Callable[..., dict[str, Tensor]],
    blocks_of: Callable[[str], str], load_elsewhere: Callable[..., dict[str, Loaded]],
) -> None:  # fmt: skip
    orders = {
        "llama": [2, 0, 1, 1, 1, 0],
        "gemma3_text": [2, 1, 1, 0],
        "gemma2": [1, 0],
        "qwen3": [0, 2],
        "mistral": [0, 2, 2],
        "opt": [1, 1, 0],
        "gpt_neox": [2, 0],
    }
    bases = {family: import_model(family) for family in orders}
    models = {}
    for family, order in orders.items():
        models[family] = run_stage("layers/arrange", {"model": bases[family]}, order=order)
        before, after = read_tensors(bases[family]), read_tensors(models[family])
        for new, old in enumerate(order):
            names = [name for name in before if name.startswith(f"{blocks_of(family)}.{old}.")]
            assert names
            for name in names:
                moved = name.replace(f"{blocks_of(family)}.{old}.", f"{blocks_of(family)}.{new}.", 1)
                assert torch.equal(after[moved], before[name]), family
    ids = windows(make_tokens(bases["llama"]))
    for family, loaded in load_elsewhere(TRANSFORMERS, ids, models).items():
        assert torch.allclose(block_loop_logits(models[family], ids), loaded.logits, atol=1e-5), family


def test_repeats_share_their_weights_in_the_store(
    deep: Artifact, run_stage: Callable[..., Artifact], store: Store
) -> None:
    before = store.manifest(deep)
    made = store.manifest(run_stage("layers/arrange", {"model": deep}, order="0-2x3"))
    assert set(made.blobs) - set(before.blobs) == {made.files["config.json"]}
    first, second = (made.tensors[f"model.layers.{index}.mlp.down_proj.weight"] for index in (0, 1))
    assert first.blob == second.blob
    assert len([name for name in made.tensors if name.endswith("down_proj.weight")]) == 9


def test_each_execution_of_a_block_has_its_own_place_in_the_cache(
    deep: Artifact, run_stage: Callable[..., Artifact], export_folder: Callable[..., str],
    make_tokens: Callable[..., Artifact], windows: Callable[[Artifact], Tensor],
) -> None:  # fmt: skip
    from transformers import AutoModelForCausalLM

    folder = export_folder(run_stage("layers/arrange", {"model": deep}, order="0-3 2x2 5-6"))
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    prompt = windows(make_tokens(deep))[:1, :8]
    with torch.no_grad():
        whole = model(prompt, use_cache=False).logits[:, -1]
        cached = model(prompt[:, :-1], use_cache=True)
        last = model(prompt[:, -1:], past_key_values=cached.past_key_values, use_cache=True).logits[:, -1]
    assert len(cached.past_key_values) == 8
    assert torch.allclose(last, whole, atol=1e-4)


def test_masks_and_packed_weights_move_with_their_blocks(
    deep: Artifact, inputs: dict[str, Artifact], run_stage: Callable[..., Artifact], store: Store,
    make_tokens: Callable[..., Artifact], windows: Callable[[Artifact], Tensor],
    block_loop_logits: Callable[..., Tensor],
) -> None:  # fmt: skip
    sparse = run_stage("prune/magnitude", {"model": deep}, sparsity=0.5)
    packed = run_stage("quantize/gptq", {**inputs, "model": sparse}, group_size=32)
    made = run_stage("layers/arrange", {"model": packed}, remove=(1, 2))
    before, after = store.manifest(packed), store.manifest(made)
    name = "mlp.down_proj.weight"
    assert after.masks[f"model.layers.1.{name}"] == before.masks[f"model.layers.3.{name}"]
    assert len(after.masks) == 5 * 7
    assert (after.format, after.quantization) == (before.format, before.quantization)
    ids = windows(make_tokens(deep))
    assert bool(block_loop_logits(made, ids).isfinite().all())


# Layer recipes


def test_there_are_25_configurations_of_as_many_executions_as_were_counted() -> None:
    counts = {name: len(parse_order(order)) for name, order in CONFIGURATIONS.items()}
    assert len(counts) == 25
    counted = {
        "baseline": 32, "0-23_27-31": 29, "15_single_skip": 31, "mid_expansion_with_repeats": 29, "2_3rd_of_llama": 22,
        "2_3rds_plus_llama": 27, "skip_near_end_keep_last_two": 29,
    }  # fmt: skip
    assert {name: counts[name] for name in counted} == counted
    assert all(0 <= block < CONFIGURED_BLOCKS for order in CONFIGURATIONS.values() for block in parse_order(order))


@pytest.mark.parametrize(
    ("text", "order"),
    [("0-2", [0, 1, 2]), ("3x2 1", [3, 3, 1]), ("1-2x2 0", [1, 1, 2, 2, 0]), ("  4  ", [4])],
)
def test_an_order_is_read_part_by_part(text: str, order: list[int]) -> None:
    assert parse_order(text) == order


@pytest.mark.parametrize("text", ["", "3-1", "a", "1,2", "2x0", "-1"])
def test_a_wrong_order_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="order"):
        parse_order(text)


@pytest.mark.parametrize(
    ("method", "parameters", "sentence"),
    [
        ("layers/arrange", {"remove": (2, 32)}, "block 32 is out of range: the model has blocks 0 to 31"),
        ("layers/arrange", {"order": "0-40"}, "block 32 is out of range"),
        ("layers/arrange", {"remove": tuple(range(32))}, "one must stay"),
        ("prune/shortgpt", {"blocks": 32}, "remove at most 31"),
        ("prune/shortened-taylor", {"blocks": 27}, "remove at most 26"),
        ("prune/shortgpt", {"sparsity": 0.01}, "less than one"),
    ],
)
def test_what_a_model_has_no_blocks_for_is_refused(method: str, parameters: dict[str, Any], sentence: str) -> None:
    entry = stage_named(method)
    facts = ModelFacts({"model_type": "llama", "num_hidden_layers": 32})
    (said,) = entry.check(entry.parameters(**parameters), facts)
    assert sentence in said


def test_configurations_are_for_their_number_of_blocks() -> None:
    entry = stage_named("layers/arrange")
    parameters = entry.parameters(configuration="15_single_skip")
    facts = ModelFacts({"model_type": "llama", "num_hidden_layers": 30})
    (said,) = entry.check(parameters, facts)
    assert "32 blocks" in said
    assert "30" in said
    right = ModelFacts({"model_type": "llama", "num_hidden_layers": 32, "layer_types": ["full_attention"] * 32})
    assert list(entry.check(parameters, right)) == []
    after = entry.after(parameters, right).config
    assert after["num_hidden_layers"] == len(after["layer_types"]) == 31


@pytest.mark.parametrize(
    ("method", "parameters", "sentence"),
    [
        ("layers/arrange", {}, "say which blocks run"),
        ("layers/arrange", {"remove": (1,), "order": "0"}, "say which blocks run"),
        ("layers/arrange", {"remove": (1, 1)}, "each once"),
        ("layers/arrange", {"configuration": "15_single_skp"}, "did you mean '15_single_skip'"),
        ("prune/shortgpt", {}, "how much to remove"),
        ("prune/shortgpt", {"blocks": 1, "sparsity": 0.5}, "how much to remove"),
    ],
)
def test_contradictions_are_refused(method: str, parameters: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        stage_named(method).parameters(**parameters)


def test_blocks_that_are_not_there_are_refused_when_the_model_is_known(
    deep: Artifact, run_stage: Callable[..., Artifact]
) -> None:
    with pytest.raises(StageError, match="block 7 is out of range"):
        run_stage("layers/arrange", {"model": deep}, remove=[7])


def test_config_files_say_the_new_number_of_blocks(
    deep: Artifact, run_stage: Callable[..., Artifact], store: Store
) -> None:
    made = run_stage("layers/arrange", {"model": deep}, remove=[6])
    assert json.loads(store.read_file(made, "config.json"))["num_hidden_layers"] == 6
