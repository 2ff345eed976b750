"""Writing SmolLM2 (float32, 538 MB) into the store and reading it back verified, against plain files.

Writing is compared with `safetensors.save_file` and one SHA-256 over the tensors' bytes, reading with reading that
file into memory and one SHA-256. The store writes to fresh folders and is opened anew for each reading, so that every
blob counts as unverified. The store makes its bytes durable (fsync), a plain file does not; a row that is only given
has the plain file fsynced too. Before each turn everything that waits to be written is flushed, and everything read
was written a moment ago, so the page cache serves both sides alike.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import statistics
from pathlib import Path

from .measuring import Row, in_turns, ratio, timed

ROUNDS = 5


def measure() -> list[Row]:
    """All rows of this benchmark."""
    from coldpress.flows.worker import Worker
    from coldpress.storage.artifacts import Artifact, ArtifactReader, ArtifactWriter
    from coldpress.storage.store import Store
    from coldpress.tasks.architectures import family_of
    from safetensors.torch import save_file

    from .smollm2 import import_model

    base, worker = Store("base"), Worker("cpu")
    model = import_model(worker, base, "float32")
    worker.kill()
    with ArtifactReader(base, model) as reader:
        tensors = reader.tensors(reader.manifest.tensors)
    family = family_of({"model_type": "llama"})
    blocks: dict[int | None, list[str]] = {}
    for name in tensors:
        blocks.setdefault(family.block_of(name), []).append(name)
    written: list[Artifact] = []
    megabytes = sum(tensor.nbytes for tensor in tensors.values()) / 1e6

    def write_store() -> float:
        shutil.rmtree("written", ignore_errors=True)
        os.sync()

        def write() -> None:
            with ArtifactWriter(Store("written"), "checkpoint") as writer:
                for index, names in blocks.items():
                    prefix = "" if index is None else family.block_prefix(index)
                    writer.add_tensors({name: tensors[name] for name in names}, prefix)
                written.append(writer.publish())

        return timed(write)

    def write_file(*, durable: bool) -> float:
        Path("plain.safetensors").unlink(missing_ok=True)
        os.sync()

        def write() -> None:
            save_file(tensors, "plain.safetensors")
            digest = hashlib.sha256()
            for tensor in tensors.values():
                digest.update(tensor.numpy().data)
            if durable:
                descriptor = os.open("plain.safetensors", os.O_RDONLY)
                os.fsync(descriptor)
                os.close(descriptor)

        return timed(write)

    def read_store() -> float:
        os.sync()

        def read() -> None:
            with ArtifactReader(Store("written"), written[-1]) as reader:
                reader.tensors(reader.manifest.tensors)

        return timed(read)

    def read_file() -> float:
        os.sync()
        return timed(lambda: hashlib.sha256(Path("plain.safetensors").read_bytes()).digest())

    seconds = in_turns(
        ROUNDS,
        {
            "write store": write_store,
            "write durable": lambda: write_file(durable=True),
            "write plain": lambda: write_file(durable=False),
            "read store": read_store,
            "read plain": read_file,
        },
    )
    middle = {name: statistics.median(values) for name, values in seconds.items()}
    return [
        ratio(f"writing {megabytes:.0f} MB / save_file and SHA-256", middle["write store"], middle["write plain"], 1.5),
        ratio("… / save_file, fsync and SHA-256", middle["write store"], middle["write durable"]),
        ratio("reading verified / reading and SHA-256", middle["read store"], middle["read plain"], 1.2),
    ]
