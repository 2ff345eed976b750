"""Statistics of the gradients of the dense model's loss, as cached artifacts: for GBLM and Pruner-Zero, and Taylor's.

Memory stays that of a block: a first pass leaves every block's inputs in temporary files; then each block, from the
last to the first, is run again window by window with its weights as leaves, and sends the gradient of its inputs on.
A killed stage has its finished blocks in the journal and makes the first pass again.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Literal, Protocol

from pydantic import Field

from ...storage.artifacts import Artifact, ArtifactWriter
from ..architectures import Linear, Widths, widths
from ..stage import Parameters, Run, StageError, stage

if TYPE_CHECKING:
    from torch import Tensor

    from ..blocks import StoredModel
    from ..skeleton import Skeleton

SCALE = 100.0  # the alpha of GBLM, inside the stored gradients as in its files


class TaylorParameters(Parameters):
    """Parameters of Taylor's estimates."""

    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="of both passes; auto is the checkpoint's own, float32 for float16"
    )


class GradientParameters(Parameters):
    """Parameters of the gradient statistics."""

    norm: Literal["l1", "l2"] = Field(
        "l2", description="over the windows: sum of magnitudes, or root of summed squares"
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="of both passes; auto is the checkpoint's own, float32 for float16"
    )


@stage(
    "statistics",
    "gradients",
    version=1,
    parameters=GradientParameters,
    inputs={"model": "checkpoint", "calibration": "tokens"},
    output="statistics",
    paper="Das et al. 2023 (GBLM-Pruner), arXiv:2311.04902",
    bits_written=32,
)
def gradients(run: Run, parameters: GradientParameters, model: Artifact, calibration: Artifact) -> Artifact:
    """100 times the l1 or l2 norm, over windows, of each linear weight's gradient of the window's mean loss."""

    def norms(stored: StoredModel, index: int, dense: Mapping[str, Tensor]) -> Sums:
        names = [f"{linear.name}.weight" for linear in stored.family.linears]
        return _Norms({name: dense[name] for name in names}, parameters.norm)

    return backward(run, parameters.dtype, model, calibration, norms)


@stage(
    "statistics",
    "taylor",
    version=1,
    parameters=TaylorParameters,
    inputs={"model": "checkpoint", "calibration": "tokens"},
    output="statistics",
    paper="Ma et al. 2023 (LLM-Pruner), section 3.2, arXiv:2305.11627; Kim et al. 2024, arXiv:2402.02834",
)
def taylor(run: Run, parameters: TaylorParameters, model: Artifact, calibration: Artifact) -> Artifact:
    """What the loss changes without a group of heads, an FFN channel or a block: sums of |w g|, w^2 g^2 and both."""

    def sums(stored: StoredModel, index: int, dense: Mapping[str, Tensor]) -> Sums:
        return TaylorSums(dense, stored.family.linears, widths(stored.config))

    return backward(run, parameters.dtype, model, calibration, sums)


class Sums(Protocol):
    """What is summed over the windows of the gradients of a block's weights.

    names: of the weights whose gradients it takes, relative to the block.
    """

    @property
    def names(self) -> Collection[str]: ...

    def add(self, gradients: Mapping[str, Tensor]) -> None:
        """Add one window's gradients, by name relative to the block, of any floating dtype."""
        ...

    def result(self) -> dict[str, Tensor]:
        """What is stored of the block, by name relative to it, in float32."""
        ...


class _Norms:
    def __init__(self, weights: Mapping[str, Tensor], norm: str) -> None:
        import torch

        self._norm = norm
        self.names: Collection[str] = weights.keys()
        self._sums = {name: torch.zeros_like(weight, dtype=torch.float32) for name, weight in weights.items()}

    def add(self, gradients: Mapping[str, Tensor]) -> None:
        for name, total in self._sums.items():
            scaled = gradients[name].float().mul_(SCALE)
            total.add_(scaled.abs_() if self._norm == "l1" else scaled.square_())

    def result(self) -> dict[str, Tensor]:
        return {name: total if self._norm == "l1" else total.sqrt_() for name, total in self._sums.items()}


class TaylorSums:
    """Taylor's estimates of what the loss changes when parts of a block are removed. Ma et al. 2023, eq. 5 and 7.

    With g the mean over the windows of a weight's gradient and f that of its square: `param_first` sums |w g| over a
    part's weights, `param_second` w^2 f, `param_mix` |w g - w^2 f / 2|, and `vectorize` |sum w g| over its rows
    or columns. Stored as "group.<option>" [key-value groups] and "channel.<option>" [FFN channels]; "block" [1] is the
    sum of |w g| over all of the block's weights, norms included (Kim et al. 2024, eq. 3).
    """

    def __init__(self, weights: Mapping[str, Tensor], linears: Sequence[Linear], widths: Widths) -> None:
        import torch

        self.names: Collection[str] = weights.keys()
        self._weights = weights
        self._linears = linears
        self._widths = widths
        self._windows = 0
        self._first = {name: torch.zeros_like(weight, dtype=torch.float32) for name, weight in weights.items()}
        names = [f"{linear.name}.weight" for linear in linears]
        self._second = {name: torch.zeros_like(self._first[name]) for name in names}

    def add(self, gradients: Mapping[str, Tensor]) -> None:
        self._windows += 1
        for name, gradient in gradients.items():
            self._first[name].add_(gradient)
            if name in self._second:
                self._second[name].add_(gradient.float().square_())

    def result(self) -> dict[str, Tensor]:
        import torch

        parts: dict[str, Tensor] = {}
        changes = {}
        for name, total in self._first.items():
            changes[name] = total.mul_(self._weights[name].float()).div_(self._windows)
        for linear in self._linears:
            name = f"{linear.name}.weight"
            first = changes[name]
            second = self._second.pop(name).mul_(self._weights[name].float().square()).div_(self._windows)
            estimates = {
                "param_first": first.abs(),
                "param_second": second,
                "param_mix": (first - second / 2).abs_(),
                "vectorize": first,
            }
            for part, count, dim in parts_of(linear, self._widths):
                for option, estimate in estimates.items():
                    lines = estimate.sum(dim).abs_()  # one for each row, or each column
                    scores = lines.view(count, -1).sum(1)
                    key = f"{part}.{option}"
                    parts[key] = parts[key].add_(scores) if key in parts else scores
        parts["block"] = torch.stack([change.abs_().sum() for change in changes.values()]).sum().view(1)
        return parts


def parts_of(linear: Linear, widths: Widths) -> Iterator[tuple[str, int, int]]:
    """Of which parts a linear layer holds weights: (part, how many there are, the dimension to sum over)."""
    for word, dim in ((linear.outputs, 1), (linear.inputs, 0)):
        if word in ("query", "key"):
            yield "group", widths.groups, dim
        elif word == "width":
            yield "channel", widths.channels, dim


def backward(
    run: Run,
    dtype: str,
    model: Artifact,
    calibration: Artifact,
    sums: Callable[[StoredModel, int, Mapping[str, Tensor]], Sums],
) -> Artifact:
    """Send the loss's gradient back through all blocks; `sums(stored, index, weights)` begins what is summed of one."""
    import torch

    from ..blocks import StoredModel, read_windows, resolve_dtype
    from ..resuming import SavingPace, note_resumed
    from ..skeleton import Skeleton

    journal = run.journal
    assert journal is not None
    with (
        StoredModel(run, model) as stored,
        ArtifactWriter(run.store, "statistics") as writer,
        tempfile.TemporaryDirectory(prefix="coldpress-gradients-") as folder,
    ):
        windows = read_windows(run, calibration, stored)
        wanted = resolve_dtype(dtype, stored)
        # Gradients of a mean over thousands of tokens underflow in float16.
        skeleton = Skeleton(stored.config, torch.float32 if wanted == torch.float16 else wanted, run.device)
        done = len(journal.steps)
        for step in journal.steps:
            writer.take_over(step)
        if done == stored.blocks:
            return writer.publish()
        state = journal.state()
        passed = 0 if state is None else state.step
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
            measured = _through_block(run, stored, skeleton, index, inputs.pop(index), gradient, sums)
            if number < done:
                continue
            writer.add_tensors(measured, stored.family.block_prefix(index))
            writer.settle()
            now = time.perf_counter()
            journal.commit({**writer.part(measured, []), "seconds": round(now - clock, 3)})
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
        need, free = (blocks + 1) * hidden.nbytes, shutil.disk_usage(folder).free
        if need > free:  # mapped files that find no room end the process
            raise StageError(
                f"the blocks' inputs take {need / 1e9:.1f} GB in temporary files, but {tempfile.gettempdir()} has "
                f"{free / 1e9:.1f} GB free; make room, set TMPDIR to a larger disk, or use fewer or shorter windows"
            )
        left = {}
        for index in range(blocks + 1):
            path = os.path.join(folder, str(index))
            left[index] = kept = torch.from_file(path, shared=True, size=hidden.numel(), dtype=hidden.dtype).view(
                hidden.shape
            )
            os.unlink(path)  # its room is free again as soon as nothing maps it
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
    sums: Callable[[StoredModel, int, Mapping[str, Tensor]], Sums],
) -> dict[str, Tensor]:
    """What was summed of a block's gradients; `gradient`, by its outputs, becomes that by its inputs."""
    import torch

    dense = stored.dense(index, skeleton.dtype)
    summed = sums(stored, index, dense)
    names = list(summed.names)
    for name in names:
        dense[name].requires_grad_()
    for number in range(len(inputs)):
        with torch.enable_grad():
            hidden = inputs[number][None].to(run.device).requires_grad_()
            output = skeleton.forward_block(index, dense, hidden)
            upstream = gradient[number][None].to(run.device)
            onward, *found = torch.autograd.grad(output, [hidden, *(dense[name] for name in names)], upstream)
        gradient[number] = onward[0].cpu()
        with torch.no_grad():
            summed.add(dict(zip(names, found, strict=True)))
    prefix = stored.family.block_prefix(index)
    with torch.no_grad():
        result = summed.result()
    for name, total in result.items():
        if not bool(total.isfinite().all()):
            raise StageError(f"the gradient of {prefix}{name} is not finite; set dtype to float32")
    return {prefix + name: total.cpu() for name, total in result.items()}
