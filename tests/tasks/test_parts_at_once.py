"""Windows that go through a block side by side, on two of torch's threads: as if one came after the other."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from coldpress.storage.artifacts import Artifact
from coldpress.storage.store import Store
from coldpress.tasks.blocks import StoredModel
from coldpress.tasks.skeleton import Skeleton
from coldpress.tasks.stage import Run
from torch import Tensor

PARTS = 6  # windows of 40 tokens, each a part of its own

Setting = tuple[Skeleton, dict[str, Tensor], Tensor]


class Seen:
    """A statistic that keeps all inputs."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.inputs: list[Tensor] = []
        self._fails_at = fails_at

    def add(self, inputs: Tensor) -> None:
        if len(self.inputs) == self._fails_at:
            raise ValueError("no more of these")
        self.inputs.append(inputs.clone())

    def finite(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def two_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("coldpress.tasks.skeleton.TOKENS_AT_ONCE", 40)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def block(store: Store, import_model: Callable[..., Artifact]) -> Iterator[Setting]:
    """A skeleton, the weights of block 0, and its inputs."""
    windows = torch.randint(0, 128, (PARTS, 40), generator=torch.Generator().manual_seed(0))
    run = Run(store)
    with StoredModel(run, import_model("llama")) as stored, torch.no_grad():
        skeleton = Skeleton(stored.config, torch.float32, "cpu")
        hidden = skeleton.embed(stored.outer(torch.float32), windows)
        yield skeleton, stored.dense(0, torch.float32), hidden


def one_after_another(function: Callable[..., Any], *arguments: Any) -> None:
    torch.set_num_threads(1)
    function(*arguments)
    torch.set_num_threads(2)


def wanted(**kwargs: Any) -> dict[str, Seen]:
    return {name: Seen(**kwargs) for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj")}


def test_outputs_are_the_same(block: Setting) -> None:
    skeleton, weights, hidden = block
    expected, inputs = hidden.clone(), hidden.clone()
    one_after_another(skeleton.advance, 0, weights, expected)
    skeleton.advance(0, weights, hidden)
    assert torch.equal(hidden, expected)
    assert not torch.equal(hidden, inputs)
    assert torch.get_num_threads() == 2


def test_statistics_see_all_windows_in_their_order(block: Setting) -> None:
    skeleton, weights, hidden = block
    expected, found = wanted(), wanted()
    begun = itertools.count()

    def hold_up_every_other() -> None:
        time.sleep(0.0 if next(begun) % 2 else 0.1)

    one_after_another(skeleton.gather, 0, weights, hidden, expected)
    skeleton.gather(0, weights, hidden, found, hold_up_every_other)
    for name, seen in found.items():
        assert len(seen.inputs) == PARTS
        assert all(map(torch.equal, seen.inputs, expected[name].inputs)), name


def test_an_error_in_one_window_ends_the_pass_and_leaves_nothing_behind(block: Setting) -> None:
    skeleton, weights, hidden = block
    before, found = hidden.clone(), wanted()
    with pytest.raises(ValueError, match="no more of these"):
        skeleton.gather(0, weights, hidden, {**wanted(), "self_attn.o_proj": Seen(fails_at=2)})
    skeleton.gather(0, weights, hidden, found)
    assert {len(seen.inputs) for seen in found.values()} == {PARTS}
    assert torch.equal(hidden, before)


def test_what_is_asked_before_each_window_can_end_the_pass(block: Setting) -> None:
    skeleton, weights, hidden = block
    calls = []

    def stop() -> None:
        calls.append(1)
        if len(calls) == 3:
            raise InterruptedError

    found = wanted()
    with pytest.raises(InterruptedError):
        skeleton.gather(0, weights, hidden, found, stop)
    assert all(len(seen.inputs) < PARTS for seen in found.values())
