"""Small artifacts to put into a store, and the actions that could have made them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from coldpress.storage.artifacts import OWN_BLOB_BYTES, Artifact, ArtifactReader, ArtifactWriter
from coldpress.storage.digests import digest_of
from coldpress.storage.store import Action, Store

STAGE = "prune/wanda"
CONFIG = b'{"hidden_size":128}'

Tensors = dict[str, torch.Tensor]


def random_tensor(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def large(seed: int = 0) -> torch.Tensor:
    """The smallest fp32 tensor that gets a blob of its own, [128, 128]."""
    tensor = random_tensor(128, 128, seed=seed)
    assert tensor.nbytes == OWN_BLOB_BYTES
    return tensor


def block(index: int, seed: int = 0) -> Tensors:
    """A decoder block in miniature: one large and two small tensors."""
    prefix = f"model.layers.{index}."
    return {
        f"{prefix}mlp.weight": large(seed),
        f"{prefix}norm.weight": random_tensor(128, seed=seed),
        f"{prefix}norm.bias": random_tensor(3, 5, seed=seed).to(torch.bfloat16),
    }


def publish(store: Store, tensors: Mapping[str, torch.Tensor] | None = None, **files: bytes) -> Artifact:
    """A checkpoint of the tensors (by default one block) and files (by default a config)."""
    with ArtifactWriter(store, "checkpoint") as writer:
        writer.add_tensors(block(0) if tensors is None else tensors, "model.layers.0.")
        for name, data in (files or {"config": CONFIG}).items():
            writer.add_file(name, data)
        return writer.publish()


def read(store: Store, artifact: Artifact) -> Tensors:
    """All tensors of an artifact."""
    with ArtifactReader(store, artifact) as reader:
        return reader.tensors(reader.manifest.tensors)


def action(artifact: Artifact, seed: int = 0, **provenance: Any) -> Action:
    """The action of STAGE that gave the artifact; actions of one `seed` have one key."""
    preimage = {"stage": STAGE, "seed": seed}
    return Action(STAGE, digest_of(preimage), artifact, preimage, provenance)


def ref_path(name: str) -> str:
    """Where a ref is, relative to the store."""
    return f"refs/{name}.json"


def same(left: Mapping[str, torch.Tensor], right: Mapping[str, torch.Tensor]) -> bool:
    """Whether both hold the same names, dtypes, shapes and values."""
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]) for name in left
    )
