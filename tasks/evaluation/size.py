"""What can be counted without running the model: size on disk, bits per weight, sparsity."""

from __future__ import annotations

from ...storage.artifacts import Artifact, ArtifactWriter
from ..formats import FORMATS
from ..stage import Parameters, Run, json_file, stage


class SizeParameters(Parameters):
    """Counting has no parameters."""


@stage(
    "evaluate",
    "size",
    version=1,
    parameters=SizeParameters,
    inputs={"model": "checkpoint"},
    output="metrics",
    accepts=frozenset((*FORMATS, "adapter")),
    on_device=False,
)
def size(run: Run, parameters: SizeParameters, model: Artifact) -> Artifact:
    """Bytes of the exported folder; over the block linears: bits per weight, pruned share, share of exact zeros.

    Of an adapter: bytes and bits are its own and its checkpoint's together, shares those of the checkpoint, which it
    leaves as it is.
    """
    from ...storage.export import export_bytes
    from ...storage.tensors import tensor_nbytes
    from ..architectures import linear_parameters
    from ..blocks import StoredModel

    pruned = zeros = packed_bytes = exported = 0
    manifest = run.store.manifest(model)
    if manifest.base is not None:
        packed_bytes = sum(tensor_nbytes(entry.dtype, entry.shape) for entry in manifest.tensors.values())
        exported = export_bytes(manifest)
        model = Artifact("checkpoint", manifest.base)
    with StoredModel(run, model) as stored:
        for index in range(stored.blocks):
            stored.prefetch(index + 1)
            shapes = stored.linear_shapes(index)
            modules = {name.removesuffix(".weight") for name in shapes}
            for name in stored.names(index):
                if name.removesuffix(".bias") not in modules and owner(name, modules):
                    entry = stored.manifest.tensors[name]
                    packed_bytes += tensor_nbytes(entry.dtype, entry.shape)
            dense = stored.unpack(stored.stored(index), stored.dtype)
            masks = stored.reader.masks(shapes)
            for name in shapes:
                is_zero = dense[name] == 0
                zeros += int(is_zero.sum())
                if name in masks:
                    pruned += int((is_zero & ~masks[name].to(run.device)).sum())
            del dense  # before the next block is read
            run.progress("counting", index + 1, stored.blocks)
        weights = linear_parameters(stored.config)
        result = {
            "size_bytes": exported + export_bytes(stored.manifest),
            "bits_per_weight": packed_bytes * 8 / weights,
            "sparsity": pruned / weights,
            "zeros": zeros / weights,
            "linear_weights": weights,
        }
    with ArtifactWriter(run.store, "metrics") as writer:
        writer.add_file("metrics.json", json_file(result))
        return writer.publish()


def owner(name: str, modules: set[str]) -> bool:
    """Whether the stored tensor `name` is (part of) the weight of one of the modules."""
    parts = name.split(".")
    return any(".".join(parts[:count]) in modules for count in range(1, len(parts)))
