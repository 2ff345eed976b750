"""The block loop: one decoder block in memory at a time, whatever the model's size or the method.

`run_blocks` is the whole of it. For each block: load it alone; run the calibration windows through it to gather what
the method needs; let the method change its weights; store the result; run the windows through the block *as stored*
to feed the next one; commit the block to the journal; let it go. Statistics are summed in a fixed order, so a run
that is interrupted and resumed ends in the same bytes.
"""

from __future__ import annotations

import ctypes
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..storage.artifacts import Artifact, ArtifactReader, ArtifactWriter, Manifest
from ..storage.journal import Journal, State
from .adaptation.peft_format import weight_of
from .architectures import Linear, block_count, family_of, is_tied
from .formats import unpack
from .resuming import SavingPace, note_resumed
from .skeleton import Skeleton, Statistic, activation_device
from .stage import Preempted, Run, StageError


@dataclass(frozen=True)
class Block:
    """A block as a method sees it.

    weights: {linear weight's full name: [out_features, in_features]}, as stored, in the storage dtype, on the device;
    packed ones in float32. originals: those of the dense model that a compensation tries to bring back.
    statistics: what was gathered for each of those layers; layers that read the same input share one object.
    masks: {full name: bool, True where kept} of those that were pruned before.
    linears: what each weight is for. rest: the block's other tensors (norms, biases), as stored, on the device.
    """

    index: int
    prefix: str
    weights: Mapping[str, Tensor]
    statistics: Mapping[str, Any]
    masks: Mapping[str, Tensor]
    linears: Mapping[str, Linear]
    rest: Mapping[str, Tensor]
    originals: Mapping[str, Tensor] = field(default_factory=dict)

    def by_input(self) -> list[list[str]]:
        """The block's weights, those that read the same input together."""
        groups: dict[str, list[str]] = {}
        for name, linear in self.linears.items():
            groups.setdefault(linear.reads, []).append(name)
        return list(groups.values())

    def removal_notes(self, removed: Mapping[str, float]) -> dict[str, dict[str, float]]:
        """Notes for the provenance on what a pruner removed: the share of each weight, and of the block's weights."""
        sizes = {name: self.weights[name].numel() for name in removed}
        gone = sum(share * sizes[name] for name, share in removed.items())
        return {"sparsity": dict(removed), "share_of_block": {str(self.index): gone / sum(sizes.values())}}


@dataclass(frozen=True)
class Change:
    """What a method made of a block: tensors to store instead of the weights named in `replaced`, and their masks.

    notes: JSON values for the provenance, {name: {layer: value}}.
    """

    tensors: Mapping[str, Tensor]
    replaced: frozenset[str]
    masks: Mapping[str, Tensor] = field(default_factory=dict)
    notes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


class StoredModel:
    """A checkpoint artifact, opened for reading block by block.

    An adapter is opened with the checkpoint it belongs to, whose manifest and masks these then are: a block's stored
    tensors are the checkpoint's and the adapter's, and the dense weights W_c + B A.
    """

    def __init__(self, run: Run, artifact: Artifact) -> None:
        self.manifest = run.store.manifest(artifact)
        self._adapter: ArtifactReader | None = None
        if self.manifest.base is not None:
            self._adapter = ArtifactReader(run.store, self.manifest)
            self.manifest = run.store.manifest(self.manifest.base)
        self.reader = ArtifactReader(run.store, self.manifest)
        self.config: dict[str, Any] = json.loads(self.reader.file("config.json"))
        self.family = family_of(self.config)
        self.blocks = block_count(self.config)
        self.device = run.device
        self._names: dict[int | None, list[str]] = {}
        for name in self.manifest.tensors:
            self._names.setdefault(self.family.block_of(name), []).append(name)
        self._adapter_names: dict[int | None, list[str]] = {}
        for name in self._adapter.manifest.tensors if self._adapter else ():
            self._adapter_names.setdefault(self.family.block_of(weight_of(name) or name), []).append(name)
        missing = [index for index in range(self.blocks) if index not in self._names]
        if missing:
            raise StageError(f"the checkpoint has no tensors for block {missing[0]} of {self.blocks}")

    def __enter__(self) -> StoredModel:
        return self

    def __exit__(self, *_: object) -> None:
        self.reader.__exit__()
        if self._adapter is not None:
            self._adapter.__exit__()

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which the checkpoint's unpacked weights are stored; its config.json is ours and says so."""
        dtype = getattr(torch, self.config["dtype"])
        assert isinstance(dtype, torch.dtype)
        return dtype

    @property
    def packed(self) -> bool:
        """Whether its weights have to be made of several stored tensors."""
        return self.manifest.format != "dense" or self._adapter is not None

    @property
    def tied(self) -> bool:
        return is_tied(self.config, self.manifest.tensors)

    def names(self, index: int | None) -> list[str]:
        """Names of the checkpoint's stored tensors of a block, or (None) of those outside the blocks."""
        return self._names.get(index, [])

    def prefetch(self, index: int) -> None:
        """Begin to read a block, if there is one of that number."""
        if index < self.blocks:
            self.reader.prefetch(self.names(index))
            if self._adapter is not None:
                self._adapter.prefetch(self._adapter_names.get(index, []))

    def stored(self, index: int | None) -> dict[str, Tensor]:
        """A block's tensors as they are stored, on the CPU."""
        tensors = self.reader.tensors(self.names(index))
        if self._adapter is not None:
            tensors.update(self._adapter.tensors(self._adapter_names.get(index, [])))
        return tensors

    def outer(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """All tensors outside the blocks, on the device."""
        return {name: tensor.to(self.device, dtype) for name, tensor in self.stored(None).items()}

    def unpack(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
        """Dense weights for stored tensors."""
        return unpack(self.manifest.format, self.manifest.quantization, tensors, dtype, self.device)

    def dense(self, index: int, dtype: torch.dtype) -> dict[str, Tensor]:
        """A block's dense weights on the device, named relative to it."""
        return _relative(self.unpack(self.stored(index), dtype), self.family.block_prefix(index))

    def linear_shapes(self, index: int) -> dict[str, tuple[int, int]]:
        """{full weight name: (out_features, in_features)} of a block's linear layers."""
        prefix = self.family.block_prefix(index)
        return {prefix + name: shape for name, shape in self.family.linear_weights(self.config).items()}

    def linears(self, index: int) -> dict[str, Linear]:
        """{full weight name: what the layer is for}."""
        prefix = self.family.block_prefix(index)
        return {f"{prefix}{linear.name}.weight": linear for linear in self.family.linears}


def resolve_dtype(name: str, model: StoredModel) -> torch.dtype:
    """The compute dtype that a parameter asks for; "auto" is the checkpoint's own."""
    if name == "auto":
        return model.dtype
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


@torch.no_grad()
def run_blocks(
    run: Run,
    model: StoredModel,
    what: str,
    *,
    change: Callable[[Block], Change],
    writer: ArtifactWriter,
    format: str = "dense",
    quantization: Mapping[str, Any] | None = None,
    windows: Tensor | None = None,
    statistic: Callable[[int], Statistic] | None = None,
    dtype: torch.dtype | None = None,
    original: StoredModel | None = None,
) -> None:
    """Take every block through `change` and give the results to `writer`.

    what: the activity's name in progress reports ("pruning"). windows: calibration token ids [windows, length];
    without them nothing is propagated. statistic: makes one for in_features, for each distinct input of the linears.
    dtype: of the calibration pass. format, quantization: how the changed tensors are packed.
    original: the dense model that a compensation of `model` tries to bring back. `change` gets its weights, the pass
    through the block that gathers statistics uses them, and what is written is an adapter: what changes add, no more.
    """
    dtype = dtype or model.dtype
    journal = run.journal
    assert journal is not None
    done = len(journal.steps)
    hidden: Tensor | None = None
    skeleton: Skeleton | None = None
    model.prefetch(done)
    for step in journal.steps:
        writer.take_over(step)
        run.merge_notes(step["notes"])
    passed = done
    if windows is not None and done < model.blocks:
        skeleton = Skeleton(model.config, dtype, run.device)
        hidden, passed = _reach_first_block(
            run, journal, model, skeleton, windows, what, format, quantization, adapter=original is not None
        )
    note_resumed(run, journal, model.blocks, done - passed)
    if done:
        run.progress(what, done, model.blocks)
    if original is None:
        writer.share(model.manifest, model.names(None))
    saving = SavingPace(0 if hidden is None else hidden.nbytes)
    clock = time.perf_counter()

    for index in range(done, model.blocks):
        stored = model.stored(index)
        prefix = model.family.block_prefix(index)
        linears = model.linears(index)
        originals: dict[str, Tensor] = {}
        if original is not None:
            originals = {name: t.to(run.device) for name, t in original.reader.tensors(linears).items()}
        try:
            statistics: dict[str, Any] = {}
            if skeleton is not None and hidden is not None and statistic is not None:
                dense = model.unpack(stored, dtype) | {name: t.to(dtype) for name, t in originals.items()}
                dense = _relative(dense, prefix)
                statistics = gather_statistics(skeleton, index, dense, hidden, linears, statistic, run.stop_if_asked)
                del dense
            plain = model.unpack(stored, torch.float32) if model.packed else stored
            block = Block(
                index=index,
                prefix=prefix,
                weights={name: plain[name].to(run.device) for name in linears},
                statistics=statistics,
                masks={n: mask.to(run.device) for n, mask in model.reader.masks(model.linear_shapes(index)).items()},
                linears=linears,
                rest={name: tensor.to(run.device) for name, tensor in plain.items() if name not in linears},
                originals=originals,
            )
            del plain, originals
            # Here, since methods leave processors idle that a pass through the block keeps busy.
            model.prefetch(index + 1)
            if original is not None and index + 1 < model.blocks:
                original.reader.prefetch(model.linears(index + 1))
            result = change(block)
        except Preempted:
            if hidden is not None:
                journal.save_state(index, {"hidden": hidden}, {})
            raise
        del block, statistics
        writer.add_tensors(result.tensors, prefix)
        writer.add_masks(result.masks, prefix)
        kept = [name for name in model.names(index) if name not in result.replaced]
        shared = kept if original is None else []
        writer.share(model.manifest, shared)

        last = index + 1 == model.blocks
        if skeleton is not None and hidden is not None and not last:
            as_stored = {**{name: stored[name] for name in kept}, **result.tensors}
            dense = _relative(unpack(format, quantization, as_stored, dtype, run.device), prefix)
            skeleton.advance(index, dense, hidden)
            del dense, as_stored
        del stored
        writer.settle()
        now = time.perf_counter()
        part = writer.part([*shared, *result.tensors], result.masks)
        journal.commit({**part, "notes": result.notes, "seconds": round(now - clock, 3)})
        clock = now
        run.merge_notes(result.notes)
        del result
        _return_free_memory()
        run.progress(what, index + 1, model.blocks)
        if not last:
            if hidden is not None and (run.stop_asked() or saving.due()):
                with saving:
                    journal.save_state(index + 1, {"hidden": hidden}, {})
            run.stop_if_asked()


def _return_free_memory() -> None:
    """Give pages that a block has freed back to the system, where the C library can (GNU's).

    Pieces that stay in the heap never fit the next block's tensors quite, and the peak would creep up with depth.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _reach_first_block(
    run: Run,
    journal: Journal,
    model: StoredModel,
    skeleton: Skeleton,
    windows: Tensor,
    what: str,
    format: str,
    quantization: Mapping[str, Any] | None,
    adapter: bool,
) -> tuple[Tensor, int]:
    """Inputs of the first unfinished block, and the number of blocks that an earlier attempt had saved them after.

    They come from the embedding, or are those last saved, sent through the blocks finished since then. adapter: whether
    the journal has only what is added to the model's own blocks.
    """
    hidden, passed = _restore(run, skeleton, model.outer(skeleton.dtype), windows, journal.state())
    done = len(journal.steps)
    for index in range(passed, done):
        run.stop_if_asked()
        with ArtifactReader(run.store, Manifest.of_part("checkpoint", journal.steps[index])) as reader:
            tensors = {**(model.stored(index) if adapter else {}), **reader.tensors(reader.manifest.tensors)}
        dense = unpack(format, quantization, tensors, skeleton.dtype, run.device)
        skeleton.advance(index, _relative(dense, model.family.block_prefix(index)), hidden)
        del tensors, dense
        run.progress(f"{what}, activations again", index + 1, done)
    return hidden, passed


def not_finite(what: str, dtype: torch.dtype) -> StageError:
    """The error for activations that overflowed."""
    advice = "bfloat16 or float32" if dtype == torch.float16 else "float32"
    return StageError(f"{what} are not finite in {str(dtype).removeprefix('torch.')}; set dtype to {advice}")


def gather_statistics(
    skeleton: Skeleton,
    index: int,
    weights: Mapping[str, Tensor],
    hidden: Tensor,
    linears: Mapping[str, Linear],
    statistic: Callable[[int], Statistic],
    before_each: Callable[[], None] = lambda: None,
) -> dict[str, Statistic]:
    """One pass of the windows through a block: {full weight name: statistic of that layer's input}."""
    by_input: dict[str, Statistic] = {}
    wanted: dict[str, Statistic] = {}
    for linear in linears.values():
        if linear.reads not in by_input:
            by_input[linear.reads] = statistic(weights[f"{linear.name}.weight"].shape[1])
            wanted[linear.name] = by_input[linear.reads]
    skeleton.gather(index, weights, hidden, wanted, before_each)
    for name, seen in wanted.items():
        if not seen.finite():
            raise not_finite(f"the inputs of {name} in block {index}", skeleton.dtype)
    return {name: by_input[linear.reads] for name, linear in linears.items()}


@torch.no_grad()
def stream_hidden(
    run: Run,
    model: StoredModel,
    skeleton: Skeleton,
    windows: Tensor,
    what: str,
    visit: Callable[[int, dict[str, Tensor], Tensor], Mapping[str, Any]] = lambda index, weights, hidden: {},
    advance: Callable[[int, dict[str, Tensor], Tensor], Mapping[str, Any]] | None = None,
) -> tuple[Tensor, dict[str, Tensor], list[dict[str, Any]]]:
    """Send windows through all blocks as they are.

    Returns the last block's outputs [windows, length, hidden], the tensors outside the blocks, and what
    `visit(index, weights, inputs)` made of each block's weights, named relative to it, and inputs: a JSON record, which
    is committed to the journal with the block. advance: replaces the inputs by what the next block is to get, in other
    ways than sending all windows through the block, and may add to the record.
    """
    journal = run.journal
    assert journal is not None
    done = len(journal.steps)
    state = journal.state()
    model.prefetch(0 if state is None else state.step)
    outer = model.outer(skeleton.dtype)
    hidden, passed = _restore(run, skeleton, outer, windows, state)
    note_resumed(run, journal, model.blocks, done - passed)
    saving = SavingPace(hidden.nbytes)
    clock = time.perf_counter()
    for index in range(passed, model.blocks):
        model.prefetch(index + 1)
        dense = model.dense(index, skeleton.dtype)
        try:
            record = visit(index, dense, hidden) if index >= done else {}
        except Preempted:
            journal.save_state(index, {"hidden": hidden}, {})
            raise
        if advance is None:
            skeleton.advance(index, dense, hidden)
        else:
            record = {**record, **advance(index, dense, hidden)}
        del dense  # before the next block is read
        if index >= done:
            now = time.perf_counter()
            journal.commit({**record, "seconds": round(now - clock, 3)})
            clock = now
        run.progress(what, index + 1, model.blocks)
        if index >= done and (run.stop_asked() or saving.due()):
            with saving:
                journal.save_state(index + 1, {"hidden": hidden}, {})
        run.stop_if_asked()
    return hidden, outer, journal.steps


def _restore(
    run: Run, skeleton: Skeleton, outer: Mapping[str, Tensor], windows: Tensor, state: State | None
) -> tuple[Tensor, int]:
    """Activations to go on with, from the embedding or as they were saved, and after how many blocks they are."""
    # From one window the skeleton learns with which arguments blocks are called.
    hidden = skeleton.embed(outer, windows if state is None else windows[:1])
    if state is None:
        return hidden, 0
    saved = state.tensors["hidden"]
    return saved.to(activation_device(saved.shape, skeleton.dtype, run.device)), state.step


def read_windows(run: Run, tokens: Artifact, model: StoredModel, *, padded: bool = False) -> Tensor:
    """Token ids [windows, length] of a tokens artifact, checked against the model's vocabulary and context.

    padded: whether they may be records or lines, of which some tokens are padding.
    """
    with ArtifactReader(run.store, tokens) as reader:
        if "counted" in reader.manifest.tensors and not padded:
            raise StageError(
                "the data are records or lines, padded to one length, which only training and evaluation can use; give "
                "running text instead"
            )
        windows = reader.tensors(["input_ids"])["input_ids"].long()
    vocabulary = int(model.config["vocab_size"])
    if int(windows.max()) >= vocabulary:
        raise StageError(
            f"the tokens hold id {int(windows.max())}, beyond the model's vocabulary of {vocabulary}: "
            "they were made with another tokenizer"
        )
    context = int(model.config.get("max_position_embeddings") or windows.shape[1])
    if windows.shape[1] > context:
        raise StageError(
            f"windows of {windows.shape[1]} tokens exceed the model's context of {context}; "
            f"set length to {context} or less"
        )
    return windows


def _relative(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
