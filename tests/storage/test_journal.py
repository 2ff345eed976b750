"""Journals: whatever is left of one is a beginning of the work, and a damaged file counts as not written."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from coldpress.storage.journal import Journal, unfinished
from coldpress.storage.store import Store

PREIMAGE = {"stage": "prune/wanda", "parameters": {"sparsity": 0.5}}
CONTEXT = {"recipe": "tiny", "node": "pruned"}
Reopen = Callable[[], Store]


def tensors(seed: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return {"hidden": torch.randn(2, 3, 4).bfloat16(), "more": torch.arange(5)}


def filled(store: Store) -> Journal:
    """Three steps, and a state after the second."""
    journal = Journal(store, PREIMAGE, CONTEXT)
    for number in range(3):
        blob, size = store.put_blob([b"block %d" % number])
        journal.commit({"number": number, "blobs": {blob: size}})
        if number == 1:
            journal.save_state(2, tensors(1), {"seen": 7})
    return journal


def test_the_next_attempt_finds_the_steps_and_the_state(store: Store, reopen: Reopen) -> None:
    filled(store)
    journal = Journal(reopen(), PREIMAGE, CONTEXT)
    assert [step["number"] for step in journal.steps] == [0, 1, 2]
    state = journal.state()
    assert state is not None
    assert (state.step, state.record) == (2, {"seen": 7})
    assert all(torch.equal(state.tensors[name], tensor) for name, tensor in tensors(1).items())
    assert state.tensors.keys() == tensors(1).keys()


def test_a_new_state_takes_the_place_of_the_old(store: Store, reopen: Reopen) -> None:
    filled(store).save_state(3, tensors(2), {})
    state = Journal(reopen(), PREIMAGE, CONTEXT).state()
    assert state is not None
    assert state.step == 3
    assert torch.equal(state.tensors["hidden"], tensors(2)["hidden"])
    assert len([path for path, _ in store.files.list("journals") if "/tensors-" in path]) == 1


def test_another_key_has_another_journal(store: Store) -> None:
    filled(store)
    other = Journal(store, {**PREIMAGE, "parameters": {"sparsity": 0.6}}, CONTEXT)
    assert other.steps == []
    assert other.state() is None


@pytest.mark.parametrize("position", [0.0, 0.3, 0.6, 0.99])
def test_a_flipped_bit_in_any_file_leaves_a_beginning_of_the_work(
    store: Store, reopen: Reopen, position: float
) -> None:
    filled(store)
    for path, size in list(store.files.list("journals")):
        good = bytes(store.files.read(path))
        bad = bytearray(good)
        bad[int(position * size)] ^= 1
        store.files.replace(path, [bytes(bad)])
        journal = Journal(reopen(), PREIMAGE, CONTEXT)
        assert [step["number"] for step in journal.steps] == [0, 1, 2][: len(journal.steps)]
        state = journal.state()
        if state is not None:
            assert state.step <= len(journal.steps)
            assert torch.equal(state.tensors["hidden"], tensors(1)["hidden"])
        assert len(journal.steps) < 3 or state is None, path  # the damage was seen
        store.files.replace(path, [good])
    assert len(Journal(reopen(), PREIMAGE, CONTEXT).steps) == 3


def test_a_step_whose_blob_has_gone_ends_the_journal(store: Store, reopen: Reopen) -> None:
    journal = filled(store)
    (blob,) = journal.steps[1]["blobs"]
    store.files.delete(f"blobs/sha256/{blob[:2]}/{blob[2:]}")
    again = Journal(reopen(), PREIMAGE, CONTEXT)
    assert [step["number"] for step in again.steps] == [0]
    assert again.state() is None  # it presumes two steps


def test_steps_after_a_lost_one_are_written_anew(store: Store, reopen: Reopen) -> None:
    journal = filled(store)
    (path,) = [path for path, _ in store.files.list("journals") if path.endswith("steps/00001")]
    store.files.delete(path)
    again = Journal(reopen(), PREIMAGE, CONTEXT)
    again.commit(journal.steps[1])
    again.commit(journal.steps[2])
    assert [step["number"] for step in Journal(reopen(), PREIMAGE, CONTEXT).steps] == [0, 1, 2]


def test_a_finished_stage_leaves_no_journal(store: Store, reopen: Reopen) -> None:
    journal = filled(store)
    assert [entry["context"] for entry in unfinished(store)] == [CONTEXT]
    journal.discard()
    assert list(store.files.list("journals")) == []
    assert list(unfinished(reopen())) == []


def test_a_state_that_comes_late_takes_nothing_from_an_attempt_that_went_on(store: Store) -> None:
    first = filled(store)
    second = Journal(store, PREIMAGE, CONTEXT)
    second.commit({"number": 3})
    first.save_state(3, tensors(2), {})
    second.commit({"number": 4})
    assert [step["number"] for step in Journal(store, PREIMAGE, CONTEXT).steps] == [0, 1, 2, 3, 4]
