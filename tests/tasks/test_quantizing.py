"""GPTQ and plain rounding through the block loop, and what the stored tensors stand for."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from typing import Any

import plain_methods
import pytest
import torch
from coldpress.storage.artifacts import Artifact, ArtifactReader
from coldpress.storage.store import Store
from coldpress.tasks.catalogue import stage_named
from coldpress.tasks.gram import Gram
from coldpress.tasks.quantization.gptq import solve
from coldpress.tasks.quantization.grid import round_to_nearest
from coldpress.tasks.skeleton import Skeleton
from coldpress.tasks.stage import ModelFacts
from pydantic import ValidationError
from torch import Tensor

Tensors = dict[str, Tensor]


def plain_weights(tensors: Tensors, bits: int = 4, symmetric: bool = True) -> Tensors:
    """{weight name: float32 weight} of all layers in GPTQ's format, version 1 for symmetric grids, else 2."""
    modules = [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]
    return {f"{module}.weight": plain_methods.gptq_weight(tensors, module, bits, int(symmetric)) for module in modules}


@pytest.fixture
def gptq(run_stage: Callable[..., Artifact], make_tokens: Callable[..., Artifact]) -> Callable[..., Artifact]:
    """`gptq(model, **parameters)`: quantized in groups of 32 unless told."""

    def run(model: Artifact, on: Store | None = None, **parameters: Any) -> Artifact:
        inputs = {"model": model, "calibration": make_tokens(model, on)}
        return run_stage("quantize/gptq", inputs, on, **{"group_size": 32, **parameters})

    return run


DEFAULTS: dict[str, Any] = {
    "bits": 4, "group_size": 32, "symmetric": True, "act_order": False, "static_groups": False, "damping": 0.01,
}  # fmt: skip
OTHERS: dict[str, Any] = {
    "bits": 8, "group_size": 64, "symmetric": False, "act_order": True, "static_groups": True, "damping": 0.2,
}  # fmt: skip


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {}), ("opt", {}), ("gpt_neox", {}), ("gemma3_text", {}),
        *(("llama", {name: value}) for name, value in OTHERS.items()),
    ],
    ids=str,
)  # fmt: skip
def test_gptq_through_the_block_loop_is_that_of_a_whole_model_quantized_block_after_block(
    family: str,
    changes: dict[str, Any],
    import_model: Callable[..., Artifact],
    whole_model: Callable[..., Any],
    make_tokens: Callable[..., Artifact],
    windows: Callable[[Artifact], Tensor],
    gptq: Callable[..., Artifact],
    read_tensors: Callable[..., Tensors],
    blocks_of: Callable[[str], str],
) -> None:
    base = import_model(family)
    settings = {**DEFAULTS, **changes}
    stored = plain_weights(read_tensors(gptq(base, **changes)), settings["bits"], settings["symmetric"])
    model = whole_model(family)
    seen = set()
    for inputs in plain_methods.progressively(model, blocks_of(family), windows(make_tokens(base))):
        for name, windows_of_inputs in inputs.items():
            gram = Gram(windows_of_inputs[0].shape[1])
            gram.add(torch.cat(list(windows_of_inputs)))
            weight = model.get_parameter(name)
            solution = solve(weight, gram.matrix(), **settings)
            group = solution.group_index.long()
            expected = (solution.codes.float() - solution.zeros[group].T.float()) * solution.scales[group].T
            # The stage stacks layers that read the same input, which may round some last bit differently.
            assert (stored[name] == expected).double().mean() >= 0.995, name
            weight.copy_(stored[name])
            seen.add(name)
    assert seen == stored.keys()


@pytest.mark.parametrize(
    "parameters",
    [
        {},
        {"bits": 8},
        {"bits": 3},
        {"bits": 2, "symmetric": False},
        {"group_size": -1},
        {"act_order": True, "symmetric": False},
    ],
    ids=str,
)  # fmt: skip
def test_a_quantized_model_computes_with_exactly_what_its_stored_tensors_stand_for(
    parameters: dict[str, Any],
    import_model: Callable[..., Artifact],
    whole_model: Callable[..., Any],
    make_tokens: Callable[..., Artifact],
    windows: Callable[[Artifact], Tensor],
    gptq: Callable[..., Artifact],
    read_tensors: Callable[..., Tensors],
    block_loop_logits: Callable[..., Tensor],
) -> None:
    base = import_model("llama")
    quantized = gptq(base, **parameters)
    ids = windows(make_tokens(base))
    weights = plain_weights(read_tensors(quantized), parameters.get("bits", 4), parameters.get("symmetric", True))
    with plain_methods.weights_of(whole_model("llama"), weights) as model, torch.no_grad():
        expected = torch.cat([model(window[None]).logits for window in ids])
    assert torch.equal(block_loop_logits(quantized, ids), expected)


def test_what_feeds_the_next_block_are_the_weights_as_stored(
    import_model: Callable[..., Artifact],
    gptq: Callable[..., Artifact],
    read_tensors: Callable[..., Tensors],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base = import_model("llama")
    last: dict[int, Tensors] = {}
    advance = Skeleton.advance

    def watched(self: Skeleton, index: int, weights: Tensors, hidden: Tensor) -> None:
        last[index] = dict(weights)
        advance(self, index, weights, hidden)

    monkeypatch.setattr(Skeleton, "advance", watched)
    stored = plain_weights(read_tensors(gptq(base, symmetric=False)), symmetric=False)
    assert len(stored) == 3 * 7
    for index, name in itertools.product((0, 1), ("self_attn.k_proj.weight", "mlp.down_proj.weight")):
        assert torch.equal(last[index][name], stored[f"model.layers.{index}.{name}"])


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("method", ["gptq", "rtn", "awq"])
def test_quantizing_a_pruned_model_keeps_its_zeros_and_masks(
    method: str,
    symmetric: bool,
    store: Store,
    run_stage: Callable[..., Artifact],
    import_model: Callable[..., Artifact],
    make_tokens: Callable[..., Artifact],
    read_tensors: Callable[..., Tensors],
) -> None:
    base = import_model("llama")
    tokens = make_tokens(base)
    pruned = run_stage("prune/wanda", {"model": base, "calibration": tokens}, sparsity=0.5)
    inputs = {"model": pruned} if method == "rtn" else {"model": pruned, "calibration": tokens}
    quantized = run_stage(f"quantize/{method}", inputs, group_size=32, symmetric=symmetric)
    assert store.manifest(quantized).masks == store.manifest(pruned).masks
    dense = read_tensors(pruned)
    for name, weight in plain_weights(read_tensors(quantized), symmetric=symmetric).items():
        assert bool((weight[dense[name] == 0] == 0).all()), name
        assert (weight == 0).double().mean() < 0.7, name


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_rounding_gives_every_weight_its_nearest_code(
    bits: int,
    symmetric: bool,
    run_stage: Callable[..., Artifact],
    import_model: Callable[..., Artifact],
    read_tensors: Callable[..., Tensors],
) -> None:
    base = import_model("llama", num_hidden_layers=1)
    rounded = run_stage("quantize/rtn", {"model": base}, bits=bits, group_size=32, symmetric=symmetric)
    dense = read_tensors(base)
    weights = plain_weights(read_tensors(rounded), bits, symmetric)
    assert len(weights) == 7
    for name, weight in weights.items():
        expected = plain_methods.round_to_nearest(dense[name], bits, 32, symmetric)
        # Ties between two codes may fall either way in float32.
        assert torch.isclose(weight, expected.float(), rtol=1e-6).double().mean() >= 0.999, name


def test_groups_may_be_whole_rows() -> None:
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    solution = round_to_nearest(weight, bits=3, group_size=-1, symmetric=False)
    assert solution.scales.shape == solution.zeros.shape == (1, 32)
    assert solution.group_index.tolist() == [0] * 64
    assert (int(solution.codes.min()), int(solution.codes.max())) == (0, 7)
    values = (solution.codes.float() - solution.zeros.T.float()) * solution.scales.T
    assert bool(((values - weight).abs() <= solution.scales.T * 0.5 + 1e-3).all())


def test_error_on_the_calibration_inputs_is_below_that_of_plain_rounding(
    import_model: Callable[..., Artifact],
    whole_model: Callable[..., Any],
    make_tokens: Callable[..., Artifact],
    windows: Callable[[Artifact], Tensor],
    gptq: Callable[..., Artifact],
    read_tensors: Callable[..., Tensors],
) -> None:
    base = import_model("llama")
    stored = plain_weights(read_tensors(gptq(base)))
    dense = read_tensors(base)
    inputs = plain_methods.linear_inputs(whole_model("llama"), "model.layers", 0, windows(make_tokens(base)))
    for name, windows_of_inputs in inputs.items():
        rounded = plain_methods.round_to_nearest(dense[name], 4, 32, symmetric=True)
        tokens = torch.cat(windows_of_inputs).double()
        error = ((stored[name] - dense[name]).double() @ tokens.T).norm()
        assert error < ((rounded - dense[name].double()) @ tokens.T).norm(), name


def test_everything_but_the_linear_weights_is_the_base_models(
    store: Store, import_model: Callable[..., Artifact], gptq: Callable[..., Artifact]
) -> None:
    base = import_model("opt")
    before, after = store.manifest(base), store.manifest(gptq(base))
    kept = {name for name in before.tensors if name in after.tensors}
    gone = before.tensors.keys() - kept
    assert all(before.tensors[name] == after.tensors[name] for name in kept)
    assert len(gone) == 3 * 6
    assert all(name.endswith(".weight") for name in gone)
    parts = {
        f"{name.removesuffix('.weight')}.{part}" for name in gone for part in ("qweight", "qzeros", "scales", "g_idx")
    }
    assert after.tensors.keys() - kept == parts


def test_the_configuration_says_how_it_was_quantized_in_both_places(
    store: Store, import_model: Callable[..., Artifact], gptq: Callable[..., Artifact]
) -> None:
    base = import_model("llama")
    quantized = gptq(base, bits=8, group_size=64, act_order=True, symmetric=False, damping=0.05)
    expected = {
        "quant_method": "gptq", "checkpoint_format": "gptq_v2", "bits": 8, "group_size": 64, "desc_act": True,
        "sym": False, "damp_percent": 0.05, "lm_head": False, "pack_dtype": "int32",
    }  # fmt: skip
    config = json.loads(store.read_file(quantized, "config.json"))
    assert config.pop("quantization_config") == expected
    assert config == json.loads(store.read_file(base, "config.json"))
    assert json.loads(store.read_file(quantized, "quantize_config.json")) == expected
    assert store.manifest(quantized).quantization == expected
    assert store.manifest(quantized).format == "gptq"


def test_symmetric_zero_points_are_stored_as_the_middle_less_one(
    import_model: Callable[..., Artifact], gptq: Callable[..., Artifact], read_tensors: Callable[..., Tensors]
) -> None:
    tensors = read_tensors(gptq(import_model("llama")))
    zeros = [tensor for name, tensor in tensors.items() if name.endswith(".qzeros")]
    assert zeros
    assert all(bool((words == 0x77777777).all()) for words in zeros)


@pytest.mark.parametrize(
    ("parameters", "sentence"),
    [
        ({"group_size": 48}, "group_size 48 does not divide the 64 inputs of self_attn.q_proj.weight; 32 or 64 would"),
        ({"group_size": 0}, "group_size 0 is neither positive nor -1"),
        ({"group_size": -2}, "group_size -2 is neither positive nor -1"),
    ],
)
@pytest.mark.parametrize("method", ["gptq", "rtn", "awq"])
def test_impossible_groups_are_known_before_anything_runs(
    method: str, parameters: dict[str, Any], sentence: str, whole_model: Callable[..., Any]
) -> None:
    entry = stage_named(f"quantize/{method}")
    facts = ModelFacts(whole_model("llama").config.to_dict())
    (error,) = entry.check(entry.parameters(**parameters), facts)
    assert sentence in error


@pytest.mark.parametrize(
    ("bits", "sentences"),
    [
        (2, ["2-bit codes are packed 16 to a word, which needs both to be multiples of 16"]),
        (3, ["3-bit codes are packed 32 to 3 words, which needs both to be multiples of 32"]),
        (4, []),
        (8, []),
    ],
)
def test_layers_whose_codes_do_not_fill_words_are_known_before_anything_runs(bits: int, sentences: list[str]) -> None:
    entry = stage_named("quantize/gptq")
    config = {
        "model_type": "opt", "hidden_size": 72, "ffn_dim": 144, "num_attention_heads": 4, "num_hidden_layers": 1,
    }  # fmt: skip
    errors = list(entry.check(entry.parameters(bits=bits, group_size=-1), ModelFacts(config)))
    assert [error.removeprefix("self_attn.q_proj.weight is 72 x 72, and ") for error in errors] == sentences


@pytest.mark.parametrize("method", ["gptq", "rtn", "awq"])
def test_numbers_of_bits_that_the_format_does_not_have_are_refused(method: str) -> None:
    with pytest.raises(ValidationError, match="2, 3, 4 or 8"):
        stage_named(f"quantize/{method}").parameters(bits=5)


def test_masks_of_a_quantized_model_are_those_of_the_weights_it_stands_for(
    store: Store,
    run_stage: Callable[..., Artifact],
    import_model: Callable[..., Artifact],
    gptq: Callable[..., Artifact],
    read_tensors: Callable[..., Tensors],
) -> None:
    pruned = run_stage("prune/magnitude", {"model": import_model("llama")}, sparsity=0.3)
    quantized = gptq(pruned)
    weights = plain_weights(read_tensors(quantized))
    shapes: dict[str, tuple[int, int]] = {name: (weight.shape[0], weight.shape[1]) for name, weight in weights.items()}
    with ArtifactReader(store, quantized) as reader:
        masks = reader.masks(shapes)
    assert masks.keys() == weights.keys()
    assert all(bool((weights[name][~mask] == 0).all()) for name, mask in masks.items())
