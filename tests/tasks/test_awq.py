"""AWQ: scales move into other modules without a trace, and the searches find what plain ones do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import plain_methods
import pytest
import torch
from coldpress.storage.artifacts import Artifact
from coldpress.storage.store import Store
from coldpress.tasks.architectures import FAMILIES, folds_of, known_model_types
from coldpress.tasks.catalogue import stage_named
from coldpress.tasks.quantization import awq_format
from coldpress.tasks.quantization.awq import InputSummary, Rounding, clip, pooled, search_scale
from coldpress.tasks.quantization.folding import fold_scale, storable_scale
from coldpress.tasks.quantization.grid import Solution
from coldpress.tasks.stage import ModelFacts
from torch import Tensor

Tensors = dict[str, Tensor]

ALL_FOUR = {"attention input", "attention output", "mlp input", "mlp activation"}
CASES: dict[str, tuple[str, dict[str, Any], set[str]]] = {
    **{family: (family, {}, ALL_FOUR) for family in known_model_types()},
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True}, ALL_FOUR),
    "llama with one key head": ("llama", {"num_key_value_heads": 1}, ALL_FOUR),
    "llama with heads wider than its hidden size": ("llama", {"head_dim": 32}, ALL_FOUR),
    "gpt_neox": ("gpt_neox", {}, ALL_FOUR - {"mlp activation"}),
    "gpt_neox with attention before the mlp": (
        "gpt_neox", {"use_parallel_residual": False}, ALL_FOUR - {"mlp activation"},
    ),
    "opt with norms after": ("opt", {"do_layer_norm_before": False}, {"attention output", "mlp activation"}),
    "opt without norm weights": (
        "opt", {"layer_norm_elementwise_affine": False}, {"attention output", "mlp activation"},
    ),
    "opt with GELU": ("opt", {"activation_function": "gelu"}, ALL_FOUR - {"mlp activation"}),
}  # fmt: skip


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("case", CASES)
def test_a_model_whose_scales_were_moved_computes_what_it_did_before(
    case: str, whole_model: Callable[..., Any], blocks_of: Callable[[str], str]
) -> None:
    name, changes, expected = CASES[case]
    model = whole_model(name, **changes)
    config = model.config.to_dict()
    family = next(family for family in FAMILIES if config["model_type"] in family.model_types)
    folds = folds_of(config)
    assert folds.keys() == expected
    windows = torch.randint(0, 128, (3, 40), generator=torch.Generator().manual_seed(0))
    before = model(windows).logits
    tensors = dict(model.state_dict())
    seed = 0
    for index in range(3):
        prefix = f"{blocks_of(name)}.{index}."
        for fold in folds.values():
            seed += 1
            reader = next(linear for linear in family.linears if linear.reads == fold.reads)
            features = tensors[f"{prefix}{reader.name}.weight"].shape[1]
            scale = drawn(seed, features).exp()
            if fold.reads == "attention output":  # one scale for all query heads that read a key-value head
                heads, head = config["num_attention_heads"], features // config["num_attention_heads"]
                groups = config.get("num_key_value_heads") or heads
                scale = scale.view(heads, head)[:groups].repeat_interleave(heads // groups, 0).flatten()
            fold_scale(tensors, prefix, config, fold, scale)
    changed = [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, tensors[name])]
    assert len(changed) >= 3 * 2 * len(folds)
    model.load_state_dict(tensors)
    torch.testing.assert_close(model(windows).logits, before, rtol=1e-4, atol=1e-4)
    assert not torch.equal(model(windows).logits, before)


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_a_scale_in_a_norm_of_low_precision_is_exactly_what_the_norm_was_divided_by(offset: float) -> None:
    norm = (drawn(0, 500) * 0.3 + 1 - offset).to(torch.bfloat16)
    norm[:2] = -offset  # nothing to divide
    norm[2] = 0.01 - offset
    wanted = drawn(1, 500).exp()
    wanted[2] = 3e38  # nothing would be left in bfloat16
    scale = storable_scale(norm, offset, wanted)
    config = {"model_type": "gemma" if offset else "llama", "hidden_size": 500, "num_attention_heads": 4}
    readers = {f"self_attn.{name}_proj.weight": drawn(2, 8, 500) for name in "qkv"}
    tensors = {"input_layernorm.weight": norm, **readers}
    fold_scale(tensors, "", config, folds_of(config)["attention input"], scale)
    divided = tensors["input_layernorm.weight"]
    assert divided.dtype == torch.bfloat16
    torch.testing.assert_close((divided.double() + offset) * scale.double(), norm.double() + offset, rtol=1e-6, atol=0)
    assert torch.equal(scale[:3], torch.ones(3))
    torch.testing.assert_close(scale[3:], wanted[3:], rtol=0.05 if offset else 2**-8, atol=0)
    assert torch.equal(tensors["self_attn.v_proj.weight"], readers["self_attn.v_proj.weight"] * scale)


def test_the_summary_of_inputs_is_their_gram_matrix_and_mean_magnitude() -> None:
    summary = InputSummary(6)
    inputs = drawn(3, 10, 6)
    summary.add(inputs[:4])
    summary.add(inputs[4:])
    torch.testing.assert_close(summary.gram(), inputs.T @ inputs)
    torch.testing.assert_close(summary.mean_magnitude(), inputs.abs().mean(0))


def test_query_heads_that_read_one_key_value_head_get_one_scale() -> None:
    # Two key-value heads of two features, read by two query heads each.
    rows = torch.tensor([0, 1, 0, 1, 2, 3, 2, 3])
    values = torch.tensor([1.0, 10.0, 3.0, 30.0, 5.0, 50.0, 7.0, 70.0])
    assert pooled(values, rows).tolist() == [2.0, 20.0, 2.0, 20.0, 6.0, 60.0, 6.0, 60.0]


@pytest.mark.parametrize("symmetric", [False, True])
def test_the_scale_found_is_the_best_of_those_that_the_paper_tries(symmetric: bool) -> None:
    inputs = drawn(4, 200, 32) * torch.linspace(-3, 3, 32).exp()  # some matter much more than others
    weight = drawn(5, 12, 32)
    magnitude = inputs.abs().mean(0)
    errors = {}
    for step in range(21):
        scale = magnitude ** (step / 20)
        scale /= (scale.max() * scale.min()).sqrt()
        rounded = plain_methods.round_to_nearest(weight * scale, 3, 16, symmetric) / scale
        errors[step / 20] = ((rounded - weight) @ inputs.double().T).square().sum().item()
    best = min(errors, key=lambda exponent: errors[exponent])
    scale, exponent = search_scale(weight, inputs.T @ inputs, magnitude, Rounding(3, 16, symmetric))
    assert 0 < best < 1
    assert exponent == best
    expected = magnitude**best
    torch.testing.assert_close(scale, expected / (expected.max() * expected.min()).sqrt())


def test_only_scales_that_can_be_stored_are_tried() -> None:
    inputs = drawn(4, 200, 32) * torch.linspace(-3, 3, 32).exp()
    scale, exponent = search_scale(
        drawn(5, 12, 32), inputs.T @ inputs, inputs.abs().mean(0), Rounding(3, 16, False), storable=torch.ones_like
    )
    assert torch.equal(scale, torch.ones(32))
    assert exponent == 0


def test_inputs_that_are_not_numbers_are_an_error() -> None:
    gram = torch.full((32, 32), float("nan"))
    with pytest.raises(ValueError, match="NaN or infinity"):
        search_scale(drawn(5, 12, 32), gram, torch.ones(32), Rounding(4, 16, False))


@pytest.mark.parametrize("symmetric", [False, True])
def test_ranges_are_clipped_where_a_plain_search_clips_them(symmetric: bool) -> None:
    inputs, weight = drawn(6, 300, 32), drawn(7, 8, 32)
    weight[::2, 5] *= 4  # outliers
    expected = weight.clone()
    for row in range(8):
        for group in (slice(0, 16), slice(16, 32)):
            part = weight[row, group][None]
            errors = []
            for step in range(10):
                bound = part.abs().max() * (1 - step / 20)
                rounded = plain_methods.round_to_nearest(part.clamp(-bound, bound), 3, 16, symmetric)
                errors.append(((rounded - part) @ inputs[:, group].double().T).square().sum().item())
            bound = part.abs().max() * (1 - errors.index(min(errors)) / 20)
            expected[row, group] = part[0].clamp(-bound, bound)
    clipped = clip(weight, inputs.T @ inputs, Rounding(3, 16, symmetric))
    torch.testing.assert_close(clipped, expected)
    assert 0.2 < (clipped != weight).view(8, 2, 16).any(2).double().mean() < 1


def test_the_model_is_that_of_a_plain_awq_block_after_block(
    import_model: Callable[..., Artifact],
    whole_model: Callable[..., Any],
    make_tokens: Callable[..., Artifact],
    windows: Callable[[Artifact], Tensor],
    run_stage: Callable[..., Artifact],
    read_tensors: Callable[..., Tensors],
) -> None:
    base = import_model("llama", num_hidden_layers=2)
    tokens = make_tokens(base)
    quantized = read_tensors(run_stage("quantize/awq", {"model": base, "calibration": tokens}, bits=3, group_size=32))
    model = whole_model("llama", num_hidden_layers=2)
    for index, inputs in enumerate(plain_methods.progressively(model, "model.layers", windows(tokens))):
        prefix = f"model.layers.{index}."
        block = {name.removeprefix(prefix): one for name, one in model.named_parameters() if name.startswith(prefix)}
        dense = {name: tensor.clone() for name, tensor in block.items()}
        given = {name.removeprefix(prefix): torch.cat(parts).double() for name, parts in inputs.items()}
        scales, row_scales = plain_methods.awq(block, given, model.config, bits=3, group_size=32)
        for name, tensor in block.items():
            full = f"{prefix}{name}"
            if name not in given:
                torch.testing.assert_close(quantized[full], tensor)
                continue
            stored = plain_methods.gptq_weight(quantized, full.removesuffix(".weight"), 3, offset=0)
            # Here and there a value lies so near the middle between two codes that float64 decides otherwise.
            assert torch.isclose(stored, tensor, rtol=1e-3, atol=1e-6).double().mean() >= 0.99, full
            tensor.copy_(stored)
        # What the layers give from the block's inputs is nearer to the dense ones' than after plain rounding.
        for names, _ in plain_methods.AWQ_GROUPS:
            error = plain = 0.0
            for name in names:
                wanted = given[name] @ dense[name].double().T
                found = (given[name] / scales[names[0]]) @ block[name].double().T * row_scales.get(name, 1)
                rounded = plain_methods.round_to_nearest(dense[name], 3, 32, symmetric=False)
                error += (found - wanted).square().sum().item()
                plain += (given[name] @ rounded.T - wanted).square().sum().item()
            assert error < plain, (index, names)
    assert index == 1


@pytest.mark.parametrize(
    ("family", "changes", "expected"),
    [
        ("opt", {"do_layer_norm_before": False}, {"self_attn.v_proj.bias", "fc1.bias"}),
        ("gpt_neox", {}, {"input_layernorm", "post_attention_layernorm", "attention.query_key_value.bias"}),
    ],
)
def test_modules_that_take_no_scale_stay_as_they_are(
    family: str,
    changes: dict[str, Any],
    expected: set[str],
    store: Store,
    run_stage: Callable[..., Artifact],
    import_model: Callable[..., Artifact],
    make_tokens: Callable[..., Artifact],
) -> None:
    base = import_model(family, **changes)
    quantized = run_stage("quantize/awq", {"model": base, "calibration": make_tokens(base)}, group_size=32)
    before, after = store.manifest(base).tensors, store.manifest(quantized).tensors
    changed = {name for name in before if name in after and before[name] != after[name]}
    in_last = {name.split(".2.", 1)[1] for name in changed if ".layers.2." in name}
    assert {name.removesuffix(".weight") if "norm" in name else name for name in in_last} - {
        f"{norm}.bias" for norm in expected
    } == expected


def test_awqs_own_format_stands_for_the_same_weights_as_gptqs(
    run_stage: Callable[..., Artifact],
    import_model: Callable[..., Artifact],
    make_tokens: Callable[..., Artifact],
    dense_weights: Callable[..., Tensors],
) -> None:
    base = import_model("llama")
    inputs = {"model": base, "calibration": make_tokens(base)}
    packed = [run_stage("quantize/awq", inputs, group_size=32, format=format) for format in ("gptq", "awq")]
    assert packed[0] != packed[1]
    gptqs, awqs = (dense_weights(model) for model in packed)
    assert len(gptqs) == len(awqs) == 3 * 7
    assert all(torch.equal(gptqs[layer], awqs[layer]) for layer in gptqs)


def test_awqs_own_format_has_even_outputs_in_the_lower_half_of_a_word() -> None:
    codes = torch.tensor([[1], [2], [3], [4], [5], [6], [7], [8]], dtype=torch.uint8)  # eight outputs, one input
    zeros = torch.tensor([[0, 0, 0, 0, 0, 0, 0, 15]], dtype=torch.uint8)
    solution = Solution(codes, torch.full((1, 8), 0.5), zeros, torch.zeros(1, dtype=torch.int32))
    packed = awq_format.pack("x", solution)
    assert {name: tensor.tolist() for name, tensor in packed.items()} == {
        "x.qweight": [[0x86427531 - 2**32]], "x.qzeros": [[0xF0000000 - 2**32]], "x.scales": [[0.5] * 8],
    }  # fmt: skip
    weight = awq_format.unpack_all(packed, "cpu")["x.weight"]
    assert weight.flatten().tolist() == [0.5, 1, 1.5, 2, 2.5, 3, 3.5, -3.5]


@pytest.mark.parametrize("parameters", [{"bits": 3}, {"symmetric": True}, {"group_size": -1}])
def test_what_awqs_own_format_does_not_have_is_known_before_anything_runs(parameters: dict[str, Any]) -> None:
    entry = stage_named("quantize/awq")
    (error,) = entry.check(entry.parameters(format="awq", **parameters), ModelFacts({}))
    assert error == "format awq has 4 bits, asymmetric, in groups; with other settings write format: gptq"
