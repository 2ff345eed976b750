"""LoSA: its schedules and ranks, rounds that keep zeros and functions, and every switch of the ablation."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from coldpress.storage.artifacts import Artifact, ArtifactReader
from coldpress.storage.gc import find_garbage
from coldpress.storage.inspect import verify
from coldpress.storage.store import Action, Store
from coldpress.tasks.adaptation.layers import Frozen, MaskedLora
from coldpress.tasks.adaptation.losa import allocate_ranks, relative_error, resize, round_rank, round_sparsity
from coldpress.tasks.adaptation.losa_stage import LosaParameters, check_losa, share_steps
from coldpress.tasks.catalogue import stage_named
from coldpress.tasks.resuming import SavingPace
from coldpress.tasks.stage import Preempted, Run, StageError, compute, facts_of
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

LOSA: dict[str, Any] = {
    "sparsity": 0.5, "rounds": 3, "steps": 9, "batch_size": 4, "micro_batch_size": 4, "learning_rate": 1e-2,
    "rank": 4, "max_rank": 8, "dtype": "float32",
}  # fmt: skip


def test_the_published_schedules() -> None:
    cubic = [round_sparsity(number, 5, 0.7, "cubic") for number in range(1, 6)]
    assert cubic == pytest.approx([0.3416, 0.5488, 0.6552, 0.6944, 0.7])
    assert [round_sparsity(number, 4, 0.8, "linear") for number in range(1, 5)] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert [round_rank(number, 5, 8) for number in range(1, 6)] == [6, 7, 8, 9, 10]
    assert round_rank(1, 1, 8) == 8
    assert [round_rank(number, 3, 1) for number in range(1, 4)] == [1, 1, 1]


def test_steps_are_shared_out_completely() -> None:
    assert share_steps(10000, 5, 0.6) == [1000, 1000, 1000, 1000, 6000]
    assert share_steps(5, 5, 0.6) == [1, 1, 1, 1, 1]
    assert share_steps(7, 1, 0.6) == [7]
    with pytest.raises(StageError, match="4 training steps are too few for 5 rounds"):
        share_steps(4, 5, 0.6)


@given(
    st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=40), st.integers(1, 8).flatmap(lambda mean: st.tuples(
        st.just(mean), st.integers(mean, 16)
    )),
)  # fmt: skip
def test_ranks_meet_their_budget_within_their_bounds_and_follow_the_errors(
    errors: list[float], sizes: tuple[int, int]
) -> None:
    mean, highest = sizes
    ranks = allocate_ranks(errors, mean, highest)
    assert sum(ranks) == mean * len(errors)
    assert all(1 <= rank <= highest for rank in ranks)
    by_error = [rank for _, rank in sorted(zip(errors, ranks, strict=True))]
    assert all(later >= earlier - 1 for earlier, later in pairwise(by_error))


def test_ranks_in_proportion_where_nothing_stands_in_the_way() -> None:
    assert allocate_ranks([1.0, 2.0, 3.0], 4, 16) == [2, 4, 6]
    assert allocate_ranks([0.0, 0.0], 4, 16) == [4, 4]


def test_resizing_keeps_what_is_kept_and_growing_keeps_the_product() -> None:
    a, b = torch.randn(3, 5), torch.randn(4, 3)
    grown = resize(a, b, 6, torch.Generator().manual_seed(0))
    torch.testing.assert_close(grown[1] @ grown[0], b @ a)
    assert bool((grown[0][3:] != 0).all())
    small = resize(a, b, 2, torch.Generator())
    assert torch.equal(small[0], a[:2])
    assert torch.equal(small[1], b[:, :2])


def test_a_layer_that_begins_with_a_term_computes_what_its_weight_does() -> None:
    torch.manual_seed(0)
    weight, mask, inputs = torch.randn(6, 8), torch.rand(6, 8) < 0.5, torch.randn(3, 8)
    weight *= mask
    start = torch.randn(2, 8), torch.randn(6, 2)
    layer = MaskedLora(Frozen(lambda: weight, None), mask, (6, 8), 2, 2.0, 0.0, start)
    torch.testing.assert_close(layer(inputs), inputs @ weight.T, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        layer.b.add_(1.0)
    expected = weight + 2.0 * (torch.ones(6, 2) @ start[0]) * mask
    torch.testing.assert_close(layer.merged(), expected, atol=1e-5, rtol=1e-5)


def test_relative_error_by_hand() -> None:
    dense = torch.tensor([[[3.0, 0.0], [4.0, 1.0]]])
    sparse = torch.tensor([[[3.0, 0.0], [2.0, 0.0]]])
    assert relative_error(dense, sparse) == pytest.approx((4 / 25 + 1) / 2)


def shares(store: Store, model: Artifact) -> dict[str, float]:
    """Share removed of each weight."""
    with ArtifactReader(store, model) as reader:
        shapes = {name: reader.manifest.tensors[name].shape for name in reader.manifest.masks}
        masks = reader.masks(shapes)  # type: ignore[arg-type]
    return {name: 1 - float(mask.float().mean()) for name, mask in masks.items()}


@pytest.mark.parametrize("family", ["llama", "opt"])
@pytest.mark.parametrize("criterion", ["wanda", "sparsegpt"])
def test_losa_prunes_trains_and_keeps_every_zero(
    family: str,
    criterion: str,
    store: Store,
    import_model: Callable[..., Artifact],
    make_tokens: Callable[..., Artifact],
    run_stage: Callable[..., Artifact],
    read_tensors: Callable[..., dict[str, Tensor]],
    read_metrics: Callable[[Artifact], dict[str, Any]],
) -> None:
    model = import_model(family)
    data = make_tokens(model, samples=8)
    inputs = {"model": model, "calibration": data, "data": data}
    adapted = run_stage("adapt/losa", inputs, **{**LOSA, "steps": 24}, criterion=criterion)
    removed = shares(store, adapted)
    assert sum(removed.values()) / len(removed) == pytest.approx(0.5, abs=0.02)
    tensors = read_tensors(adapted)
    for name in removed:
        assert float((tensors[name] == 0).float().mean()) >= removed[name] - 1e-6
    action = next(iter(store.actions("adapt/losa")))
    assert action.provenance["share_of_block"].keys() == {"0", "1", "2"}
    assert list(action.provenance["ranks"]) == ["round 1", "round 2", "round 3"]
    assert [sum(ranks) for ranks in action.provenance["ranks"].values()] == [6, 12, 18]
    assert len(action.provenance["training"]["losses"]) == 24
    pruned = run_stage(f"prune/{criterion}", {"model": model, "calibration": data}, sparsity=0.5, dtype="float32")
    before, after = (
        read_metrics(run_stage("evaluate/perplexity", {"model": one, "data": data}))["perplexity"]
        for one in (pruned, adapted)
    )
    assert after < before


def test_without_all_three_it_is_sparse_lora(
    import_model: Callable[..., Artifact],
    make_tokens: Callable[..., Artifact],
    run_stage: Callable[..., Artifact],
    read_tensors: Callable[..., dict[str, Tensor]],
) -> None:
    model = import_model("llama")
    data = make_tokens(model, samples=8)
    none = {"layer_rates": False, "rank_allocation": False, "gradual": False}
    losa = run_stage("adapt/losa", {"model": model, "calibration": data, "data": data}, **LOSA, **none)
    pruned = run_stage("prune/wanda", {"model": model, "calibration": data}, sparsity=0.5, dtype="float32")
    training = {key: LOSA[key] for key in LOSA.keys() - {"sparsity", "rounds", "max_rank"}}
    plain = run_stage("adapt/sparse-lora", {"model": pruned, "data": data}, **training)
    assert losa == plain
    assert read_tensors(losa).keys() == read_tensors(plain).keys()


@pytest.mark.parametrize("off", ["layer_rates", "rank_allocation", "gradual"])
def test_each_part_can_be_switched_off(
    off: str,
    store: Store,
    import_model: Callable[..., Artifact],
    make_tokens: Callable[..., Artifact],
    run_stage: Callable[..., Artifact],
) -> None:
    model = import_model("llama", num_hidden_layers=4)
    data = make_tokens(model, samples=8)
    adapted = run_stage("adapt/losa", {"model": model, "calibration": data, "data": data}, **LOSA, **{off: False})
    removed = shares(store, adapted)
    note = next(iter(store.actions("adapt/losa"))).provenance
    assert (max(removed.values()) - min(removed.values()) < 1e-6) == (off == "layer_rates")
    assert len(note["ranks"]) == (1 if off == "gradual" else 3)
    if off == "rank_allocation":
        assert all(set(ranks) == {4} for ranks in note["ranks"].values())


@pytest.mark.parametrize("pattern", ["2:4", "2:8"])
def test_a_pattern_is_reached_in_the_last_round(
    pattern: str,
    store: Store,
    import_model: Callable[..., Artifact],
    make_tokens: Callable[..., Artifact],
    run_stage: Callable[..., Artifact],
    read_tensors: Callable[..., dict[str, Tensor]],
) -> None:
    model = import_model("llama")
    data = make_tokens(model, samples=8)
    settings = {key: value for key, value in LOSA.items() if key != "sparsity"}
    inputs = {"model": model, "calibration": data, "data": data}
    adapted = run_stage("adapt/losa", inputs, **settings, pattern=pattern, layer_rates=False)
    kept, group = map(int, pattern.split(":"))
    tensors = read_tensors(adapted)
    for name in shares(store, adapted):
        assert int((tensors[name].reshape(-1, group) != 0).sum(1).max()) <= kept


@pytest.mark.parametrize("saves", [True, False], ids=["always saved", "never saved"])
@pytest.mark.parametrize("asked", [False, True], ids=["killed", "asked to stop"])
@pytest.mark.parametrize("dies_at", [4, 14, 24, 33])
def test_losa_goes_on_where_it_ended(
    dies_at: int,
    asked: bool,
    saves: bool,
    store: Store,
    import_model: Callable[..., Artifact],
    make_tokens: Callable[..., Artifact],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(SavingPace, "due", lambda self: saves)
    model = import_model("llama")
    data = make_tokens(model, samples=8)
    said: list[str] = []

    class Killed(Exception):
        """Stands for the end of the process."""

    def attempt(dies: bool) -> Action:
        said.clear()

        def progress(what: str, done: int, total: int) -> None:
            said.append(f"{what} {done}")
            if dies and not asked and len(said) == dies_at:
                raise Killed

        run = Run(store, progress=progress, stop_asked=lambda: dies and asked and len(said) >= dies_at)
        entry = stage_named("adapt/losa")
        return compute(run, entry, entry.parameters(**LOSA), {"model": model, "calibration": data, "data": data})

    store.pin(model)
    store.pin(data)
    with pytest.raises(Preempted if asked else Killed):
        attempt(dies=True)
    for garbage in find_garbage(store, grace=0.0):  # what an unfinished run needs isn't garbage, however old
        store.files.delete(garbage.path)
    resumed = attempt(dies=False)
    assert verify(store) == []
    assert list(store.files.list("journals")) == []
    again = len(said)
    for action in list(store.actions()):
        if action.stage.startswith(("adapt/", "prune/", "statistics/")):
            store.files.delete(f"actions/{action.stage}/{action.key}")
    undisturbed = attempt(dies=False)
    assert "resumed" not in undisturbed.provenance
    assert resumed.artifact == undisturbed.artifact
    assert resumed.provenance["training"]["losses"] == undisturbed.provenance["training"]["losses"]
    assert resumed.provenance["ranks"] == undisturbed.provenance["ranks"]
    assert again <= len(said)


def test_bad_input_is_told_in_a_sentence(
    import_model: Callable[..., Artifact],
    make_tokens: Callable[..., Artifact],
    run_stage: Callable[..., Artifact],
    store: Store,
) -> None:
    with pytest.raises(ValidationError, match="say how much to prune"):
        LosaParameters()
    with pytest.raises(ValidationError, match="max_rank 8 leaves no room above rank 8; write 16"):
        LosaParameters(sparsity=0.5, max_rank=8)
    assert LosaParameters(sparsity=0.5, max_rank=8, gradual=False).count == 1
    with pytest.raises(ValidationError, match="max_rank 4 leaves no room above rank 8"):
        LosaParameters(sparsity=0.5, max_rank=4, gradual=False)
    model = import_model("llama")
    data = make_tokens(model)
    inputs = {"model": model, "calibration": data, "data": data}
    with pytest.raises(StageError, match="rank 512 is more than"):
        run_stage("adapt/losa", inputs, sparsity=0.5, max_rank=512)
    with pytest.raises(StageError, match="2 training steps are too few for 5 rounds"):
        run_stage("adapt/losa", inputs, sparsity=0.5, steps=2, rank=4, max_rank=8)
    facts = facts_of(store, model)
    assert any("too few for 5 rounds" in line for line in check_losa(LosaParameters(sparsity=0.5, steps=4), facts))
    assert not list(check_losa(LosaParameters(sparsity=0.5, steps=5, rank=4, max_rank=8), facts))


@pytest.mark.parametrize("criterion", ["pruner-zero", "alps", "gblm", "magnitude"])
def test_rounds_prune_by_any_criterion(
    criterion: str,
    import_model: Callable[..., Artifact],
    make_tokens: Callable[..., Artifact],
    run_stage: Callable[..., Artifact],
    store: Store,
) -> None:
    model = import_model("llama")
    data = make_tokens(model)
    inputs = {"model": model, "calibration": data, "data": data}
    result = run_stage("adapt/losa", inputs, **LOSA, criterion=criterion, rank_truncation=True)
    assert sum(action.stage == f"prune/{criterion}" for action in store.actions("prune")) == LOSA["rounds"]
    (action,) = store.actions("adapt")
    assert max(rank for ranks in action.provenance["ranks"].values() for rank in ranks) <= LOSA["rank"]
    with ArtifactReader(store, result) as reader:
        masks = reader.masks({name: reader.manifest.tensors[name].shape for name in reader.manifest.masks})
        weights = reader.tensors(masks)
    kept = sum(int(mask.sum()) for mask in masks.values()) / sum(mask.numel() for mask in masks.values())
    assert 0.4 < kept <= 0.51
    assert all(bool((weights[name][~mask] == 0).all()) for name, mask in masks.items())
