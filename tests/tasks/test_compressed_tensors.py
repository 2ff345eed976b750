"""`export --format compressed-tensors`: the library that defines the format reads back what was stored."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from coldpress.storage.artifacts import Artifact, ArtifactReader
from coldpress.storage.errors import ColdpressError
from coldpress.storage.export import shards
from coldpress.storage.store import Store
from coldpress.tasks.evaluation import exported
from coldpress.tasks.evaluation.exported import check_export
from coldpress.tasks.quantization.compressed_tensors_format import NAME, contents
from coldpress.tasks.stage import StageError
from elsewhere import COMPRESSED_TENSORS, TRANSFORMERS, Loaded
from safetensors.torch import load_file, save_file
from torch import Tensor

Tensors = dict[str, Tensor]
MODEL = "model.safetensors"


@pytest.fixture
def converted(export_folder: Callable[..., str]) -> Callable[[Artifact], Path]:
    """A checkpoint's folder in this format."""
    return lambda artifact: Path(export_folder(artifact, format=NAME))


LEFT = ({"modules": ["o_proj"], "layers": [0], "bits": 16},)


@pytest.fixture
def variants(
    import_model: Callable[..., Artifact], make_tokens: Callable[..., Artifact], run_stage: Callable[..., Artifact]
) -> dict[str, Artifact]:
    """Checkpoints of all stages and families whose results the format can express."""
    llama = import_model("llama")
    tokens = make_tokens(llama)
    pruned = run_stage("prune/wanda", {"model": llama, "calibration": tokens}, pattern="2:4")
    wanted: dict[str, tuple[str, Artifact, dict[str, Any]]] = {
        "gptq": ("gptq", llama, {}),
        "whole rows": ("gptq", llama, {"group_size": -1, "act_order": True, "symmetric": False}),
        "static groups": ("gptq", llama, {"act_order": True, "static_groups": True, "bits": 8}),
        "pruned": ("gptq", pruned, {"symmetric": False}),
        "one left": ("gptq", llama, {"symmetric": False, "overrides": LEFT}),
        "joint": ("sparsegpt-gptq", llama, {"sparsity": 0.5}),
        "awq, 3 bit": ("awq", llama, {"bits": 3}),
        "awq in its own format": ("awq", llama, {"format": "awq"}),
        **{f: ("gptq", import_model(f), {"symmetric": False}) for f in ("opt", "gpt_neox", "gemma3_text", "qwen2")},
    }
    return {
        name: run_stage(
            f"quantize/{method}", {"model": model, "calibration": tokens}, **{"group_size": 32, **parameters}
        )
        for name, (method, model, parameters) in wanted.items()
    }


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group_size", [32, -1])
def test_the_library_unpacks_the_stored_weights_and_packs_them_to_the_same_tensors(
    bits: int,
    symmetric: bool,
    group_size: int,
    import_model: Callable[..., Artifact],
    run_stage: Callable[..., Artifact],
    dense_weights: Callable[..., Tensors],
    converted: Callable[[Artifact], Path],
) -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    asked = {"bits": bits, "group_size": group_size, "symmetric": symmetric}
    model = run_stage("quantize/rtn", {"model": import_model("llama", num_hidden_layers=1)}, **asked)
    folder = converted(model)
    config = QuantizationConfig.model_validate(json.loads((folder / "config.json").read_text())["quantization_config"])
    (scheme,) = config.config_groups.values()
    library = BaseCompressor.get_value_from_registry(config.format)
    tensors = load_file(folder / MODEL)
    expected = dense_weights(model)
    assert len(expected) == 7
    for layer, weight in expected.items():
        stored = {name: tensors[f"{layer}.{name}"] for name in library.compression_param_names(scheme)}
        assert stored.keys() == {n.removeprefix(f"{layer}.") for n in tensors if n.startswith(f"{layer}.")}
        assert stored["weight_scale"].dtype == torch.float16
        assert torch.equal(library.decompress(stored, scheme)["weight"], weight.half())
        stored["weight_scale"] = stored["weight_scale"].float()
        unpacked = library.decompress(stored, scheme)
        assert torch.equal(unpacked["weight"], weight)
        again = library.compress({n: unpacked[n] for n in unpacked if n != "weight_shape"}, scheme)
        assert again.keys() == stored.keys()
        assert all(torch.equal(again[name], stored[name]) for name in stored), layer


def test_folders_load_in_transformers_with_the_stored_weights(
    variants: dict[str, Artifact],
    store: Store,
    make_tokens: Callable[..., Artifact],
    windows: Callable[[Artifact], Tensor],
    block_loop_logits: Callable[..., Tensor],
    dense_weights: Callable[..., Tensors],
    load_elsewhere: Callable[..., dict[str, Loaded]],
) -> None:
    pytest.importorskip("compressed_tensors")
    ids = windows(make_tokens(variants["gptq"]))
    for name, loaded in load_elsewhere(COMPRESSED_TENSORS, ids, variants, format=NAME).items():
        expected = dense_weights(variants[name])
        assert loaded.weights.keys() - expected.keys() <= {"lm_head"}, name
        packed = {layer for layer in expected if (name, layer) != ("one left", "model.layers.0.self_attn.o_proj")}
        assert all(torch.equal(loaded.weights[layer], expected[layer].half().float()) for layer in packed), name
        assert all(torch.equal(loaded.weights[layer], expected[layer]) for layer in expected.keys() - packed), name
        assert (loaded.logits - block_loop_logits(variants[name], ids)).abs().mean() < 0.005, name
        with ArtifactReader(store, variants[name]) as reader:
            shapes = {f"{layer}.weight": (len(weight), weight.shape[1]) for layer, weight in expected.items()}
            masks = reader.masks(shapes)
        assert bool(masks) == (name in ("pruned", "joint"))
        assert all(bool((loaded.weights[n.removesuffix(".weight")][~mask] == 0).all()) for n, mask in masks.items())


def test_a_symmetric_model_that_transformers_keeps_packed_computes_the_very_same_logits(
    import_model: Callable[..., Artifact],
    make_tokens: Callable[..., Artifact],
    windows: Callable[[Artifact], Tensor],
    run_stage: Callable[..., Artifact],
    block_loop_logits: Callable[..., Tensor],
    load_elsewhere: Callable[..., dict[str, Loaded]],
) -> None:
    pytest.importorskip("compressed_tensors")
    models = {"llama": run_stage("quantize/rtn", {"model": import_model("llama")}, group_size=32)}
    ids = windows(make_tokens(models["llama"]))
    (loaded,) = load_elsewhere(TRANSFORMERS, ids, models, format=NAME).values()
    assert torch.equal(loaded.logits, block_loop_logits(models["llama"], ids))


def test_everything_but_the_packed_layers_is_as_it_is_in_the_plain_folder(
    import_model: Callable[..., Artifact],
    run_stage: Callable[..., Artifact],
    export_folder: Callable[..., str],
    converted: Callable[[Artifact], Path],
) -> None:
    model = run_stage("quantize/rtn", {"model": import_model("opt")}, group_size=32, bits=8)
    plain, folder = Path(export_folder(model)), converted(model)
    assert {path.name for path in plain.iterdir()} - {path.name for path in folder.iterdir()} == {
        "quantize_config.json"
    }
    before, after = load_file(plain / MODEL), load_file(folder / MODEL)
    shared = {n for n in before if n.rpartition(".")[2] in ("weight", "bias")}
    assert {n for n in after if ".weight_" not in n} == shared
    assert all(torch.equal(before[name], after[name]) for name in shared)
    configs = [json.loads((one / "config.json").read_text()) for one in (plain, folder)]
    settings = configs[1].pop("quantization_config")
    configs[0].pop("quantization_config")
    assert configs[0] == configs[1]
    assert settings["config_groups"]["group_0"]["weights"] == {
        "type": "int", "num_bits": 8, "symmetric": True, "strategy": "group", "group_size": 32, "dynamic": False,
    }  # fmt: skip
    assert settings["ignore"] == ["lm_head", "model.decoder.embed_positions", "model.decoder.embed_tokens"]


def test_large_models_are_converted_in_shards(
    import_model: Callable[..., Artifact],
    run_stage: Callable[..., Artifact],
    converted: Callable[[Artifact], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = run_stage("quantize/rtn", {"model": import_model("llama")}, group_size=32, symmetric=False)
    whole = load_file(converted(model) / MODEL)
    monkeypatch.setattr("coldpress.storage.export.shards", functools.partial(shards, limit=30_000))
    folder = converted(model)
    index = json.loads((folder / f"{MODEL}.index.json").read_text())
    files = {path.name: load_file(path) for path in folder.glob("*.safetensors")}
    assert len(files) > 2
    assert index["weight_map"].keys() == whole.keys()
    assert all(torch.equal(files[file][name], whole[name]) for name, file in index["weight_map"].items())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())


def test_the_check_loads_the_folder_and_notices_a_changed_one(
    import_model: Callable[..., Artifact],
    run_stage: Callable[..., Artifact],
    converted: Callable[[Artifact], Path],
    store: Store,
) -> None:
    pytest.importorskip("compressed_tensors")
    model = run_stage("quantize/rtn", {"model": import_model("llama")}, group_size=32, symmetric=False)
    folder = converted(model)
    found = check_export(store, model, str(folder), NAME)
    assert found.agrees
    assert found.difference < 0.01 * found.deviation
    tensors = load_file(folder / MODEL)
    tensors["model.layers.1.mlp.down_proj.weight_scale"] *= 1.5
    save_file(tensors, folder / MODEL, metadata={"format": "pt"})
    assert not check_export(store, model, str(folder), NAME).agrees


@pytest.mark.parametrize(("format", "package"), [(NAME, NAME), (None, "gptqmodel")])
def test_a_check_without_the_package_that_loads_the_format_says_what_to_install(
    format: str | None,
    package: str,
    import_model: Callable[..., Artifact],
    run_stage: Callable[..., Artifact],
    store: Store,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = run_stage("quantize/rtn", {"model": import_model("llama")}, group_size=32)
    monkeypatch.setattr(exported, "find_spec", lambda name: None)
    with pytest.raises(StageError, match=rf"pip install 'coldpress\[{package}\]'"):
        check_export(store, model, "nowhere", format)


@pytest.mark.parametrize(
    ("stage", "parameters", "sentence"),
    [
        (None, {}, "and this checkpoint is dense; export it as it is stored"),
        ("prune/magnitude", {"sparsity": 0.5}, "no format for pruned dense weights since version 0.15"),
        ("prune/magnitude", {"pattern": "2:4"}, "took sparse-bitmask and sparse-24-bitmask out"),
        ("quantize/rtn", {"group_size": 32, "overrides": ({"modules": ["v_proj"], "bits": 8},)}, "several bit widths"),
        ("quantize/nf4", {}, "is in the format bitsandbytes, which it can't express"),
        ("quantize/int8", {}, "is in the format bitsandbytes, which it can't express"),
        ("source/tokens", {}, "a format of checkpoints, and this is of the kind 'tokens'"),
        (
            "quantize/gptq",
            {"act_order": True, "group_size": 32},
            "the groups of model.layers.0.mlp.down_proj are in the order of activations",
        ),
    ],
)
def test_what_the_format_cannot_express_is_refused(
    stage: str | None,
    parameters: dict[str, Any],
    sentence: str,
    store: Store,
    import_model: Callable[..., Artifact],
    make_tokens: Callable[..., Artifact],
    run_stage: Callable[..., Artifact],
) -> None:
    artifact = import_model("llama")
    if stage == "source/tokens":
        artifact = make_tokens(artifact)
    elif stage == "quantize/gptq":
        artifact = run_stage(stage, {"model": artifact, "calibration": make_tokens(artifact)}, **parameters)
    elif stage is not None:
        artifact = run_stage(stage, {"model": artifact}, **parameters)
    with pytest.raises(ColdpressError, match=sentence):
        contents(store, artifact)
