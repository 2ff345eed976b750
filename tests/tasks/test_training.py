"""Training stages: what they learn, that they keep masks, and that a killed one ends as an undisturbed one."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from coldpress.storage.artifacts import Artifact, ArtifactReader
from coldpress.storage.inspect import verify
from coldpress.storage.journal import Journal, State
from coldpress.storage.store import Action, Store
from coldpress.tasks.adaptation import training
from coldpress.tasks.adaptation.layers import Frozen, Lora, MaskedLora
from coldpress.tasks.adaptation.lora_stage import TrainingParameters
from coldpress.tasks.adaptation.training import Examples, batch_of, learning_rate, train
from coldpress.tasks.catalogue import stage_named
from coldpress.tasks.resuming import SavingPace
from coldpress.tasks.stage import Preempted, Run, StageError, compute
from torch import Tensor
from torch.nn.functional import linear

TRAINING = {"steps": 6, "batch_size": 4, "micro_batch_size": 2, "learning_rate": 1e-2, "dtype": "float32"}


@pytest.fixture
def pruned(import_model: Callable[..., Artifact], run_stage: Callable[..., Artifact]) -> Artifact:
    return run_stage("prune/magnitude", {"model": import_model("llama")}, sparsity=0.5)


@pytest.fixture
def masks_of(store: Store) -> Callable[[Artifact], Mapping[str, Tensor]]:
    def read(model: Artifact) -> Mapping[str, Tensor]:
        with ArtifactReader(store, model) as reader:
            names = list(reader.manifest.masks)
            return reader.masks({name: reader.manifest.tensors[name].shape for name in names})  # type: ignore[misc]

    return read


def test_every_epoch_is_a_permutation_and_batches_go_on_across_epochs() -> None:
    drawn = torch.cat([batch_of(step, 10, 4, seed=3) for step in range(5)])
    assert sorted(drawn[:10].tolist()) == sorted(drawn[10:].tolist()) == list(range(10))
    assert drawn[:10].tolist() != drawn[10:].tolist()
    assert batch_of(2, 10, 4, seed=3).tolist() == drawn[8:12].tolist()
    assert batch_of(0, 10, 4, seed=4).tolist() != drawn[:4].tolist()


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("linear", [0.5, 1.0, 1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125]),
        ("constant", [0.5] + [1.0] * 9),
    ],
)
def test_schedules(schedule: Any, expected: list[float]) -> None:
    parameters = TrainingParameters(schedule=schedule, warmup=0.2, learning_rate=1.0)
    assert [learning_rate(step, 10, parameters) for step in range(10)] == pytest.approx(expected)


def test_the_cosine_is_half_way_in_the_middle_and_ends_near_zero() -> None:
    parameters = TrainingParameters(schedule="cosine", warmup=0, learning_rate=2.0)
    assert learning_rate(0, 100, parameters) == 2.0
    assert learning_rate(50, 100, parameters) == pytest.approx(1.0)
    assert 0 < learning_rate(99, 100, parameters) < 0.001


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_masked_lora_is_the_layer_of_the_merged_weight_with_its_gradients(dropout: float) -> None:
    torch.manual_seed(0)
    weight, mask, inputs = torch.randn(6, 8), torch.rand(6, 8) < 0.5, torch.randn(2, 5, 8, requires_grad=True)
    weight *= mask
    bias = torch.randn(6)
    layer = MaskedLora(Frozen(lambda: weight, bias), mask, (6, 8), rank=3, scale=2.0, dropout=dropout)
    with torch.no_grad():
        layer.b.normal_()
    a, b = layer.a.detach().clone().requires_grad_(), layer.b.detach().clone().requires_grad_()
    other = inputs.detach().clone().requires_grad_()

    torch.manual_seed(1)
    found = layer(inputs)
    torch.manual_seed(1)
    seen = torch.nn.functional.dropout(other, dropout) if dropout else other
    expected = linear(other, weight, bias) + linear(seen, (b @ a) * mask * 2.0)
    torch.testing.assert_close(found, expected)
    upstream = torch.randn_like(found)
    found.backward(upstream)
    expected.backward(upstream)
    for mine, theirs in ((layer.a, a), (layer.b, b), (inputs, other)):
        torch.testing.assert_close(mine.grad, theirs.grad)
    assert bool((layer.merged()[~mask] == 0).all())
    torch.testing.assert_close(layer.merged(), weight + (b @ a * mask * 2.0).detach())


def test_lora_begins_as_the_layer_and_adds_its_scaled_term() -> None:
    torch.manual_seed(0)
    weight, inputs = torch.randn(6, 8), torch.randn(3, 8)
    layer = Lora(Frozen(lambda: weight, None), (6, 8), rank=2, scale=4.0, dropout=0.0)
    torch.testing.assert_close(layer(inputs), inputs @ weight.T)
    with torch.no_grad():
        layer.b.normal_()
    a, b = layer.factors()
    torch.testing.assert_close(layer(inputs), inputs @ (weight + b @ a).T)


@pytest.mark.parametrize("name", ["adapt/lora", "adapt/sparse-lora", "adapt/full"])
@pytest.mark.parametrize("family", ["llama", "opt", "gpt_neox"])
def test_training_lowers_the_loss_on_what_it_has_seen(
    name: str,
    family: str,
    store: Store,
    import_model: Callable[..., Artifact],
    run_stage: Callable[..., Artifact],
    make_tokens: Callable[..., Artifact],
    read_metrics: Callable[[Artifact], dict[str, Any]],
) -> None:
    model = run_stage("prune/magnitude", {"model": import_model(family)}, sparsity=0.5)
    data = make_tokens(model, samples=8)
    before = read_metrics(run_stage("evaluate/perplexity", {"model": model, "data": data}))["perplexity"]
    rank = {} if name == "adapt/full" else {"rank": 4}
    adapted = run_stage(name, {"model": model, "data": data}, **{**TRAINING, "steps": 20, **rank})
    after = read_metrics(run_stage("evaluate/perplexity", {"model": adapted, "data": data}))["perplexity"]
    assert after < 0.95 * before


@pytest.mark.parametrize("name", ["adapt/sparse-lora", "adapt/full"])
def test_what_was_pruned_stays_exactly_zero(
    name: str,
    pruned: Artifact,
    run_stage: Callable[..., Artifact],
    make_tokens: Callable[..., Artifact],
    read_tensors: Callable[..., dict[str, Tensor]],
    masks_of: Callable[[Artifact], Mapping[str, Tensor]],
) -> None:
    adapted = run_stage(name, {"model": pruned, "data": make_tokens(pruned)}, **TRAINING)
    before, after = read_tensors(pruned), read_tensors(adapted)
    masks = masks_of(adapted)
    assert masks
    assert masks.keys() == masks_of(pruned).keys()
    for weight, mask in masks.items():
        assert torch.equal(mask, masks_of(pruned)[weight])
        assert bool((after[weight][~mask] == 0).all())
        assert not torch.equal(after[weight], before[weight])
    for other in before.keys() - masks.keys():
        assert torch.equal(before[other], after[other])


def test_an_adapter_over_packed_weights_is_trained_through_them(
    import_model: Callable[..., Artifact],
    run_stage: Callable[..., Artifact],
    make_tokens: Callable[..., Artifact],
    read_metrics: Callable[[Artifact], dict[str, Any]],
) -> None:
    model = import_model("llama")
    data = make_tokens(model, samples=8)
    for packed in (
        run_stage("quantize/nf4", {"model": model}),
        run_stage("quantize/rtn", {"model": model}, bits=4, group_size=32),
        run_stage("quantize/int8", {"model": model}),
    ):
        before = read_metrics(run_stage("evaluate/perplexity", {"model": packed, "data": data}))["perplexity"]
        adapter = run_stage("adapt/lora", {"model": packed, "data": data}, **{**TRAINING, "steps": 20}, rank=4)
        after = read_metrics(run_stage("evaluate/perplexity", {"model": adapter, "data": data}))["perplexity"]
        assert after < 0.95 * before


def test_merging_adds_the_term_to_the_weight(
    import_model: Callable[..., Artifact],
    run_stage: Callable[..., Artifact],
    make_tokens: Callable[..., Artifact],
    dense_weights: Callable[..., dict[str, Tensor]],
    store: Store,
) -> None:
    model = import_model("llama")
    adapter = run_stage("adapt/lora", {"model": model, "data": make_tokens(model)}, **TRAINING, rank=4)
    merged = run_stage("merge/lora", {"model": adapter})
    beside, inside = dense_weights(adapter), dense_weights(merged)
    dtype = getattr(torch, json.loads(store.read_file(model, "config.json"))["dtype"])
    for name, weight in beside.items():
        assert torch.equal(weight.to(dtype), inside[name].to(dtype))
    assert merged.kind == "checkpoint"
    assert store.manifest(merged).base is None


def test_only_asked_modules_learn_and_peft_is_told(
    import_model: Callable[..., Artifact],
    run_stage: Callable[..., Artifact],
    make_tokens: Callable[..., Artifact],
    store: Store,
) -> None:
    model = import_model("llama")
    inputs = {"model": model, "data": make_tokens(model)}
    adapter = run_stage("adapt/lora", inputs, **TRAINING, rank=4, modules=["q_proj", "down_proj"])
    names = store.manifest(adapter).tensors
    assert {name.split(".")[-3] for name in names} == {"q_proj", "down_proj"}
    config = json.loads(store.read_file(adapter, "adapter_config.json"))
    assert config["target_modules"] == ["mlp.down_proj", "self_attn.q_proj"]


@pytest.mark.parametrize("settings", [{"gradient_checkpointing": True}, {"micro_batch_size": 1}])
def test_how_a_step_is_computed_changes_only_rounding(
    settings: dict[str, Any],
    import_model: Callable[..., Artifact],
    run_stage: Callable[..., Artifact],
    make_tokens: Callable[..., Artifact],
    read_tensors: Callable[..., dict[str, Tensor]],
) -> None:
    model = import_model("llama")
    inputs = {"model": model, "data": make_tokens(model)}
    one = read_tensors(run_stage("adapt/lora", inputs, **{**TRAINING, "steps": 2}, rank=4))
    other = read_tensors(run_stage("adapt/lora", inputs, **{**TRAINING, "steps": 2, **settings}, rank=4))
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, rtol=1e-3, atol=1e-4)


class Killed(Exception):
    """Stands for the end of the process."""


STAGES = {
    "adapt/lora": {"rank": 4, "dropout": 0.1},
    "adapt/sparse-lora": {"rank": 4, "dropout": 0.1},
    "adapt/full": {},
}


@pytest.mark.parametrize("saves", [True, False], ids=["always saved", "never saved"])
@pytest.mark.parametrize("asked", [False, True], ids=["killed", "asked to stop"])
@pytest.mark.parametrize("after", [1, 4, 6])
@pytest.mark.parametrize("name", STAGES)
def test_training_goes_on_where_it_ended(
    name: str,
    after: int,
    asked: bool,
    saves: bool,
    store: Store,
    pruned: Artifact,
    make_tokens: Callable[..., Artifact],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(SavingPace, "due", lambda self: saves)
    data = make_tokens(pruned, samples=10)
    seen: list[int] = []

    def attempt(dies: bool) -> Action:
        seen.clear()

        def progress(what: str, done: int, total: int) -> None:
            if what.startswith("training"):
                seen.append(done)
                if dies and not asked and done == after:
                    raise Killed

        entry = stage_named(name)
        run = Run(store, progress=progress, stop_asked=lambda: dies and asked and bool(seen) and seen[-1] >= after)
        return compute(run, entry, entry.parameters(**TRAINING, **STAGES[name]), {"model": pruned, "data": data})

    with pytest.raises(Preempted if asked else Killed):
        attempt(dies=True)
    resumed = attempt(dies=False)
    # Killed in the report of a step: what that step made isn't saved yet.
    kept = after if asked else after - 1 if saves else 0
    assert seen == list(range(kept + 1, 7))
    if kept:
        assert (resumed.provenance["resumed"]["from_step"], resumed.provenance["resumed"]["of"]) == (kept, 6)
    assert list(store.files.list("journals")) == []
    assert verify(store) == []
    store.files.delete(f"actions/{name}/{resumed.key}")
    undisturbed = attempt(dies=False)
    assert "resumed" not in undisturbed.provenance
    assert resumed.artifact == undisturbed.artifact
    assert resumed.provenance["training"]["losses"] == undisturbed.provenance["training"]["losses"]


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
def test_training_with_states_in_8_bits_goes_on_where_it_ended(
    store: Store,
    import_model: Callable[..., Artifact],
    make_tokens: Callable[..., Artifact],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What bitsandbytes keeps is the same on a CPU, where it computes too, only unpaged."""
    make = training._optimizer
    made: list[torch.optim.Optimizer] = []

    def on_cuda(parameters: TrainingParameters, learned: list[torch.nn.Parameter], device: str) -> Any:
        made.append(make(parameters, learned, "cuda"))
        return made[-1]

    monkeypatch.setattr(training, "_optimizer", on_cuda)
    monkeypatch.setattr(SavingPace, "due", lambda self: True)
    model = import_model("llama")
    inputs = {"model": model, "data": make_tokens(model, samples=10)}
    entry = stage_named("adapt/full")
    values = entry.parameters(**TRAINING, optimizer="paged-adamw-8bit")

    def attempt(dies: bool) -> Action:
        def progress(what: str, done: int, total: int) -> None:
            if dies and what.startswith("training") and done == 4:
                raise Killed

        return compute(Run(store, progress=progress), entry, values, inputs)

    with pytest.raises(Killed):
        attempt(dies=True)
    resumed = attempt(dies=False)
    assert resumed.provenance["resumed"]["from_step"] == 3
    assert torch.uint8 in {
        t.dtype for state in made[-1].state.values() for t in state.values() if isinstance(t, Tensor)
    }
    store.files.delete(f"actions/adapt/full/{resumed.key}")
    undisturbed = attempt(dies=False)
    assert "resumed" not in undisturbed.provenance
    assert resumed.artifact == undisturbed.artifact
    assert resumed.provenance["training"]["losses"] == undisturbed.provenance["training"]["losses"]


def test_bad_input_is_told_in_a_sentence(
    import_model: Callable[..., Artifact],
    pruned: Artifact,
    run_stage: Callable[..., Artifact],
    make_tokens: Callable[..., Artifact],
) -> None:
    model = import_model("llama")
    data = make_tokens(model)
    inputs = {"model": model, "data": data}
    with pytest.raises(StageError, match="rank 4096 is more than"):
        run_stage("adapt/lora", inputs, rank=4096)
    with pytest.raises(StageError, match="have no layer 'c_attn'; there is"):
        run_stage("adapt/lora", inputs, modules=["c_attn"])
    with pytest.raises(StageError, match="no masks"):
        run_stage("adapt/sparse-lora", inputs)
    with pytest.raises(StageError, match="needs a CUDA device"):
        run_stage("adapt/lora", inputs, optimizer="paged-adamw-8bit", rank=4)
    with pytest.raises(StageError, match="needs an adapter as 'model'"):
        run_stage("merge/lora", {"model": model})
    adapter = run_stage("adapt/lora", {"model": pruned, "data": data}, **TRAINING, rank=4)
    with pytest.raises(StageError, match="dense again"):
        run_stage("merge/lora", {"model": adapter})
    packed = run_stage("quantize/nf4", {"model": model})
    adapter = run_stage("adapt/lora", {"model": packed, "data": data}, **TRAINING, rank=4)
    with pytest.raises(StageError, match=r"packed as bitsandbytes can't take up .* quantize last"):
        run_stage("merge/lora", {"model": adapter})


EXAMPLES = Examples(torch.zeros(4, 3, dtype=torch.long), torch.ones(4, 2, dtype=torch.bool))


@pytest.mark.parametrize(
    ("rate", "words"),
    [
        (1e3, "training diverges: the loss was 1.000 in step 1 and is .* in the 10 steps up to step 11;"),
        (1e30, "of step 2 is not"),
    ],
)
def test_training_that_goes_wrong_stops_with_the_step(rate: float, words: str, store: Store) -> None:
    parameters = TrainingParameters(steps=60, batch_size=2, learning_rate=rate, schedule="constant", warmup=0)
    weight = torch.nn.Parameter(torch.ones(1))
    journal = Journal(store, {"stage": "testing"}, {})
    with pytest.raises(StageError, match=words + ".*lower learning_rate"):
        train(
            Run(store, journal=journal),
            {"weight": weight},
            parameters,
            EXAMPLES,
            lambda windows, counted: weight.square().square().sum() * counted.sum(),
        )


def train_with_losses(store: Store, values: list[float], examples: Examples = EXAMPLES, **further: Any) -> list[float]:
    """The training loop, with the loss of each step given."""
    following = iter(values)
    weight = torch.nn.Parameter(torch.ones(1))

    def loss(windows: Tensor, counted: Tensor) -> Tensor:
        return (weight - weight.detach()).sum() + next(following) * counted.sum()

    parameters = TrainingParameters(steps=len(values), batch_size=2, schedule="constant")
    journal = Journal(store, {"stage": "testing", "for": uuid.uuid4().hex}, {})
    return train(Run(store, journal=journal), {"w": weight}, parameters, examples, loss, **further)


def test_training_that_gets_worse_again_stops(store: Store) -> None:
    values = [6.6] * 5 + [3.9] * 12 + [6.5] * 20  # never above 1.5 times the first
    words = "diverges: the loss was 3.900 in the 10 steps up to step 15 and is .* in the 10 steps up to step 27; lower"
    with pytest.raises(StageError, match=words):
        train_with_losses(store, values)


def test_training_of_a_few_steps_that_ends_worse_stops(store: Store) -> None:
    """But not for a jump on the way, nor for what may be chance: four tokens a step, or two thousand."""
    many = Examples(torch.zeros(4, 1025, dtype=torch.long), torch.ones(4, 1024, dtype=torch.bool))
    values = [3.0, 3.2, 6.0, 9.0]
    words = r"the loss was 3.000 in step 1 and is 7.500 in the 2 steps up to step 4; lower learning_rate"
    with pytest.raises(StageError, match=words):
        train_with_losses(store, values, many)
    assert train_with_losses(store, values) == pytest.approx(values)
    jumps = [3.0, 13.0, 3.4, 3.2]
    assert train_with_losses(store, jumps, many) == pytest.approx(jumps)
    with pytest.raises(StageError, match=r"the loss was 3.000 in step 1 and is 14.* up to step 5"):
        train_with_losses(store, [3.0, 3.2, 6.0, 11.0, 18.0])
    with pytest.raises(StageError, match=r"is 13.000 in step 2"):
        train_with_losses(store, [3.0, 13.0], many)


def test_a_loss_that_may_rise_may_not_rise_further(store: Store) -> None:
    values = [3.0] * 10 + [9.0] * 20
    with pytest.raises(StageError, match="training diverges"):
        train_with_losses(store, values)
    assert train_with_losses(store, values, may_rise_to=10.8) == pytest.approx(values)
    with pytest.raises(StageError, match="training diverges"):
        train_with_losses(store, [*values, *[12.0] * 10], may_rise_to=10.8)


@pytest.mark.parametrize("ruined", [0, 3, 6])
def test_what_is_kept_is_from_before_the_weights_were_ruined(
    ruined: int, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are still finite, and so is the optimizer's state: only the next loss tells."""
    monkeypatch.setattr(SavingPace, "due", lambda self: True)
    parameters = TrainingParameters(steps=8, batch_size=2, learning_rate=1e-3, schedule="constant", warmup=0)

    def attempt() -> State | None:
        weight = torch.nn.Parameter(torch.ones(1))
        journal = Journal(store, {"stage": "testing"}, {})
        with pytest.raises(
            StageError, match=rf"loss of step {ruined + 2} is not finite; lower learning_rate \(0.001\)"
        ):
            train(
                Run(store, journal=journal),
                {"w": weight},
                parameters,
                EXAMPLES,
                lambda windows, counted: weight.square().square().sum() * counted.sum(),
                after_update=lambda step, rate: weight.data.fill_(1e30) if step == ruined else None,
            )
        return Journal(store, {"stage": "testing"}, {}).state()

    state = attempt()
    if ruined == 0:
        assert state is None
        return
    assert state is not None
    kept = state.tensors["losses"].tolist()
    assert len(kept) == ruined
    assert sorted(kept, reverse=True) == kept
    assert float(state.tensors["learned.w"]) == pytest.approx(1, abs=0.01)
    again = attempt()  # goes on from there, to the same end
    assert again is not None
    assert again.tensors["losses"].tolist() == kept


@pytest.mark.parametrize("save_at_end", [True, False])
def test_what_the_last_step_ruined_is_neither_kept_nor_used(
    save_at_end: bool, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SavingPace, "due", lambda self: True)
    weight = torch.nn.Parameter(torch.ones(1))
    journal = Journal(store, {"stage": "testing"}, {})
    with pytest.raises(StageError, match="the weights after step 3 are not finite; lower learning_rate"):
        train(
            Run(store, journal=journal),
            {"w": weight},
            TrainingParameters(steps=3, batch_size=2),
            EXAMPLES,
            lambda windows, counted: weight.sum() * counted.sum(),
            after_update=lambda step, rate: weight.data.fill_(torch.nan) if step == 2 else None,
            save_at_end=save_at_end,
        )
    state = Journal(store, {"stage": "testing"}, {}).state()
    assert state is not None
    assert len(state.tensors["losses"]) == 2
    assert all(bool(tensor.isfinite().all()) for tensor in state.tensors.values())


@pytest.fixture
def fitted(
    whole_model: Callable[..., Any],
    import_model: Callable[..., Artifact],
    make_tokens: Callable[..., Artifact],
    windows: Callable[[Artifact], Tensor],
    run_stage: Callable[..., Artifact],
    tmp_path: Path,
) -> tuple[Artifact, Artifact]:
    """A tiny model that knows its data by heart, and these: one of random weights can't become much worse."""
    data = make_tokens(import_model("llama"), samples=8)
    model = whole_model("llama").requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        loss = model(windows(data), labels=windows(data)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 1
    model.save_pretrained(tmp_path)
    return run_stage("source/model", {}, source=str(tmp_path)), data


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("adapt/lora", {}),
        ("adapt/full", {}),
        ("adapt/adalora", {"t_init": 0.3}),
        ("adapt/sora", {}),
        ("adapt/losa", {"sparsity": 0.5, "rounds": 2}),
        ("adapt/loraprune", {"sparsity": 0.5}),
        ("distill/kl", {}),
        ("distill/reverse-kl", {}),
        ("distill/hidden", {}),
    ],
)
def test_every_training_notices_that_it_diverges(
    name: str,
    settings: dict[str, Any],
    store: Store,
    fitted: tuple[Artifact, Artifact],
) -> None:
    """In ten steps, or in rounds of five."""
    model, data = fitted
    entry = stage_named(name)
    given = {"model": model, "data": data, "calibration": data, "teacher": model}
    inputs = {key: value for key, value in given.items() if key in entry.inputs}
    training = {**TRAINING, "steps": 10, "learning_rate": 30.0, "schedule": "constant", "warmup": 0}
    with pytest.raises(StageError, match=r"training diverges: .*; lower learning_rate \(30\)"):
        compute(Run(store), entry, entry.parameters(**training, **settings), inputs)
