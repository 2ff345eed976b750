"""A model without its weights: it embeds tokens, calls one block, and finishes with the head.

Built by `transformers` with parameters on the meta device; the tensors are handed in call by call, so nothing of the
model stays in memory between calls.
"""

from __future__ import annotations

import math
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .architectures import Family, family_of
from .causal_attention import use_causal_attention
from .half_precision import use_fast_linears
from .side_by_side import side_by_side

# Windows go through a block together up to this many tokens: small matrices keep no processor busy.
TOKENS_AT_ONCE = 1024
# On the CPU in so many parts side by side, each with its share of torch's threads and of the caches. A thread that
# other programs keep waiting then holds up its own part, where it would hold up all threads at each operation's end.
PARTS_AT_ONCE = 2


class Statistic(Protocol):
    """Something summed over the calibration inputs of a linear layer, a few windows at a time."""

    def add(self, inputs: Tensor) -> None:
        """Add the inputs of some windows, [tokens, in_features]."""
        ...

    def finite(self) -> bool:
        """Whether all inputs seen were finite numbers."""
        ...


class _Stop(Exception):
    """Ends a forward pass early, when everything asked for has been seen."""


class Skeleton:
    """A `transformers` model whose parameters stay on the meta device; weights are handed in call by call.

    own_linears: whether half precision is multiplied as in `half_precision.py`, on a CPU without instructions for it.
    If not it is as in models that others load, and slow.
    """

    def __init__(self, config: Mapping[str, Any], dtype: torch.dtype, device: str, *, own_linears: bool = True) -> None:
        self.family: Family = family_of(config)
        self.config = config
        self.dtype = dtype
        self.device = device
        self.model = build_model(config, dtype)
        if device == "cpu":
            use_causal_attention(self.model)
            if own_linears:
                use_fast_linears(self.model)
        self._blocks: nn.ModuleList = self.model.get_submodule(self.family.blocks)
        for module in self.model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(device))
        self._calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def parameter_names(self) -> dict[str, tuple[int, ...]]:
        """Every parameter by its name in checkpoint files, with its shape; a tied head is not listed."""
        return {self.family.file_name(name): tuple(p.shape) for name, p in self.model.named_parameters()}

    def change_inputs(self, change: Callable[[Tensor], Tensor], index: int, layers: Iterable[str]) -> None:
        """From now on let layers of block `index`, named relative to it, see `change(inputs)` for their inputs."""
        for name in layers:
            self._blocks[index].get_submodule(name).register_forward_pre_hook(lambda module, inputs: change(*inputs))

    def embed(self, outer: Mapping[str, Tensor], windows: Tensor) -> Tensor:
        """Inputs of the first block, [windows, length, hidden], for token ids [windows, length].

        Also records with which further arguments (mask, positions …) the model calls each of its blocks; they depend
        on the length alone. `outer`: the tensors outside the blocks, by parameter name.
        """
        first: list[Tensor] = []
        hidden: Tensor | None = None
        for index, window in enumerate(windows):
            first.clear()
            self._calls.clear()
            with self._recording(first, stop_at_first=index > 0), self._weights(outer), _ignoring_stop():
                self.model.base_model(input_ids=window[None].to(self.device), use_cache=False)
            if index == 0:
                calls = list(self._calls)
                shape = (len(windows), *first[0].shape[1:])
                hidden = torch.empty(shape, dtype=self.dtype, device=activation_device(shape, self.dtype, self.device))
            assert hidden is not None
            hidden[index] = first[0][0]
        self._calls = calls
        assert hidden is not None
        return hidden

    def forward_block(self, index: int, weights: Mapping[str, Tensor], hidden: Tensor) -> Tensor:
        """Output of block `index`, [windows, length, hidden]; `weights` are named relative to the block."""
        arguments, keywords = self._calls[index]
        output = torch.func.functional_call(
            self._blocks[index], dict(weights), (hidden, *arguments), keywords, strict=True
        )
        return output[0] if isinstance(output, tuple) else output

    def advance(self, index: int, weights: Mapping[str, Tensor], hidden: Tensor) -> None:
        """Replace windows [windows, length, hidden], wherever they are kept, by the outputs of block `index`."""

        with self._filled(index, weights) as block:

            def replace(number: int, part: Tensor) -> None:
                part.copy_(block(part.to(self.device)))

            _for_each_part(hidden, replace, self.device)

    def gather(
        self,
        index: int,
        weights: Mapping[str, Tensor],
        hidden: Tensor,
        wanted: Mapping[str, Statistic],
        before_each: Callable[[], None] = lambda: None,
    ) -> None:
        """Run windows [windows, length, hidden] through block `index`, adding linear inputs to `wanted` by layer name.

        The forward pass ends at the last input asked for: the final projection is never multiplied out. `before_each`
        is called now and then; what it raises ends the pass, `hidden` as it was.
        """
        here = threading.local()  # number: of the part that a thread is at; left: statistics that still lack it
        turns = _Turns()

        def hook(statistic: Statistic) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
            def add(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
                with turns.at(module, here.number):
                    statistic.add(inputs[0].reshape(-1, inputs[0].shape[-1]))
                here.left -= 1
                if here.left == 0:
                    raise _Stop

            return add

        layers = {self._blocks[index].get_submodule(name): statistic for name, statistic in wanted.items()}
        handles = [layer.register_forward_pre_hook(hook(statistic)) for layer, statistic in layers.items()]
        try:
            with self._filled(index, weights) as block:

                def see(number: int, part: Tensor) -> None:
                    here.number, here.left = number, len(wanted)
                    with turns.over_at_errors(), _ignoring_stop():
                        before_each()
                        block(part.to(self.device))

                _for_each_part(hidden, see, self.device)
        finally:
            for handle in handles:
                handle.remove()

    def finish(self, outer: Mapping[str, Tensor], hidden: Tensor) -> Tensor:
        """What the head reads, [1, length, features], for the last block's output [1, length, hidden]."""
        with self._passing(hidden), self._weights(outer):
            width = self.model.get_input_embeddings().weight.shape[1]  # not the hidden size where OPT projects
            embedded = hidden.new_zeros(1, hidden.shape[1], width)
            output = self.model.base_model(inputs_embeds=embedded, use_cache=False)
        return output.last_hidden_state

    def logits(self, outer: Mapping[str, Tensor], features: Tensor) -> Tensor:
        """Logits in float32, [..., vocabulary], for what `finish` returned."""
        with self._weights(outer):
            logits = self.model.get_output_embeddings()(features).float()
        cap = self.config.get("final_logit_softcapping")
        return torch.tanh(logits / cap) * cap if cap else logits

    @contextmanager
    def _filled(self, index: int, weights: Mapping[str, Tensor]) -> Iterator[Callable[[Tensor], Tensor]]:
        """Block `index` with the given weights, as a function of its inputs that several threads may call."""
        block = self._blocks[index]
        arguments, keywords = self._calls[index]
        assert weights.keys() == {name for name, _ in block.named_parameters()}

        def call(hidden: Tensor) -> Tensor:
            output = block(hidden, *arguments, **keywords)
            return output[0] if isinstance(output, tuple) else output

        with _in_place(block, weights):
            yield call

    @contextmanager
    def _weights(self, outer: Mapping[str, Tensor]) -> Iterator[None]:
        """The given tensors in place of the parameters outside the blocks."""
        names = {name: self.family.file_name(name) for name, _ in self.model.named_parameters(remove_duplicate=False)}
        head = self.model.get_output_embeddings()
        embedding = self.model.get_input_embeddings()
        with _in_place(self.model, {name: outer[key] for name, key in names.items() if key in outer}):
            tied = head.weight.is_meta and not embedding.weight.is_meta
            with _in_place(head, {"weight": embedding.weight} if tied else {}):
                yield

    @contextmanager
    def _recording(self, first: list[Tensor], *, stop_at_first: bool) -> Iterator[None]:
        count = len(self._blocks)

        def record(number: int) -> Callable[..., Tensor]:
            def forward(hidden: Tensor, *arguments: Any, **keywords: Any) -> Tensor:
                if number == 0:
                    first.append(hidden.to(self.dtype))
                self._calls.append((arguments, keywords))
                if stop_at_first or number == count - 1:
                    raise _Stop
                return hidden

            return forward

        with self._replaced_forward(record):
            yield

    @contextmanager
    def _passing(self, result: Tensor) -> Iterator[None]:
        with self._replaced_forward(lambda number: lambda hidden, *arguments, **keywords: result):
            yield

    @contextmanager
    def _replaced_forward(self, make: Callable[[int], Callable[..., Tensor]]) -> Iterator[None]:
        try:
            for number, block in enumerate(self._blocks):
                block.forward = make(number)
            yield
        finally:
            for block in self._blocks:
                del block.forward  # the class's own comes back


def activation_device(shape: Sequence[int], dtype: torch.dtype, device: str) -> str:
    """Where activations are kept between blocks: the device, or the CPU if they took over half of its free memory."""
    if not device.startswith("cuda"):
        return device
    free, _ = torch.cuda.mem_get_info(device)
    return device if math.prod(shape) * dtype.itemsize <= free / 2 else "cpu"


def parts(hidden: Tensor) -> tuple[Tensor, ...]:
    """Views of windows [windows, length, hidden] that go through a block together."""
    return hidden.split(max(1, TOKENS_AT_ONCE // hidden.shape[1]))


def _for_each_part(hidden: Tensor, work: Callable[[int, Tensor], None], device: str) -> None:
    """`work(number, part)` for all parts of the windows: on the CPU PARTS_AT_ONCE at a time, begun in their order."""
    split = parts(hidden)
    threads = torch.get_num_threads()
    if device != "cpu" or threads % PARTS_AT_ONCE or len(split) < PARTS_AT_ONCE:
        for number, part in enumerate(split):
            work(number, part)
        return
    share = threads // PARTS_AT_ONCE
    try:
        side_by_side(
            lambda numbered: work(*numbered), enumerate(split), PARTS_AT_ONCE, lambda: torch.set_num_threads(share)
        )
    finally:
        torch.set_num_threads(threads)


class _Turns:
    """Lets parts that go through a block side by side pass each place in their order."""

    def __init__(self) -> None:
        self._moved = threading.Condition()
        self._passed: dict[object, int] = defaultdict(int)
        self._over = False

    @contextmanager
    def at(self, place: object, number: int) -> Iterator[None]:
        """Waits until all parts before this one have passed. Raises _Stop when one of them never will."""
        with self._moved:
            self._moved.wait_for(lambda: self._over or self._passed[place] == number)
            if self._over:
                raise _Stop
        yield
        with self._moved:
            self._passed[place] += 1
            self._moved.notify_all()

    @contextmanager
    def over_at_errors(self) -> Iterator[None]:
        """An error in here ends the waiting of the others."""
        try:
            yield
        except BaseException:
            with self._moved:
                self._over = True
                self._moved.notify_all()
            raise


@contextmanager
def _in_place(module: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """The given tensors in place of a module's parameters of those names."""
    saved: list[tuple[dict[str, nn.Parameter | None], str, nn.Parameter | None]] = []
    try:
        for name, tensor in tensors.items():
            owner, _, last = name.rpartition(".")
            parameters = module.get_submodule(owner)._parameters
            saved.append((parameters, last, parameters[last]))
            parameters[last] = nn.Parameter(tensor, requires_grad=False)
        yield
    finally:
        for parameters, last, parameter in reversed(saved):
            parameters[last] = parameter


@contextmanager
def _ignoring_stop() -> Iterator[None]:
    try:
        yield
    except _Stop:
        return


def build_model(config: Mapping[str, Any], dtype: torch.dtype) -> Any:
    """A `transformers` causal language model with real buffers, parameters on the meta device, evaluation mode."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    plain = {key: value for key, value in config.items() if key not in ("quantization_config", "model_type")}
    built = AutoConfig.for_model(config["model_type"], **plain)
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(built, dtype=dtype)
    return model.eval().requires_grad_(False)
