"""Does an exported folder, loaded in a fresh process without coldpress, compute what the checkpoint does here?"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING

from ...storage.artifacts import Artifact
from ...storage.store import Store
from ..stage import Run, StageError

if TYPE_CHECKING:
    from torch import Tensor

LENGTH = 64
# Of the logits' standard deviation: other kernels round elsewhere, and int8 models round activations too.
TOLERANCE = {"dense": 0.01}
PACKED_TOLERANCE = 0.1
# What loads a format, where `transformers` alone does not; the names of our extras too.
PACKAGES = {"gptq": "gptqmodel", "awq": "gptqmodel", "compressed-tensors": "compressed-tensors"}


@dataclass(frozen=True)
class Agreement:
    """How far the logits of one window are apart: the mean difference and the logits' standard deviation, and for how
    many of the tokens the most likely next one is the same.
    """

    difference: float
    deviation: float
    same: int
    tokens: int
    tolerance: float

    @property
    def agrees(self) -> bool:
        return self.difference <= self.tolerance * self.deviation


def check_export(
    store: Store, artifact: Artifact, folder: str, format: str | None = None, device: str = "cpu"
) -> Agreement:
    """Compare the folder that `artifact` was exported to with the artifact. Raises StageError when it does not load.

    format: of the folder, where it is not the checkpoint's own.
    """
    from safetensors.torch import load_file, save_file

    format = format or store.manifest(artifact).format
    if artifact.kind != "checkpoint":
        raise StageError("only exported checkpoints can be checked; an adapter is loaded beside its checkpoint")
    package = PACKAGES.get(format)
    if package is not None and find_spec(package.replace("-", "_")) is None:
        raise StageError(
            f"a folder in the format {format} is loaded with {package}: pip install 'coldpress[{package}]'"
        )
    here = _logits(store, artifact, device)
    with tempfile.TemporaryDirectory(prefix="coldpress-check-") as temporary:
        given, target = os.path.join(temporary, "window"), os.path.join(temporary, "logits")
        save_file({"window": _window(here.shape[1])}, given)
        script = os.path.join(os.path.dirname(__file__), "reload.py")
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONSAFEPATH": "1"}
        done = subprocess.run(
            [sys.executable, script, folder, format, given, target],
            capture_output=True,
            text=True,
            env=environment,
            check=False,
        )
        if done.returncode:
            raise StageError(f"{folder} does not load: {last_error(done.stderr)}")
        there = load_file(target)["logits"]
    assert there.shape == here.shape
    return Agreement(
        difference=float((here - there).abs().mean()),
        deviation=float(here.std()),
        same=int((here.argmax(1) == there.argmax(1)).sum()),
        tokens=len(here),
        tolerance=TOLERANCE.get(format, PACKED_TOLERANCE),
    )


def last_error(said: str) -> str:
    """The line with the last error in what a process wrote to standard error, or its last line."""
    lines = [line for line in said.splitlines() if line.strip()] or ["no message"]
    errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception)\b", line)]
    return (errors or lines)[-1]


def _window(vocabulary: int) -> Tensor:
    """LENGTH token ids spread over the vocabulary, the same every time."""
    import torch

    return torch.randint(vocabulary, (LENGTH,), generator=torch.Generator().manual_seed(0))


def _logits(store: Store, artifact: Artifact, device: str) -> Tensor:
    """Logits [LENGTH, vocabulary] in float32, block by block."""
    import torch

    from ..blocks import StoredModel
    from ..skeleton import Skeleton

    with StoredModel(Run(store, device), artifact) as stored, torch.no_grad():
        skeleton = Skeleton(stored.config, stored.dtype, device, own_linears=False)
        outer = stored.outer(skeleton.dtype)
        hidden = skeleton.embed(outer, _window(int(stored.config["vocab_size"]))[None])
        for index in range(stored.blocks):
            stored.prefetch(index + 1)
            skeleton.advance(index, stored.dense(index, skeleton.dtype), hidden)
        return skeleton.logits(outer, skeleton.finish(outer, hidden.to(device)))[0].cpu()
