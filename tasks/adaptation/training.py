"""The training loop of all methods that learn: batches in a seeded order, AdamW, a schedule, and a journal.

Whatever decides a step (its batch, dropout, learning rate) is a function of the seed and the step's number, so what a
journal keeps is what was learned, the optimizer's state, and the losses. A stage that ends at any step goes on from the
last saved one and, on the same kind of machine, ends in the same bytes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...storage.artifacts import Artifact, ArtifactReader
from ..blocks import StoredModel, read_windows
from ..resuming import SavingPace
from ..stage import Run, StageError

if TYPE_CHECKING:
    from .lora_stage import TrainingParameters

# Losses of this many steps are averaged to see whether training diverges. The first steps may jump, with an optimizer
# that knows nothing yet: until there are more, only the last losses of a training that ends so early are looked at.
SPAN = 10
# Losses of single tokens spread by about 3 nats, so of two means over n tokens one is by chance more than this over
# sqrt(n) above the other in one case of several hundred.
CHANCE = 12.0


@dataclass(frozen=True)
class Examples:
    """What is learned from: windows [examples, length] of token ids, and which of their tokens 1.. count in the loss.

    counted: bool [examples, length - 1].
    """

    windows: Tensor
    counted: Tensor

    def __len__(self) -> int:
        return len(self.windows)

    def of(self, chosen: Tensor, device: str) -> tuple[Tensor, Tensor]:
        """Those examples on the device, cut after the last token that counts in any of them."""
        counted = self.counted[chosen]
        length = int(counted.any(0).nonzero().max()) + 2
        return self.windows[chosen, :length].to(device), counted[:, : length - 1].to(device)


def read_examples(run: Run, data: Artifact, stored: StoredModel) -> Examples:
    """The examples of a tokens artifact; all tokens of plain text count."""
    windows = read_windows(run, data, stored, padded=True)
    with ArtifactReader(run.store, data) as reader:
        if "counted" in reader.manifest.tensors:
            return Examples(windows, reader.tensors(["counted"])["counted"].bool())
    return Examples(windows, torch.ones(len(windows), windows.shape[1] - 1, dtype=torch.bool))


def step_count(parameters: TrainingParameters, examples: int) -> int:
    """How often the weights are updated."""
    return parameters.steps or max(1, math.ceil(parameters.epochs * examples / parameters.batch_size))


def batch_of(step: int, examples: int, size: int, seed: int) -> Tensor:
    """The examples of a step: each epoch is a permutation of all of them, one epoch after the other."""
    chosen: list[Tensor] = []
    for place in range(step * size, (step + 1) * size):
        epoch, within = divmod(place, examples)
        if not chosen or within == 0:
            order = torch.randperm(examples, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
        chosen.append(order[within])
    return torch.stack(chosen)


def learning_rate(step: int, steps: int, parameters: TrainingParameters) -> float:
    """The learning rate of a step: up in a straight line over the warm-up, then by the schedule towards zero."""
    warmup = math.ceil(parameters.warmup * steps)
    if step < warmup:
        return parameters.learning_rate * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    match parameters.schedule:
        case "linear":
            return parameters.learning_rate * (1 - done)
        case "cosine":
            return parameters.learning_rate * (1 + math.cos(math.pi * done)) / 2
    return parameters.learning_rate


def train(
    run: Run,
    learned: Mapping[str, nn.Parameter],
    parameters: TrainingParameters,
    examples: Examples,
    loss: Callable[[Tensor, Tensor], Tensor],
    *,
    phase: int = 0,
    what: str = "training",
    memory: Mapping[str, Tensor] | None = None,
    save_at_end: bool = False,
    before_update: Callable[[int], None] = lambda step: None,
    after_update: Callable[[int, float], None] = lambda step, rate: None,
    may_rise_to: float = 0.0,
) -> list[float]:
    """Train `learned` in place. Returns the mean loss of each step.

    loss: of token ids [windows, length] and what counts of them [windows, length - 1], summed over what counts.
    phase: tells several trainings of one stage apart in its journal. memory: further tensors that the two functions
    change in place; they are kept with the rest. save_at_end: whether the stage goes on after this training.
    before_update: called with gradients complete; after_update: called with the weights changed, with the step's
    learning rate. may_rise_to: a loss up to which rising is no error, since weights are removed on the way.

    What a step made of the weights is kept when the next one has found it sound; of the last one, if it is finite.
    Raises StageError, naming the step, when losses, gradients or weights are not finite, or training diverges.
    """
    journal = run.journal
    assert journal is not None
    steps = step_count(parameters, len(examples))
    seed = parameters.seed + 7919 * phase
    optimizer = _optimizer(parameters, list(learned.values()), run.device)
    kept = {**{f"learned.{name}": tensor.data for name, tensor in learned.items()}}
    kept.update({f"memory.{name}": tensor for name, tensor in (memory or {}).items()})
    losses: list[float] = []
    state = journal.state()
    if state is not None and state.record.get("phase") == phase:
        for name, tensor in kept.items():
            tensor.copy_(state.tensors[name])
        _restore(optimizer, state.tensors, state.record["optimizer"])
        losses = state.tensors["losses"].tolist()
        before = round(sum(step.get("seconds", 0.0) for step in journal.steps), 3)
        note = {"from_step": len(losses), "of": steps, "seconds_before": before}
        run.note("resumed", {**note, "phase": phase + 1} if phase else note)
    elif journal.attempts[-1]["from_step"] and not phase:
        run.note("resumed", {"from_step": 0, "of": steps, "seconds_before": 0.0})
    saving = SavingPace(3 * sum(tensor.nbytes for tensor in kept.values()))
    clock = time.perf_counter()
    first = len(losses)
    tokens = int(examples.counted.sum()) * parameters.batch_size / len(examples)

    def save(losses: list[float]) -> None:
        nonlocal clock
        tensors, record = _state(optimizer)
        with saving:
            now = time.perf_counter()
            journal.commit({"seconds": round(now - clock, 3)})
            clock = now
            tensors = {**kept, **tensors, "losses": torch.tensor(losses, dtype=torch.float64)}
            journal.save_state(len(journal.steps), tensors, {"phase": phase, "optimizer": record})

    for step in range(first, steps):
        torch.manual_seed(seed * 1_000_003 + step)
        rate = learning_rate(step, steps, parameters)
        for group in optimizer.param_groups:
            group["lr"] = rate
        losses.append(_gradients(run, parameters, examples, loss, step, seed))
        gradients = [parameter.grad for parameter in learned.values() if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        _check(losses, norm, steps, tokens, parameters, may_rise_to)
        if step > first and (run.stop_asked() or saving.due()):
            save(losses[:-1])
        run.stop_if_asked()
        before_update(step)
        torch.nn.utils.clip_grads_with_norm_(learned.values(), parameters.max_grad_norm or math.inf, norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        after_update(step, rate)
        run.progress(f"{what}, loss {losses[-1]:.3f}", step + 1, steps)
    if not all(bool(tensor.isfinite().all()) for tensor in learned.values()):
        raise _not_finite(f"the weights after step {steps} are", parameters)
    if first < steps and (save_at_end or run.stop_asked()):
        save(losses)
    run.stop_if_asked()
    return losses


def _gradients(
    run: Run,
    parameters: TrainingParameters,
    examples: Examples,
    loss: Callable[[Tensor, Tensor], Tensor],
    step: int,
    seed: int,
) -> float:
    """Add up the gradients of a step's batch, a few windows at a time. Returns the batch's mean loss."""
    chosen = batch_of(step, len(examples), parameters.batch_size, seed)
    tokens = int(examples.counted[chosen].sum())
    value = 0.0
    for part in chosen.split(parameters.micro_batch_size):
        if not bool(examples.counted[part].any()):
            continue
        with torch.enable_grad():
            mean = loss(*examples.of(part, run.device)) / tokens
            mean.backward()
        value += float(mean.detach())
    return value


def _check(
    losses: list[float], norm: Tensor, steps: int, tokens: float, parameters: TrainingParameters, may_rise_to: float
) -> None:
    """Raise StageError if training has gone wrong. norm: of all gradients. tokens: that count in a step, on average."""
    step = len(losses)
    if not math.isfinite(losses[-1]) or not bool(norm.isfinite()):
        what = "gradient" if math.isfinite(losses[-1]) else "loss"
        raise _not_finite(f"the {what} of step {step} is", parameters)
    if step == 1 or step < min(steps, SPAN + 1):
        return
    span = SPAN if step > SPAN else step // 2
    means = torch.tensor(losses, dtype=torch.float64).unfold(0, span, 1).mean(1)
    best = int(means.argmin())
    lowest, where = min((losses[0], _steps_until(1, 1)), (float(means[best]), _steps_until(span, best + span)))
    bound = 1.5 * lowest + 0.5 if span == SPAN else 2 * lowest + 1 + CHANCE / math.sqrt(span * tokens)
    if (recent := float(means[-1])) > max(bound, may_rise_to):
        raise StageError(
            f"training diverges: the loss was {lowest:.3f} {where} and is {recent:.3f} {_steps_until(span, step)}; "
            f"lower learning_rate ({parameters.learning_rate:g})"
        )


def _steps_until(span: int, end: int) -> str:
    return f"in step {end}" if span == 1 else f"in the {span} steps up to step {end}"


def _not_finite(what: str, parameters: TrainingParameters) -> StageError:
    return StageError(f"{what} not finite; lower learning_rate ({parameters.learning_rate:g}), or set dtype to float32")


def _optimizer(parameters: TrainingParameters, learned: list[nn.Parameter], device: str) -> torch.optim.Optimizer:
    if parameters.optimizer == "adamw":
        return torch.optim.AdamW(learned, lr=0.0, weight_decay=parameters.weight_decay, fused=True)
    if not device.startswith("cuda"):
        raise StageError(f"optimizer paged-adamw-8bit needs a CUDA device and the stage runs on {device}; use adamw")
    from bitsandbytes.optim import PagedAdamW8bit

    optimizer: torch.optim.Optimizer = PagedAdamW8bit(learned, lr=0.0, weight_decay=parameters.weight_decay)
    return optimizer


def _state(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The optimizer's state: tensors, and a JSON record of what is none. bitsandbytes wraps its own in a mapping."""
    tensors, record = {}, {}
    for number, entries in optimizer.state_dict()["state"].items():
        for key, value in entries.items():
            inner = {f"{number}.{key}.{name}": one for name, one in value.items()} if isinstance(value, dict) else {}
            for path, one in (inner or {f"{number}.{key}": value}).items():
                if isinstance(one, Tensor):
                    tensors[f"optimizer.{path}"] = one
                else:
                    record[path] = one
    return tensors, record


def _restore(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
    """The inverse of `_state`."""
    state: dict[int, dict[str, Any]] = {}
    marked = {name.removeprefix("optimizer."): t for name, t in tensors.items() if name.startswith("optimizer.")}
    for path, value in (*marked.items(), *record.items()):
        number, *keys, last = path.split(".")
        entries = state.setdefault(int(number), {})
        for key in keys:
            entries = entries.setdefault(key, {})
        entries[last] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
