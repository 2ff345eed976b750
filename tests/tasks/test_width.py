"""Width pruning: a narrower model computes what the whole one does with the removed parts masked."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import plain_methods
import pytest
import torch
from coldpress.storage.artifacts import Artifact, ArtifactReader
from coldpress.storage.store import Store
from coldpress.tasks.architectures import UnsupportedModel, narrowed_config, widths
from coldpress.tasks.catalogue import stage_named
from coldpress.tasks.pruning.width import (
    Counts,
    Moments,
    best_by_weight,
    best_of_structure,
    fluctuation_score,
    highest,
    removed_output,
    uniform_counts,
)
from coldpress.tasks.stage import ModelFacts, StageError
from elsewhere import TRANSFORMERS, Loaded
from torch import Tensor

Tensors = dict[str, Tensor]
LLAMA_7B = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "vocab_size": 32000, "dtype": "float16",
}  # fmt: skip
GATED = ["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text"]
FFN = {"opt": ("fc1", "fc2"), "gpt_neox": ("mlp.dense_h_to_4h", "mlp.dense_4h_to_h")}


# The maths


def test_moments_are_those_of_all_tokens_together() -> None:
    inputs = torch.randn(50, 7, generator=torch.Generator().manual_seed(0)) * 3 + 100
    inputs[:, 2] = 5.0
    moments = Moments(7)
    for part in inputs.split(13):
        moments.add(part)
    assert torch.allclose(moments.mean(), inputs.double().mean(0).float())
    assert torch.allclose(moments.variance(), inputs.double().var(0).float(), rtol=1e-6)
    assert torch.allclose(moments.norm(), inputs.double().norm(dim=0).float())
    assert float(moments.variance()[2]) == 0


@pytest.mark.parametrize("sparsity", [0.1, 0.2, 0.5, 0.9])
def test_the_share_of_the_weights_is_met_within_a_channel(sparsity: float) -> None:
    for changes in ({}, {"num_key_value_heads": 4}, {"num_attention_heads": 9, "hidden_size": 576, "head_dim": 64,
                         "num_key_value_heads": 3, "intermediate_size": 1536}):  # fmt: skip
        wide = widths({**LLAMA_7B, **changes})
        left = uniform_counts(wide, sparsity)
        gone = (wide.groups - left.groups) * wide.group_weights + (wide.channels - left.channels) * wide.channel_weights
        assert 0 <= sparsity * wide.weights - gone < wide.channel_weights
        assert wide.groups - left.groups == int(wide.groups * sparsity)


def test_parts_and_multiples_are_kept_to() -> None:
    wide = widths(LLAMA_7B)
    assert uniform_counts(wide, 0.25, "attention") == (24, 11008)
    assert uniform_counts(wide, 0.25, "ffn") == (32, 8256)
    assert uniform_counts(wide, 0.3, "ffn", 64) == (32, 7744)  # 7706 or more, in 64s
    assert uniform_counts(wide, 0.99, "attention") == (1, 11008)
    assert uniform_counts(wide, 0.999).channels == 1


def test_a_head_weighs_what_it_has_of_weights() -> None:
    wide = widths(LLAMA_7B)
    assert wide.group_weights / wide.channel_weights == pytest.approx(512 / 3)
    assert wide.groups * wide.group_weights + wide.channels * wide.channel_weights == wide.weights


def test_what_stays_comes_nearest_to_the_share_of_the_weight() -> None:
    generator = torch.Generator().manual_seed(3)
    score, weights = torch.rand(9, generator=generator), torch.randint(1, 9, (9,), generator=generator).double()
    order = score.argsort(descending=True)
    for share in (0.2, 0.5, 0.8):
        reached = [float(weights[order[: count + 1]].sum()) for count in range(9)]
        nearest = min(range(9), key=lambda count: abs(reached[count] - share * float(weights.sum())))
        assert best_by_weight(score, weights, share).nonzero()[:, 0].tolist() == sorted(order[: nearest + 1].tolist())


def test_of_equal_scores_the_last_stay() -> None:
    assert highest(torch.tensor([1.0, 3.0, 1.0, 1.0, 2.0]), 3).tolist() == [1, 3, 4]


@pytest.mark.parametrize("structure", ["UL-UM", "AL-MM", "AL-AM"])
def test_structures_remove_their_share_where_they_say(structure: str) -> None:
    wide = widths({**LLAMA_7B, "hidden_size": 32, "intermediate_size": 100, "num_attention_heads": 8, "head_dim": 4})
    generator = torch.Generator().manual_seed(1)
    attention, ffn = torch.rand(6, 32, generator=generator), torch.rand(6, 100, generator=generator)
    ffn[4] = ffn[4] ** 8  # few channels matter here
    left = best_of_structure(attention, ffn, wide, 0.4, structure)
    groups, channels = [len(one.groups) for one in left], [len(one.channels) for one in left]
    by_block = [g * wide.group_weights + c * wide.channel_weights for g, c in zip(groups, channels, strict=True)]
    tolerance = wide.group_weights  # a head is the coarsest part
    assert abs(sum(by_block) - 0.6 * 6 * wide.weights) <= tolerance
    assert min(groups) >= 1
    assert min(channels) >= 1
    if structure == "UL-UM":
        assert len(set(groups)) == len(set(channels)) == 1
    else:
        assert len(set(channels)) > 1
    if structure == "AL-MM":
        assert (sum(groups), sum(channels)) == (round(0.6 * 48), 360)


def test_a_bias_makes_up_exactly_for_removed_channels_that_are_constant() -> None:
    torch.manual_seed(0)
    weight, inputs = torch.randn(5, 8), torch.randn(30, 8)
    inputs[:, [1, 6]] = torch.tensor([2.0, -3.0])
    left = torch.tensor([0, 2, 3, 4, 5, 7])
    bias = removed_output(weight, inputs.mean(0), left)
    assert torch.allclose(inputs[:, left] @ weight[:, left].T + bias, inputs @ weight.T, atol=1e-5)


def test_fluctuation_scores_by_hand() -> None:
    moments = Moments(2)
    moments.add(torch.tensor([[1.0, 3.0], [3.0, 3.0]]))
    weight = torch.tensor([[2.0, 1.0], [-1.0, 4.0]])
    assert fluctuation_score(weight, moments, "IFV").tolist() == [2.0, 0.0]
    assert fluctuation_score(weight, moments, "WIFV").tolist() == [2.0 * 5, 0.0]
    assert fluctuation_score(weight, moments, "WIFN").tolist() == pytest.approx([1.5 * 10**0.5, 2.5 * 18**0.5])


# The stages


@pytest.fixture
def removed_by_magnitude() -> Callable[..., list[tuple[list[int], list[int]]]]:
    """The (groups, channels) with the smallest column norms of each block of a whole gated model."""

    def find(model: Any, counts: Counts) -> list[tuple[list[int], list[int]]]:
        removed = []
        for block in model.model.layers:
            o, down = block.self_attn.o_proj.weight, block.mlp.down_proj.weight
            heads = o.norm(dim=0).view(model.config.num_key_value_heads, -1).sum(1)
            gone = len(heads) - counts.groups
            channels = down.norm(dim=0)
            removed.append(
                (heads.argsort()[:gone].tolist(), channels.argsort()[: len(channels) - counts.channels].tolist())
            )
        return removed

    return find


def mask_columns(model: Any, removed: list[tuple[list[int], list[int]]]) -> None:
    for block, (groups, channels) in zip(model.model.layers, removed, strict=True):
        o = block.self_attn.o_proj.weight
        o.view(len(o), model.config.num_key_value_heads, -1)[:, groups] = 0
        block.mlp.down_proj.weight[:, channels] = 0


@pytest.mark.parametrize("family", GATED)
def test_a_narrower_model_computes_what_the_masked_one_does(
    family: str, import_model: Callable[..., Artifact], whole_model: Callable[..., Any],
    run_stage: Callable[..., Artifact], make_tokens: Callable[..., Artifact], windows: Callable[[Artifact], Tensor],
    block_loop_logits: Callable[..., Tensor], store: Store, removed_by_magnitude: Callable[..., Any],
) -> None:  # fmt: skip
    base = import_model(family)
    narrow = run_stage("prune/magnitude-sp", {"model": base}, sparsity=0.5)
    config = json.loads(store.read_file(narrow, "config.json"))
    assert (config["num_attention_heads"], config["num_key_value_heads"]) == (2, 1)
    assert config["intermediate_size"] == 64
    model, ids = whole_model(family), windows(make_tokens(base))
    mask_columns(model, removed_by_magnitude(model, Counts(1, 64)))
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
    assert torch.allclose(block_loop_logits(narrow, ids), expected, atol=1e-4)


@pytest.mark.parametrize("family", FFN)
def test_families_without_heads_to_lose_lose_channels(
    family: str, import_model: Callable[..., Artifact], whole_model: Callable[..., Any],
    run_stage: Callable[..., Artifact], make_tokens: Callable[..., Artifact], windows: Callable[[Artifact], Tensor],
    block_loop_logits: Callable[..., Tensor], blocks_of: Callable[[str], str], store: Store,
) -> None:  # fmt: skip
    base = import_model(family)
    config = json.loads(store.read_file(base, "config.json"))
    entry = stage_named("prune/magnitude-sp")
    (said,) = entry.check(entry.parameters(sparsity=0.25), ModelFacts(config))
    assert "set parts to ffn" in said
    narrow = run_stage("prune/magnitude-sp", {"model": base}, sparsity=0.25, parts="ffn")
    model, ids = whole_model(family), windows(make_tokens(base))
    for block in model.get_submodule(blocks_of(family)):
        down = block.get_submodule(FFN[family][1]).weight
        down[:, down.norm(dim=0).argsort()[:32]] = 0
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
    assert torch.allclose(block_loop_logits(narrow, ids), expected, atol=1e-4)


def test_wanda_sp_sees_what_the_narrower_blocks_before_pass_on(
    import_model: Callable[..., Artifact], whole_model: Callable[..., Any], run_stage: Callable[..., Artifact],
    make_tokens: Callable[..., Artifact], windows: Callable[[Artifact], Tensor],
    block_loop_logits: Callable[..., Tensor],
) -> None:  # fmt: skip
    base = import_model("llama")
    tokens = make_tokens(base)
    narrow = run_stage("prune/wanda-sp", {"model": base, "calibration": tokens}, sparsity=0.5)
    model = whole_model("llama")
    plain_methods.wanda_sp(model, "model.layers", windows(tokens), 1, 64)
    ids = windows(make_tokens(base, seed=1))
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
    assert torch.allclose(block_loop_logits(narrow, ids), expected, atol=1e-4)


def squared_error(logits: Tensor, expected: Tensor) -> float:
    return float((logits - expected).square().mean())


def test_the_bias_of_flap_lowers_the_error(
    import_model: Callable[..., Artifact], whole_model: Callable[..., Any], run_stage: Callable[..., Artifact],
    make_tokens: Callable[..., Artifact], windows: Callable[[Artifact], Tensor],
    block_loop_logits: Callable[..., Tensor],
) -> None:  # fmt: skip
    base = import_model("llama")
    tokens = make_tokens(base)
    inputs = {"model": base, "calibration": tokens}
    ids = windows(tokens)
    with torch.no_grad():
        dense = whole_model("llama")(ids, use_cache=False).logits
    errors = {
        bias: squared_error(
            block_loop_logits(run_stage("prune/flap", inputs, sparsity=0.3, parts="ffn", bias=bias), ids), dense
        )
        for bias in (True, False)
    }
    assert errors[True] < errors[False]


def test_flap_keeps_the_mean_of_what_it_removes(
    import_model: Callable[..., Artifact], whole_model: Callable[..., Any], run_stage: Callable[..., Artifact],
    make_tokens: Callable[..., Artifact], windows: Callable[[Artifact], Tensor], read_tensors: Callable[..., Tensors],
) -> None:  # fmt: skip
    base = import_model("llama")
    tokens = make_tokens(base)
    narrow = read_tensors(run_stage("prune/flap", {"model": base, "calibration": tokens}, sparsity=0.5))
    model = whole_model("llama")
    for inputs in plain_methods.progressively(model, "model.layers", windows(tokens)):
        for layer, size in (("o_proj", 32), ("down_proj", 1)):
            name = next(name for name in inputs if layer in name)
            seen, weight = torch.cat(inputs[name]).double(), model.get_parameter(name).double()
            inputs_score = seen.var(0) * weight.square().sum(0)
            score = (inputs_score if size == 1 else inputs_score.square()).view(-1, size).sum(1)
            kept = narrow[name].shape[1] // size
            gone = score.argsort()[: len(score) - kept]
            expected = (
                weight.view(len(weight), -1, size)[:, gone].flatten(1) @ seen.mean(0).view(-1, size)[gone].flatten()
            )
            bias = narrow[name.replace("weight", "bias")]
            assert torch.allclose(bias.double(), expected, atol=1e-4), name
    for layer in ("self_attn.q_proj", "self_attn.k_proj", "mlp.gate_proj"):
        assert not narrow[f"model.layers.0.{layer}.bias"].any()


@pytest.mark.parametrize("importance", ["param_first", "param_second", "param_mix", "vectorize"])
def test_taylors_estimates_are_those_of_whole_model_backpropagation(
    importance: str, import_model: Callable[..., Artifact], whole_model: Callable[..., Any],
    run_stage: Callable[..., Artifact], make_tokens: Callable[..., Artifact], windows: Callable[[Artifact], Tensor],
    read_tensors: Callable[..., Tensors],
) -> None:  # fmt: skip
    base = import_model("llama")
    tokens = make_tokens(base)
    found = read_tensors(run_stage("statistics/taylor", {"model": base, "calibration": tokens}))
    model, ids = whole_model("llama").requires_grad_(True), windows(tokens)
    first: Tensors = {}
    second: Tensors = {}
    for window in ids:
        model.zero_grad()
        model(window[None], labels=window[None], use_cache=False).loss.backward()
        for name, parameter in model.named_parameters():
            if ".layers." in name:
                gradient = parameter.grad.double() / len(ids)
                first[name] = first.get(name, 0) + gradient
                second[name] = second.get(name, 0) + gradient.square() * len(ids)
    for index in range(3):
        prefix = f"model.layers.{index}."
        changes = {
            name: weight.detach().double() * first[name]
            for name, weight in model.named_parameters()
            if name.startswith(prefix)
        }
        block = sum(float(change.abs().sum()) for change in changes.values())
        assert float(found[f"{prefix}block"]) == pytest.approx(block, rel=1e-3)

        def lines(layer: str, dim: int, prefix: str = prefix, changes: Tensors = changes) -> Tensor:
            name = f"{prefix}{layer}.weight"
            change, w = changes[name], model.get_parameter(name).detach().double()
            curvature = w.square() * second[name]
            match importance:
                case "param_first":
                    return change.abs().sum(dim)
                case "param_second":
                    return curvature.sum(dim)
                case "param_mix":
                    return (change - curvature / 2).abs().sum(dim)
            return change.sum(dim).abs()

        heads = sum(lines(f"self_attn.{layer}_proj", 1).view(2, -1).sum(1) for layer in "qkv")
        heads = heads + lines("self_attn.o_proj", 0).view(2, -1).sum(1)
        channels = lines("mlp.gate_proj", 1) + lines("mlp.up_proj", 1) + lines("mlp.down_proj", 0)
        assert torch.allclose(found[f"{prefix}group.{importance}"].double(), heads, rtol=1e-3)
        assert torch.allclose(found[f"{prefix}channel.{importance}"].double(), channels, rtol=2e-3, atol=1e-7)


def test_llm_pruner_removes_what_scores_lowest_and_spares_the_ends(
    import_model: Callable[..., Artifact], run_stage: Callable[..., Artifact], make_tokens: Callable[..., Artifact],
    read_tensors: Callable[..., Tensors], store: Store,
) -> None:  # fmt: skip
    base = import_model("llama", num_hidden_layers=4)
    inputs = {"model": base, "calibration": make_tokens(base)}
    scores = read_tensors(run_stage("statistics/taylor", inputs))
    whole = read_tensors(base)
    narrow = read_tensors(run_stage("prune/llm-pruner", inputs, sparsity=0.5))
    for index in range(4):
        name = f"model.layers.{index}.mlp.down_proj.weight"
        kept = scores[f"model.layers.{index}.channel.param_first"].argsort()[64:].sort().values
        assert torch.equal(narrow[name], whole[name][:, kept])
    settings = {"sparsity": 0.25, "spare_first": 1, "spare_last": 1, "parts": "ffn"}
    spared = run_stage("prune/llm-pruner", inputs, **settings)
    tensors = read_tensors(spared)
    with ArtifactReader(store, spared) as reader:
        masks = reader.masks({name: tuple(t.shape) for name, t in tensors.items() if t.dim() == 2})  # type: ignore[misc]
    for index, gone in enumerate((0, 64, 64, 0)):
        name = f"model.layers.{index}.mlp.down_proj.weight"
        assert tensors[name].shape == whole[name].shape
        assert int((tensors[name] == 0).all(0).sum()) == gone
        if gone:
            assert torch.equal(masks[name], tensors[name] != 0)


def test_masks_of_unstructured_pruning_lose_the_same_parts(
    import_model: Callable[..., Artifact], run_stage: Callable[..., Artifact], read_tensors: Callable[..., Tensors],
    store: Store,
) -> None:  # fmt: skip
    sparse = run_stage("prune/magnitude", {"model": import_model("llama")}, sparsity=0.5)
    narrow = run_stage("prune/magnitude-sp", {"model": sparse}, sparsity=0.5)
    tensors = read_tensors(narrow)
    with ArtifactReader(store, narrow) as reader:
        names = list(reader.manifest.masks)
        masks = reader.masks({name: tuple(tensors[name].shape) for name in names})  # type: ignore[misc]
    assert len(names) == 3 * 7
    assert all(torch.equal(masks[name], tensors[name] != 0) for name in names)


def test_narrower_models_load_in_transformers_with_equal_logits(
    import_model: Callable[..., Artifact], run_stage: Callable[..., Artifact], make_tokens: Callable[..., Artifact],
    windows: Callable[[Artifact], Tensor], block_loop_logits: Callable[..., Tensor], store: Store,
    load_elsewhere: Callable[..., dict[str, Loaded]],
) -> None:  # fmt: skip
    models = {}
    for family in (*GATED, *FFN):
        base = import_model(family)
        parts = {"parts": "ffn"} if family in FFN else {}
        inputs = {"model": base, "calibration": make_tokens(base)}
        models[family] = run_stage("prune/wanda-sp", inputs, sparsity=0.5, **parts)
        if family in ("llama", "opt"):
            models[f"{family} with biases"] = run_stage("prune/flap", inputs, sparsity=0.5, **parts)
    wide = import_model("llama", num_attention_heads=4, num_key_value_heads=4)
    inputs = {"model": wide, "calibration": make_tokens(wide)}
    models["three heads"] = run_stage("prune/wanda-sp", inputs, sparsity=0.3)
    models["widths of their own"] = run_stage("prune/flap", inputs, sparsity=0.3, structure="AL-AM")
    config = json.loads(store.read_file(models["three heads"], "config.json"))
    assert (config["model_type"], config["num_attention_heads"]) == ("mistral", 3)
    ids = windows(make_tokens(wide))
    found = load_elsewhere(TRANSFORMERS, ids, models)
    wrong = [
        name for name, model in models.items()
        if not torch.allclose(block_loop_logits(model, ids), found[name].logits, atol=1e-5)
    ]  # fmt: skip
    assert wrong == []


@pytest.mark.parametrize(
    ("config", "parameters", "method", "sentence"),
    [
        (LLAMA_7B, {"sparsity": 0.2}, "flap", "or bias to false"),
        ({**LLAMA_7B, "model_type": "mistral"}, {"sparsity": 0.5}, "flap", "no place for biases"),
        ({**LLAMA_7B, "model_type": "gemma2"}, {"sparsity": 0.2}, "wanda-sp", "set parts to ffn"),
        (LLAMA_7B, {"sparsity": 0.2, "spare_first": 30, "spare_last": 2}, "llm-pruner", "leave none"),
        (LLAMA_7B, {"sparsity": 0.5, "spare_first": 20}, "llm-pruner", "spare fewer"),
    ],
)
def test_what_no_stock_config_can_say_is_refused(
    config: dict[str, Any], parameters: dict[str, Any], method: str, sentence: str
) -> None:
    entry = stage_named(f"prune/{method}")
    (said,) = entry.check(entry.parameters(**parameters), ModelFacts(config))
    assert sentence in said


@pytest.mark.parametrize(
    ("parameters", "sentence"),
    [
        ({"sparsity": 0.4, "parts": "attention"}, "0.4 of 2 groups of heads and 128 channels removes none"),
        ({"sparsity": 0.1, "parts": "ffn", "multiple_of": 64}, "removes none"),
        ({"sparsity": 0.95}, "sparsity 0.95 can't be met: 1 of 2 groups of heads stay"),
    ],
)
def test_a_share_that_cannot_be_met_is_refused(parameters: dict[str, Any], sentence: str) -> None:
    config = {**LLAMA_7B, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4,
              "num_key_value_heads": 2}  # fmt: skip
    entry = stage_named("prune/magnitude-sp")
    (said,) = entry.check(entry.parameters(**parameters), ModelFacts(config))
    assert sentence in said


def test_biases_need_a_place_in_opt_too() -> None:
    config = {"model_type": "opt", "hidden_size": 64, "ffn_dim": 128, "num_attention_heads": 4, "num_hidden_layers": 2}
    entry = stage_named("prune/flap")
    parameters = entry.parameters(sparsity=0.5, parts="ffn")
    assert list(entry.check(parameters, ModelFacts(config))) == []
    (said,) = entry.check(parameters, ModelFacts({**config, "enable_bias": False}))
    assert "no place for biases" in said


def test_what_follows_blocks_of_widths_of_their_own_is_checked_when_the_width_is_known(
    import_model: Callable[..., Artifact], run_stage: Callable[..., Artifact], make_tokens: Callable[..., Artifact]
) -> None:
    base = import_model("llama")
    inputs = {"model": base, "calibration": make_tokens(base)}
    odd = run_stage("prune/flap", inputs, sparsity=0.5, structure="AL-AM")
    with pytest.raises(StageError, match="block_size 64 does not divide"):
        run_stage("quantize/nf4", {"model": odd})
    even = run_stage("prune/flap", inputs, sparsity=0.5, structure="AL-AM", multiple_of=32)
    run_stage("quantize/gptq", {**inputs, "model": even}, group_size=32)


def test_heads_alone_do_not_compete() -> None:
    with pytest.raises(ValueError, match="structure AL-AM is for parts all and ffn"):
        stage_named("prune/flap").parameters(sparsity=0.5, parts="attention", structure="AL-AM")


def test_head_counts_that_divide_stay_llama() -> None:
    for groups, kind in ((16, "llama"), (24, "mistral")):
        assert narrowed_config(LLAMA_7B, groups, 11008)["model_type"] == kind
    with pytest.raises(UnsupportedModel):
        narrowed_config({**LLAMA_7B, "attention_bias": True}, 24, 11008)
    biased = narrowed_config(LLAMA_7B, 16, 64, ("mlp",))
    assert (biased["mlp_bias"], biased.get("attention_bias"), biased["head_dim"]) == (True, None, 128)
