"""Every family: a block at a time, the logits are those of the whole `transformers` model, bit by bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import plain_methods
import pytest
import torch
from coldpress.storage.artifacts import Artifact
from coldpress.tasks.architectures import UnsupportedModel, family_of, known_model_types
from coldpress.tasks.half_precision import use_fast_linears
from torch import Tensor, nn

FAMILIES = known_model_types()

# Variants that released checkpoints of these families have.
VARIANTS = {
    "llama with a tied head": ("llama", {"tie_word_embeddings": True}),
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama with one key head": ("llama", {"num_key_value_heads": 1}),
    "llama with heads wider than its hidden size": ("llama", {"head_dim": 32}),
    "qwen2 with windows": ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
    "gemma with a head of its own": ("gemma", {"tie_word_embeddings": False}),
    "opt with a head of its own": ("opt", {"tie_word_embeddings": False}),
    "opt with projected embeddings, as OPT-350M": ("opt", {"word_embed_proj_dim": 32, "do_layer_norm_before": False}),
    "opt without norm weights": ("opt", {"layer_norm_elementwise_affine": False}),
    "gpt_neox with a tied head": ("gpt_neox", {"tie_word_embeddings": True}),
    "gpt_neox with attention before the mlp": ("gpt_neox", {"use_parallel_residual": False}),
}
CASES = {**{family: (family, {}) for family in FAMILIES}, **VARIANTS}


def some_windows(length: int = 40) -> Tensor:
    return torch.randint(0, 128, (3, length), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def whole_logits(model: Any, windows: Tensor) -> Tensor:
    return torch.cat([model(window[None], use_cache=False).logits for window in windows])


@pytest.mark.parametrize("case", CASES)
def test_logits_a_block_at_a_time_equal_those_of_the_whole_model(
    case: str,
    import_model: Callable[..., Artifact],
    whole_model: Callable[..., Any],
    block_loop_logits: Callable[..., Tensor],
) -> None:
    family, changes = CASES[case]
    by_blocks = block_loop_logits(import_model(family, **changes), some_windows())
    assert torch.equal(by_blocks, whole_logits(whole_model(family, **changes), some_windows()))


@pytest.mark.parametrize("tokens", [1, 80, 1024])  # one window at a time, two and one, all three
def test_logits_do_not_depend_on_how_many_windows_go_through_a_block_together(
    tokens: int,
    import_model: Callable[..., Artifact],
    whole_model: Callable[..., Any],
    block_loop_logits: Callable[..., Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("coldpress.tasks.skeleton.TOKENS_AT_ONCE", tokens)
    by_blocks = block_loop_logits(import_model("llama"), some_windows())
    torch.testing.assert_close(by_blocks, whole_logits(whole_model("llama"), some_windows()))


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "gemma2"])
def test_bfloat16_logits_equal_those_of_the_whole_model(
    family: str,
    run_stage: Callable[..., Artifact],
    tiny_model_folder: Callable[..., str],
    whole_model: Callable[..., Any],
    block_loop_logits: Callable[..., Tensor],
) -> None:
    base = run_stage("source/model", {}, source=tiny_model_folder(family), dtype="bfloat16")
    whole = whole_model(family, torch.bfloat16)
    use_fast_linears(whole)
    expected = whole_logits(whole, some_windows())
    assert torch.equal(block_loop_logits(base, some_windows()), expected.float())


def test_bfloat16_logits_of_gemma2_differ_only_by_the_rounding_of_the_cap(
    run_stage: Callable[..., Artifact],
    tiny_model_folder: Callable[..., str],
    whole_model: Callable[..., Any],
    block_loop_logits: Callable[..., Tensor],
) -> None:
    # transformers caps logits in bfloat16, the block loop in float32.
    base = run_stage("source/model", {}, source=tiny_model_folder("gemma2"), dtype="bfloat16")
    whole = whole_model("gemma2", torch.bfloat16)
    use_fast_linears(whole)
    expected = whole_logits(whole, some_windows()).float()
    assert (block_loop_logits(base, some_windows()) - expected).abs().max() <= 3 * 2**-7  # the cap is 3


@pytest.mark.parametrize("family", FAMILIES)
def test_every_linear_layer_of_a_block_is_listed_with_its_shape(family: str, whole_model: Callable[..., Any]) -> None:
    model = whole_model(family)
    known = family_of({"model_type": family})
    block = model.get_submodule(known.block_prefix(0).rstrip("."))
    linears = {name for name, module in block.named_modules() if isinstance(module, nn.Linear)}
    expected = {f"{name}.weight": tuple(block.get_submodule(name).weight.shape) for name in linears}
    assert known.linear_weights(model.config.to_dict()) == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_that_are_said_to_read_the_same_input_do_and_no_others(
    family: str, whole_model: Callable[..., Any]
) -> None:
    known = family_of({"model_type": family})
    inputs = plain_methods.linear_inputs(whole_model(family), known.blocks, 1, some_windows())
    reads = {f"{known.block_prefix(1)}{linear.name}.weight": linear.reads for linear in known.linears}
    assert reads.keys() == inputs.keys()
    for one in reads:
        for other in reads:
            same = inputs[one][0].shape == inputs[other][0].shape and torch.equal(inputs[one][0], inputs[other][0])
            assert same == (reads[one] == reads[other]), (one, other)


def test_the_families_are_those_that_the_documentation_names() -> None:
    named = {"llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "opt", "gpt_neox"}
    assert set(FAMILIES) == named


def test_a_mixture_of_experts_is_refused_as_one() -> None:
    with pytest.raises(UnsupportedModel, match=r"mixture of experts \(num_local_experts: 8\) is not supported.*llama"):
        family_of({"model_type": "mixtral", "num_local_experts": 8})


def test_an_unknown_family_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UnsupportedModel, match=r"model_type 'bert' is not supported; coldpress knows .*gpt_neox"):
        family_of({"model_type": "bert"})
