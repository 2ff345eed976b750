"""Pruning through the block loop: exact counts, untouched survivors, and the plain whole-model method's choice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import plain_methods
import pytest
import torch
from coldpress.storage.artifacts import Artifact, ArtifactReader
from coldpress.storage.store import Store
from coldpress.tasks.catalogue import stage_named
from coldpress.tasks.stage import ModelFacts, StageError
from torch import Tensor

Tensors = dict[str, Tensor]
SHARE = 0.37  # of 64 inputs 23.68, of 128 inputs 47.36: rounding and cutting differ for the first


@pytest.fixture
def wanda(run_stage: Callable[..., Artifact], make_tokens: Callable[..., Artifact]) -> Callable[..., Artifact]:
    """`wanda(model, sparsity=0.5)`: pruned on the text file."""

    def run(model: Artifact, on: Store | None = None, **parameters: Any) -> Artifact:
        return run_stage("prune/wanda", {"model": model, "calibration": make_tokens(model, on)}, on, **parameters)

    return run


@pytest.fixture
def read_masks(store: Store, read_tensors: Callable[..., Tensors]) -> Callable[[Artifact], Tensors]:
    """All masks of a dense checkpoint."""

    def read(artifact: Artifact) -> Tensors:
        shapes = {name: tensor.shape for name, tensor in read_tensors(artifact).items() if tensor.dim() == 2}
        with ArtifactReader(store, artifact) as reader:
            return reader.masks({name: (shape[0], shape[1]) for name, shape in shapes.items()})

    return read


@pytest.mark.parametrize("family", ["llama", "opt", "gpt_neox", "gemma3_text"])
def test_wanda_a_block_at_a_time_is_wanda_on_the_whole_model(
    family: str,
    import_model: Callable[..., Artifact],
    whole_model: Callable[..., Any],
    make_tokens: Callable[..., Artifact],
    windows: Callable[[Artifact], Tensor],
    wanda: Callable[..., Artifact],
    read_tensors: Callable[..., Tensors],
    read_masks: Callable[[Artifact], Tensors],
    blocks_of: Callable[[str], str],
) -> None:
    base = import_model(family)
    pruned = wanda(base, sparsity=0.5)
    model = whole_model(family)
    expected = plain_methods.wanda(model, blocks_of(family), windows(make_tokens(base)), 0.5)
    masks, tensors = read_masks(pruned), read_tensors(pruned)
    assert masks.keys() == expected.keys()
    for name, mask in expected.items():
        assert torch.equal(masks[name], mask), name
        assert torch.equal(tensors[name], model.get_parameter(name)), name


@pytest.mark.parametrize("stage", [
    "prune/wanda", "prune/sparsegpt", "prune/alps", "prune/wanda-sp", "quantize/gptq",
    "statistics/owl", "statistics/rmi", "statistics/fluctuation", "statistics/influence", "statistics/removal",
    "statistics/reconstruction",
])  # fmt: skip
def test_activations_that_overflow_are_an_error_not_a_choice(
    stage: str, run_stage: Callable[..., Artifact], tiny_model_folder: Callable[..., str], copied: Callable[[str], Any],
    make_tokens: Callable[..., Artifact],
) -> None:  # fmt: skip
    from safetensors.torch import load_file, save_file

    folder = copied(tiny_model_folder("llama"))
    tensors = load_file(folder / "model.safetensors")
    for layer in ("gate_proj", "up_proj"):
        tensors[f"model.layers.1.mlp.{layer}.weight"] *= 1000
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    model = run_stage("source/model", {}, source=str(folder), dtype="float16")
    settings = {"sparsity": 0.5} if stage.startswith("prune") else {"group_size": 32} if "gptq" in stage else {}
    original = {"original": model} if stage == "statistics/reconstruction" else {}
    inputs = {"model": model, **original, "calibration": make_tokens(model)}
    with pytest.raises(StageError, match="not finite in float16; set dtype to bfloat16 or float32"):
        run_stage(stage, inputs, **settings)


def test_weights_that_are_no_numbers_are_an_error(
    run_stage: Callable[..., Artifact], copied: Callable[[str], Any], tiny_model_folder: Callable[..., str]
) -> None:
    from safetensors.torch import load_file, save_file

    folder = copied(tiny_model_folder("llama"))
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    model = run_stage("source/model", {}, source=str(folder))
    with pytest.raises(StageError, match=r"scores of model\.layers\.1\.mlp\.up_proj\.weight are not finite"):
        run_stage("prune/magnitude", {"model": model}, sparsity=0.5)


def test_wanda_removes_exactly_the_floor_of_its_share_in_every_row(
    import_model: Callable[..., Artifact],
    wanda: Callable[..., Artifact],
    read_tensors: Callable[..., Tensors],
    read_masks: Callable[[Artifact], Tensors],
) -> None:
    pruned = wanda(import_model("llama"), sparsity=SHARE)
    masks, tensors = read_masks(pruned), read_tensors(pruned)
    assert len(masks) == 3 * 7
    for name, mask in masks.items():
        assert (~mask).sum(1).unique().tolist() == [int(mask.shape[1] * SHARE)]
        assert torch.equal(tensors[name] != 0, mask)


def test_magnitude_removes_exactly_the_floor_of_its_share_of_each_matrix_and_the_smallest(
    import_model: Callable[..., Artifact],
    run_stage: Callable[..., Artifact],
    read_tensors: Callable[..., Tensors],
    read_masks: Callable[[Artifact], Tensors],
) -> None:
    base = import_model("llama")
    pruned = run_stage("prune/magnitude", {"model": base}, sparsity=SHARE)
    dense = read_tensors(base)
    for name, mask in read_masks(pruned).items():
        count = int(mask.numel() * SHARE)
        smallest = dense[name].abs().flatten().sort(stable=True).indices[:count]
        assert not mask.flatten()[smallest].any()
        assert (~mask).sum() == count


@pytest.mark.parametrize("method", ["wanda", "magnitude"])
def test_a_pattern_keeps_two_in_each_four_inputs(
    method: str,
    import_model: Callable[..., Artifact],
    run_stage: Callable[..., Artifact],
    make_tokens: Callable[..., Artifact],
    read_masks: Callable[[Artifact], Tensors],
) -> None:
    base = import_model("llama")
    inputs = {"model": base, "calibration": make_tokens(base)} if method == "wanda" else {"model": base}
    masks = read_masks(run_stage(f"prune/{method}", inputs, pattern="2:4"))
    assert len(masks) == 3 * 7
    assert all(bool((mask.reshape(-1, 4).sum(1) == 2).all()) for mask in masks.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_kept_weights_are_bit_identical_and_everything_else_shares_the_bases_blobs(
    dtype: str,
    store: Store,
    run_stage: Callable[..., Artifact],
    tiny_model_folder: Callable[..., str],
    wanda: Callable[..., Artifact],
    read_tensors: Callable[..., Tensors],
    read_masks: Callable[[Artifact], Tensors],
) -> None:
    base = run_stage("source/model", {}, source=tiny_model_folder("qwen2"), dtype=dtype)
    pruned = wanda(base, sparsity=0.5)
    masks, dense, sparse = read_masks(pruned), read_tensors(base), read_tensors(pruned)
    before, after = store.manifest(base), store.manifest(pruned)
    assert before.tensors.keys() == after.tensors.keys()
    assert before.files == after.files
    for name in before.tensors:
        if name in masks:
            assert sparse[name].dtype == dense[name].dtype
            assert torch.equal(sparse[name][masks[name]], dense[name][masks[name]]), name
            assert not sparse[name][~masks[name]].any(), name
        else:
            assert before.tensors[name] == after.tensors[name], name


@pytest.mark.parametrize("method", ["wanda", "magnitude"])
@pytest.mark.parametrize("share", [0.2, 0.6])
def test_pruning_again_keeps_every_earlier_zero(
    method: str,
    share: float,
    import_model: Callable[..., Artifact],
    make_tokens: Callable[..., Artifact],
    run_stage: Callable[..., Artifact],
    wanda: Callable[..., Artifact],
    read_masks: Callable[[Artifact], Tensors],
) -> None:
    once = wanda(import_model("llama"), sparsity=0.5)
    inputs = {"model": once, "calibration": make_tokens(once)} if method == "wanda" else {"model": once}
    first, second = read_masks(once), read_masks(run_stage(f"prune/{method}", inputs, sparsity=share))
    for name, mask in second.items():
        assert not (mask & ~first[name]).any(), name
        removed = max((~first[name]).sum(), int(mask.numel() * share))
        assert removed - mask.shape[0] <= (~mask).sum() <= removed  # rows are cut down to whole weights


def test_pruning_again_with_wanda_removes_the_larger_share_exactly(
    import_model: Callable[..., Artifact], wanda: Callable[..., Artifact], read_masks: Callable[[Artifact], Tensors]
) -> None:
    masks = read_masks(wanda(wanda(import_model("llama"), sparsity=0.5), sparsity=0.75))
    assert all((~mask).sum(1).unique().tolist() == [mask.shape[1] * 3 // 4] for mask in masks.values())


def test_zeros_that_were_there_before_are_no_mask(
    import_model: Callable[..., Artifact],
    store: Store,
) -> None:
    assert not store.manifest(import_model("llama")).masks


def test_the_result_is_the_same_artifact_in_another_store(
    store: Store,
    new_store: Callable[[], Store],
    import_model: Callable[..., Artifact],
    make_tokens: Callable[..., Artifact],
    run_stage: Callable[..., Artifact],
    wanda: Callable[..., Artifact],
) -> None:
    def everything(on: Store) -> list[Artifact]:
        base = import_model("llama", on)
        tokens = make_tokens(base, on)
        pruned = wanda(base, on, sparsity=0.5)
        quantized = run_stage("quantize/gptq", {"model": pruned, "calibration": tokens}, on, group_size=32)
        nf4 = run_stage("quantize/nf4", {"model": pruned}, on)
        perplexity = run_stage("evaluate/perplexity", {"model": quantized, "data": tokens}, on)
        return [base, tokens, pruned, quantized, nf4, perplexity]

    assert everything(new_store()) == everything(store)


def test_another_calibration_gives_another_choice(
    import_model: Callable[..., Artifact],
    make_tokens: Callable[..., Artifact],
    run_stage: Callable[..., Artifact],
) -> None:
    base = import_model("llama")
    one, other = (
        run_stage("prune/wanda", {"model": base, "calibration": make_tokens(base, seed=seed)}, sparsity=0.5)
        for seed in (0, 1)
    )
    assert one != other


def test_how_much_was_removed_is_noted_for_every_layer(
    store: Store, import_model: Callable[..., Artifact], wanda: Callable[..., Artifact]
) -> None:
    wanda(import_model("llama"), sparsity=SHARE)
    (action,) = store.actions("prune/wanda")
    noted = action.provenance["sparsity"]
    assert len(noted) == 3 * 7
    assert noted["model.layers.2.mlp.down_proj.weight"] == pytest.approx(47 / 128)
    assert noted["model.layers.0.self_attn.q_proj.weight"] == pytest.approx(23 / 64)


@pytest.mark.parametrize(
    ("parameters", "sentence"),
    [
        ({}, "say how much to prune"),
        ({"sparsity": 0.7, "pattern": "2:4"}, "sparsity 0.7 contradicts pattern '2:4', which removes 0.5"),
        ({"pattern": "4:2"}, "is not N:M"),
        ({"sparsity": 1.0}, "less than 1"),
        ({"sparsity": 0.0}, "greater than 0"),
        ({"sparcity": 0.5}, "Extra inputs are not permitted"),
    ],
)
def test_senseless_parameters_are_refused(parameters: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        stage_named("prune/wanda").parameters(**parameters)


def test_a_pattern_may_be_given_with_the_sparsity_it_means() -> None:
    stage_named("prune/wanda").parameters(sparsity=0.75, pattern="1:4")


def test_a_pattern_that_does_not_fit_is_known_before_anything_runs() -> None:
    config = {"model_type": "opt", "hidden_size": 64, "ffn_dim": 90, "num_attention_heads": 4, "num_hidden_layers": 1}
    entry = stage_named("prune/wanda")
    (error,) = entry.check(entry.parameters(pattern="2:4"), ModelFacts(config))
    assert "pattern '2:4' needs rows that 4 divides, but fc2.weight has 90 inputs" in error
    assert not list(entry.check(entry.parameters(sparsity=0.5), ModelFacts(config)))


def test_tokens_of_a_model_with_a_larger_vocabulary_are_refused(
    import_model: Callable[..., Artifact], make_tokens: Callable[..., Artifact], run_stage: Callable[..., Artifact]
) -> None:
    tokens = make_tokens(import_model("llama"))
    with pytest.raises(StageError, match=r"beyond the model's vocabulary of 64.*another tokenizer"):
        run_stage("prune/wanda", {"model": import_model("llama", vocab_size=64), "calibration": tokens}, sparsity=0.5)


def test_windows_longer_than_the_models_context_are_refused(
    import_model: Callable[..., Artifact], make_tokens: Callable[..., Artifact], run_stage: Callable[..., Artifact]
) -> None:
    base = import_model("llama", max_position_embeddings=24)
    with pytest.raises(StageError, match="windows of 32 tokens exceed the model's context of 24; set length to 24"):
        run_stage("prune/wanda", {"model": base, "calibration": make_tokens(base)}, sparsity=0.5)
