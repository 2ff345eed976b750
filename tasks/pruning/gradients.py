"""Gradients of the dense model's loss as a cached `statistics` artifact, which GBLM and Pruner-Zero take.

Memory stays that of a block: a first pass leaves every block's inputs in temporary files; then each block, from the
last to the first, is run again window by window with its weights as leaves, and sends the gradient of its inputs on.
A killed stage has its finished blocks in the journal and makes the first pass again.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from ...storage.artifacts import Artifact, ArtifactWriter
from ..stage import Parameters, Run, StageError, stage

if TYPE_CHECKING:
    from torch import Tensor

    from ..blocks import StoredModel
    from ..skeleton import Skeleton

SCALE = 100.0  # the alpha of GBLM, inside the stored gradients as in its files


class GradientParameters(Parameters):
    """Parameters of the gradient statistics."""

    norm: Literal["l1", "l2"] = Field(
        "l2", description="over the windows: sum of magnitudes, or root of summed squares"
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="of both passes; auto is the checkpoint's own"
    )


@stage(
    "statistics",
    "gradients",
    version=1,
    parameters=GradientParameters,
    inputs={"model": "checkpoint", "calibration": "tokens"},
    output="statistics",
    paper="Das et al. 2023 (GBLM-Pruner), arXiv:2311.04902",
)
def gradients(run: Run, parameters: GradientParameters, model: Artifact, calibration: Artifact) -> Artifact:
    """100 times the l1 or l2 norm, over windows, of each linear weight's gradient of the window's mean loss."""
    from ..blocks import SavingPace, StoredModel, note_resumed, read_windows, resolve_dtype
    from ..skeleton import Skeleton

    journal = run.journal
    assert journal is not None
    with (
        StoredModel(run, model) as stored,
        ArtifactWriter(run.store, "statistics") as writer,
        tempfile.TemporaryDirectory(prefix="coldpress-gradients-") as folder,
    ):
        windows = read_windows(run, calibration, stored)
        skeleton = Skeleton(stored.config, resolve_dtype(parameters.dtype, stored), run.device)
        done = len(journal.steps)
        for step in journal.steps:
            writer.take_over(step)
        state = journal.state()
        passed = 0 if state is None else state.step
        if done < stored.blocks:
            inputs = _leave_inputs(run, stored, skeleton, windows, stored.blocks - passed, folder)
            if state is None:
                gradient = _head_gradients(run, stored, skeleton, windows, inputs)
            else:
                gradient = state.tensors["gradient"]
        note_resumed(run, journal, stored.blocks, done - passed)
        saving = SavingPace(windows.numel() * int(stored.config["hidden_size"]) * 4)
        clock = time.perf_counter()
        for number in range(passed, stored.blocks):
            index = stored.blocks - 1 - number
            sums = _through_block(run, stored, skeleton, index, inputs.pop(index), gradient, parameters.norm)
            if number < done:
                continue
            writer.add_tensors(sums, stored.family.block_prefix(index))
            writer.settle()
            now = time.perf_counter()
            journal.commit({**writer.part(sums, []), "seconds": round(now - clock, 3)})
            clock = now
            run.progress("gradients", number + 1, stored.blocks)
            if number + 1 < stored.blocks:
                if run.stop_asked() or saving.due():
                    with saving:
                        journal.save_state(number + 1, {"gradient": gradient}, {})
                run.stop_if_asked()
        return writer.publish()


def _leave_inputs(
    run: Run, stored: StoredModel, skeleton: Skeleton, windows: Tensor, blocks: int, folder: str
) -> dict[int, Tensor]:
    """The inputs of the first `blocks` blocks, and as one more the last one's outputs, each in a file of `folder`."""
    import torch

    with torch.no_grad():
        hidden = skeleton.embed(stored.outer(skeleton.dtype), windows)
        left = {}
        for index in range(blocks + 1):
            left[index] = kept = torch.from_file(
                os.path.join(folder, str(index)), shared=True, size=hidden.numel(), dtype=hidden.dtype
            ).view(hidden.shape)
            kept.copy_(hidden)
            if index == blocks:
                return left
            stored.prefetch(index + 1)
            skeleton.advance(index, stored.dense(index, skeleton.dtype), hidden)
            run.progress("gradients, first pass", index + 1, blocks)
            run.stop_if_asked()
    raise AssertionError("unreachable")


def _head_gradients(
    run: Run, stored: StoredModel, skeleton: Skeleton, windows: Tensor, inputs: Mapping[int, Tensor]
) -> Tensor:
    """Gradients [windows, length, hidden] of each window's mean loss by the last block's outputs."""
    import torch
    from torch.nn.functional import cross_entropy

    outputs = inputs[stored.blocks]
    outer = stored.outer(skeleton.dtype)
    gradient = torch.empty_like(outputs, device="cpu")
    for number, window in enumerate(windows):
        run.stop_if_asked()
        with torch.enable_grad():
            hidden = outputs[number][None].to(run.device).requires_grad_()
            logits = skeleton.logits(outer, skeleton.finish(outer, hidden)[0, :-1])
            loss = cross_entropy(logits, window[1:].to(run.device))
            gradient[number] = torch.autograd.grad(loss, hidden)[0][0].cpu()
    return gradient


def _through_block(
    run: Run,
    stored: StoredModel,
    skeleton: Skeleton,
    index: int,
    inputs: Tensor,
    gradient: Tensor,
    norm: str,
) -> dict[str, Tensor]:
    """Norms of the gradients of a block's linear weights; `gradient`, by its outputs, becomes that by its inputs."""
    import torch

    dense = stored.dense(index, skeleton.dtype)
    names = [f"{linear.name}.weight" for linear in stored.linears(index).values()]
    sums = {name: torch.zeros(dense[name].shape, dtype=torch.float32, device=run.device) for name in names}
    for name in names:
        dense[name].requires_grad_()
    for number in range(len(inputs)):
        with torch.enable_grad():
            hidden = inputs[number][None].to(run.device).requires_grad_()
            output = skeleton.forward_block(index, dense, hidden)
            upstream = gradient[number][None].to(run.device)
            onward, *found = torch.autograd.grad(output, [hidden, *(dense[name] for name in names)], upstream)
        gradient[number] = onward[0].cpu()
        for name, one in zip(names, found, strict=True):
            scaled = one.float().mul_(SCALE)
            sums[name].add_(scaled.abs_() if norm == "l1" else scaled.square_())
    if norm == "l2":
        for total in sums.values():
            total.sqrt_()
    prefix = stored.family.block_prefix(index)
    for name, total in sums.items():
        if not bool(total.isfinite().all()):
            raise StageError(f"the gradient of {prefix}{name} is not finite; set dtype to float32")
    return {prefix + name: total.cpu() for name, total in sums.items()}
