"""Models in: any source, streamed block by block into a checkpoint artifact with files of our own writing."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from ...storage.artifacts import Artifact, ArtifactWriter
from ..architectures import Family, block_count, family_of, linear_parameters
from ..stage import Parameters, Run, json_file, stage
from .locate import MODEL_FILES, SourceError, check_model, hub_commit, locate, model_content, read_config, weight_files

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# Entries of config files that say where or with what they were made, which is not content.
_NOT_CONTENT = ("transformers_version", "_name_or_path", "name_or_path", "_commit_hash", "auto_map", "tokenizer_file")


class ModelParameters(Parameters):
    """Where a model comes from and how it is stored."""

    location = frozenset({"source", "revision"})

    source: str = Field(description="Hub id, folder, GGUF file, or package://<package>/<file>")
    revision: str | None = Field(None, description="of a Hub id: branch, tag or commit")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="in which to store; auto is the file's own (bfloat16 for quantized GGUF files)"
    )


@dataclass(frozen=True)
class Opened:
    """A source ready to be streamed: its config, small files, tensor names, and a reader of named tensors."""

    config: dict[str, Any]
    files: Mapping[str, bytes]
    names: tuple[str, ...]
    read: Callable[[list[str]], dict[str, Tensor]]
    own_dtype: torch.dtype


@stage(
    "source",
    "model",
    version=1,
    parameters=ModelParameters,
    output="checkpoint",
    content=lambda parameters: model_content(parameters.source, parameters.revision),
    on_device=False,
)
def model(run: Run, parameters: ModelParameters) -> Artifact:
    """A model from the Hub, a folder, a GGUF file or a Python package, as a checkpoint."""
    import torch

    from ..skeleton import Skeleton

    opened = _open(parameters)
    family = family_of(opened.config)
    dtype = opened.own_dtype if parameters.dtype == "auto" else getattr(torch, parameters.dtype)
    format, quantization = _packed_format(opened.config)
    skeleton = Skeleton(opened.config, dtype, "cpu")
    expected = skeleton.parameter_names()
    tied = bool(skeleton.model.config.tie_word_embeddings)  # some families tie unless the config says otherwise
    head = family.file_name("lm_head.weight")
    if tied:
        expected.pop(head, None)
    names = _by_block(family, expected if quantization is None else opened.names)
    missing = [name for name in expected if name not in set(opened.names)] if quantization is None else []
    if missing:
        raise SourceError(
            f"{parameters.source} lacks {len(missing)} tensors that its config asks for, e.g. {missing[0]}"
        )

    config = {key: value for key, value in opened.config.items() if key not in _NOT_CONTENT}
    config["architectures"] = [type(skeleton.model).__name__]
    config["dtype"] = str(dtype).removeprefix("torch.")
    config.pop("torch_dtype", None)
    run.note("linear_weights", linear_parameters(config))
    with ArtifactWriter(run.store, "checkpoint") as writer:
        for done, (block, group) in enumerate(names.items()):
            tensors = opened.read(group)
            for name, tensor in tensors.items():
                if quantization is None:
                    if tuple(tensor.shape) != expected[name]:
                        raise SourceError(
                            f"{name} in {parameters.source} is {list(tensor.shape)}, but config.json asks for "
                            f"{list(expected[name])}"
                        )
                    tensors[name] = tensor.to(dtype)
            writer.add_tensors(tensors, "" if block is None else family.block_prefix(block))
            run.progress("reading", done + 1, len(names))
            run.stop_if_asked()
        for name, data in opened.files.items():
            writer.add_file(name, data)
        writer.add_file("config.json", json_file(config))
        return writer.publish(format=format, quantization=quantization)


def _by_block(family: Family, names: Any) -> dict[int | None, list[str]]:
    groups: dict[int | None, list[str]] = {}
    for name in names:
        groups.setdefault(family.block_of(name), []).append(name)
    return groups


def _packed_format(config: Mapping[str, Any]) -> tuple[str, dict[str, Any] | None]:
    from ..quantization.precision import PACKABLE_BITS

    settings = config.get("quantization_config")
    if not settings:
        return "dense", None
    method = settings.get("quant_method")
    if method == "gptq" and settings.get("dynamic"):
        _check_dynamic(settings, config)
    known_format = settings.get("checkpoint_format", "gptq") in ("gptq", "gptq_v2")
    readable = known_format and settings.get("bits") in PACKABLE_BITS
    if method == "gptq" and readable:
        return "gptq", settings
    gemm = str(settings.get("version", "gemm")).lower() == "gemm" and settings.get("bits") == 4
    if method == "awq" and gemm and settings.get("zero_point", True):
        return "awq", settings
    eight_bit = bool(settings.get("load_in_8bit"))
    if method == "bitsandbytes" and (eight_bit or settings.get("bnb_4bit_quant_type") == "nf4"):
        return "bitsandbytes", settings
    raise SourceError(
        f"the model is quantized by '{method}' in a form that can't be read here; start from its unquantized version"
    )


def _check_dynamic(settings: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """Refuses bits that can't be read, and patterns whose order counts: files here are kept with sorted keys."""
    from ..quantization.precision import PACKABLE_BITS, precision_of

    in_order = {**settings, "dynamic": dict(sorted(settings["dynamic"].items()))}
    family = family_of(config)
    for index in range(block_count(config)):
        for linear in family.linears:
            module = f"{family.block_prefix(index)}{linear.name}"
            precision = precision_of(settings, module)
            if precision is not None and precision.bits not in PACKABLE_BITS:
                raise SourceError(f"{module} is quantized to {precision.bits} bits, which can't be read here")
            if precision != precision_of(in_order, module):
                raise SourceError(
                    f"several patterns of 'dynamic' in the model's quantization_config match {module}, and which comes "
                    "first decides; write patterns that don't overlap"
                )


def _open(parameters: ModelParameters) -> Opened:
    check_model(parameters.source)
    located = locate(parameters.source)
    match located.kind:
        case "file":
            return _open_gguf(located.path)
        case "folder":
            return _open_folder(located.path)
        case "hub":
            return _open_folder(_download(located.path, hub_commit(located.path, parameters.revision, "model")))


def _download(repo: str, commit: str) -> str:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return snapshot_download(repo, revision=commit, allow_patterns=["*.safetensors", "*.index.json", *MODEL_FILES])
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise SourceError(f"could not download {repo}: {error}") from error


def _open_folder(folder: str) -> Opened:
    import torch
    from safetensors import SafetensorError, safe_open

    config = read_config(folder)
    family = family_of(config)
    where: dict[str, tuple[str, str]] = {}
    try:
        for name in weight_files(folder):
            path = os.path.join(folder, name)
            with safe_open(path, "pt") as opened:
                for key in opened.keys():  # noqa: SIM118 (not a dict)
                    where[_full_name(family, key)] = (path, key)
    except SafetensorError as error:
        raise SourceError(f"{folder}: {error}; copy or download it again") from error

    def read(names: list[str]) -> dict[str, Tensor]:
        tensors = {}
        for path in dict.fromkeys(where[name][0] for name in names):
            with safe_open(path, "pt") as opened:
                tensors.update({name: opened.get_tensor(where[name][1]) for name in names if where[name][0] == path})
        return {name: tensors[name] for name in names}

    first = f"{family.block_prefix(0)}{family.linears[0].name}.weight"
    sample = next((name for name in where if name == first), None) or next(iter(where))
    own = read([sample])[sample].dtype
    if not own.is_floating_point:  # a packed weight
        own = getattr(torch, str(config.get("dtype") or config.get("torch_dtype") or "float16"))
    files = {}
    for name in MODEL_FILES:
        if name != "config.json" and os.path.isfile(os.path.join(folder, name)):
            with open(os.path.join(folder, name), "rb") as raw:
                files[name] = _clean(name, raw.read())
    names = tuple(name for name in where if not name.endswith(family.not_weights))
    return Opened(config, files, names, read, own)


def _full_name(family: Family, key: str) -> str:
    """Some files were saved without the outermost module: `decoder.layers.0…` for `model.decoder.layers.0…`."""
    outermost, _, inner = family.blocks.partition(".")
    lacks = key.startswith((inner + ".", f"{inner.split('.', maxsplit=1)[0]}.")) and not key.startswith(outermost + ".")
    return f"{outermost}.{key}" if lacks else key


def _clean(name: str, data: bytes) -> bytes:
    """Small JSON files with sorted keys and without versions and paths; everything else as it is."""
    if name in ("tokenizer.json", "vocab.json", "added_tokens.json") or not name.endswith(".json"):
        return data
    value = json.loads(data)
    return json_file({key: entry for key, entry in value.items() if key not in _NOT_CONTENT})


def _open_gguf(path: str) -> Opened:
    import torch
    from gguf import GGMLQuantizationType, GGUFReader, dequantize
    from transformers import AutoConfig, AutoTokenizer
    from transformers.modeling_gguf_pytorch_utils import (
        TENSOR_PROCESSORS,
        TensorProcessor,
        get_gguf_hf_weights_map,
    )

    from ..skeleton import build_model

    folder, name = os.path.split(path)
    config = AutoConfig.from_pretrained(folder, gguf_file=name, trust_remote_code=False).to_dict()
    family_of(config)
    skeleton = build_model(config, torch.float32)
    reader = GGUFReader(path)
    architecture = str(reader.fields["general.architecture"].contents())
    processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=config)
    mapping = get_gguf_hf_weights_map(skeleton, processor)
    tensors = {mapping[tensor.name]: tensor for tensor in reader.tensors if tensor.name in mapping}

    def read(names: list[str]) -> dict[str, Tensor]:
        result = {}
        for wanted in names:
            tensor = tensors[wanted]
            weights = dequantize(tensor.data, tensor.tensor_type)
            processed = processor.process(
                weights=weights, name=tensor.name, tensor_key_mapping=mapping, parsed_parameters={"config": config}
            )
            result[wanted] = torch.from_numpy(processed.weights.copy())
        return result

    with tempfile.TemporaryDirectory() as saved:
        AutoTokenizer.from_pretrained(folder, gguf_file=name, trust_remote_code=False).save_pretrained(saved)
        files = {file: _clean(file, data) for file, data in _files(saved) if file in MODEL_FILES}
    full = all(tensor.tensor_type == GGMLQuantizationType.F32 for tensor in reader.tensors)
    return Opened(config, files, tuple(tensors), read, torch.float32 if full else torch.bfloat16)


def _files(folder: str) -> Iterator[tuple[str, bytes]]:
    for name in sorted(os.listdir(folder)):
        with open(os.path.join(folder, name), "rb") as file:
            yield name, file.read()
