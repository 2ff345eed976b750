"""Distillation: the losses against plain torch, and students that come closer to their teachers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from coldpress.storage.artifacts import Artifact
from coldpress.storage.store import Action, Store
from coldpress.tasks.adaptation.distill_stage import HiddenParameters, objective, origins
from coldpress.tasks.adaptation.distillation import cosine_distance, forward_kl, reverse_kl, squared_distance
from coldpress.tasks.adaptation.layers import MaskedWeight
from coldpress.tasks.adaptation.network import Network
from coldpress.tasks.blocks import StoredModel
from coldpress.tasks.catalogue import stage_named
from coldpress.tasks.resuming import SavingPace
from coldpress.tasks.stage import Preempted, Run, StageError, compute
from pydantic import ValidationError
from torch import Tensor

TRAINING = {"steps": 6, "batch_size": 4, "micro_batch_size": 2, "learning_rate": 3e-3, "dtype": "float32"}
METHODS = ["distill/kl", "distill/reverse-kl", "distill/hidden"]


def some_logits(seed: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    student, teacher = (3 * torch.randn(7, 11, generator=draw) for _ in range(2))
    return student.requires_grad_(), teacher


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_divergences_are_those_of_the_definition(temperature: float) -> None:
    student, teacher = some_logits(0)
    p, q = (torch.softmax(logits.detach() / temperature, -1) for logits in (teacher, student))
    expected = temperature**2 * (p * (p / q).log()).sum()
    torch.testing.assert_close(forward_kl(student, teacher, temperature).detach(), expected)
    expected = temperature**2 * (q * (q / p).log()).sum()
    torch.testing.assert_close(reverse_kl(student, teacher, temperature).detach(), expected)


@pytest.mark.parametrize("divergence", [forward_kl, reverse_kl])
def test_divergences_are_sums_over_tokens_in_float32(divergence: Callable[..., Tensor]) -> None:
    student, teacher = some_logits(1)
    whole = divergence(student, teacher, 2.0)
    pieces = [divergence(mine, theirs, 2.0) for mine, theirs in zip(student.split(3), teacher.split(3), strict=True)]
    torch.testing.assert_close(whole, sum(pieces))
    assert divergence(student.bfloat16(), teacher.bfloat16(), 2.0).dtype == torch.float32


@pytest.mark.parametrize("loss", [forward_kl, reverse_kl, lambda a, b, t: squared_distance(a, b)])
def test_losses_are_zero_with_no_gradient_where_both_agree(loss: Callable[..., Tensor]) -> None:
    student, _ = some_logits(2)
    value = loss(student, student.detach().clone(), 2.0)
    value.backward()
    assert student.grad is not None
    assert float(value.detach()) == pytest.approx(0, abs=1e-5)
    assert float(student.grad.abs().max()) < 1e-6


def test_the_gradient_at_a_high_temperature_is_that_of_the_logits_distance() -> None:
    """Hinton et al. 2015, eq. 4: (z - t) / N, both centred, whatever the temperature."""
    student, teacher = some_logits(3)
    forward_kl(student, teacher, 1000.0).backward()
    apart = student.detach() - teacher
    torch.testing.assert_close(student.grad, (apart - apart.mean(-1, keepdim=True)) / 11, rtol=0.02, atol=0.01)


def test_each_direction_punishes_its_own_fault() -> None:
    two_peaks = torch.tensor([[4.0, 4.0, -4.0, -4.0]])
    one_peak, all_over = torch.tensor([[4.0, -4.0, -4.0, -4.0]]), torch.zeros(1, 4)
    assert forward_kl(one_peak, two_peaks, 1.0) > forward_kl(all_over, two_peaks, 1.0)
    assert reverse_kl(one_peak, two_peaks, 1.0) < reverse_kl(all_over, two_peaks, 1.0)


def test_distances_of_activations() -> None:
    student, teacher = torch.tensor([[1.0, 0.0], [3.0, 4.0]]), torch.tensor([[0.0, 1.0], [6.0, 8.0]])
    assert float(squared_distance(student, teacher)) == pytest.approx(1.0 + 12.5)
    assert float(cosine_distance(student, teacher)) == pytest.approx(1.0)


@pytest.fixture
def networks(store: Store) -> Callable[..., tuple[Network, Network]]:
    """`networks(student, teacher)`: the student with all weights learning, and the teacher, in float32."""

    def load(student: Artifact, teacher: Artifact) -> tuple[Network, Network]:
        run = Run(store)
        with StoredModel(run, student) as mine, StoredModel(run, teacher) as theirs:
            return (
                Network(run, mine, torch.float32, lambda name, layer, shape, mask: MaskedWeight(layer, mask)),
                Network(run, theirs, torch.float32, lambda name, layer, shape, mask: layer),
            )

    return load


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_the_loss_is_that_of_both_models_whole_logits(
    share: float,
    import_model: Callable[..., Artifact],
    run_stage: Callable[..., Artifact],
    make_tokens: Callable[..., Artifact],
    windows: Callable[[Artifact], Tensor],
    block_loop_logits: Callable[..., Tensor],
    networks: Callable[..., tuple[Network, Network]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("coldpress.tasks.adaptation.network.HEAD_CHUNK", 7)
    teacher = import_model("gemma2")  # its logits are capped
    student = run_stage("prune/magnitude", {"model": teacher}, sparsity=0.5)
    ids = windows(make_tokens(teacher))
    counted = torch.rand(len(ids), ids.shape[1] - 1, generator=torch.Generator().manual_seed(0)) < 0.7
    z, t = (block_loop_logits(model, ids)[:, :-1][counted] for model in (student, teacher))
    expected = (1 - share) * torch.nn.functional.cross_entropy(z, ids[:, 1:][counted], reduction="sum")
    expected = expected + share * forward_kl(z, t, 2.0)
    parameters = stage_named("distill/kl").parameters(teacher_weight=share, temperature=2.0)
    found = objective(parameters, *networks(student, teacher), forward_kl)(ids, counted)
    torch.testing.assert_close(found.detach(), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("distance", [squared_distance, cosine_distance])
def test_hidden_states_are_compared_after_the_blocks_they_belong_to(
    distance: Callable[..., Tensor],
    import_model: Callable[..., Artifact],
    run_stage: Callable[..., Artifact],
    make_tokens: Callable[..., Artifact],
    windows: Callable[[Artifact], Tensor],
    whole_model: Callable[..., Any],
    networks: Callable[..., tuple[Network, Network]],
) -> None:
    teacher = import_model("llama")
    student = run_stage("layers/arrange", {"model": teacher}, remove=[1])
    ids = windows(make_tokens(teacher))
    counted = torch.ones(len(ids), ids.shape[1] - 1, dtype=torch.bool)
    kept: dict[int, Tensor] = {}
    reference = whole_model("llama")
    for number, block in enumerate(reference.model.layers):
        block.register_forward_hook(lambda module, inputs, output, number=number: kept.update({number: output}))
    reference(ids, use_cache=False)
    wanted = kept[2][:, :-1].flatten(0, 1)
    reference.model.layers = torch.nn.ModuleList([reference.model.layers[0], reference.model.layers[2]])
    reference.config.num_hidden_layers = 2
    reference(ids, use_cache=False)
    expected = distance(kept[2][:, :-1].flatten(0, 1), wanted)  # nothing after block 0: the two are the same there
    mine, theirs = networks(student, teacher)
    parameters = HiddenParameters(teacher_weight=0, hidden_weight=6.0, train="full")
    pairs = [(0, 0), (1, 2)]
    plain = objective(parameters, mine, theirs, forward_kl)(ids, counted)
    found = objective(parameters, mine, theirs, forward_kl, pairs, distance)(ids, counted)
    torch.testing.assert_close((found - plain).detach(), 3 * expected, rtol=1e-3, atol=1e-3)
    assert float(expected) > 1


def test_the_teacher_never_learns(
    import_model: Callable[..., Artifact],
    make_tokens: Callable[..., Artifact],
    windows: Callable[[Artifact], Tensor],
    networks: Callable[..., tuple[Network, Network]],
) -> None:
    model = import_model("llama")
    student, teacher = networks(model, model)
    ids = windows(make_tokens(model))
    counted = torch.ones(len(ids), ids.shape[1] - 1, dtype=torch.bool)
    parameters = HiddenParameters(teacher_weight=1.0, train="full")
    loss = objective(parameters, student, teacher, forward_kl, [(block, block) for block in range(3)], squared_distance)
    loss(ids, counted).backward()
    assert teacher.learned() == {}
    assert all(parameter.grad is None for parameter in teacher.model.parameters())
    assert all(float(weight.grad.abs().max()) < 1e-3 for weight in student.learned().values())  # both agree


@pytest.fixture
def divergence_of(
    store: Store, make_tokens: Callable[..., Artifact], windows: Callable[..., Tensor],
    block_loop_logits: Callable[..., Tensor],
) -> Callable[[Artifact, Artifact, Artifact], float]:  # fmt: skip
    """Mean KL in nats of a model from its teacher over windows."""

    def measure(model: Artifact, teacher: Artifact, data: Artifact) -> float:
        ids = windows(data)
        found = forward_kl(block_loop_logits(model, ids), block_loop_logits(teacher, ids), 1.0)
        return float(found) / ids.numel()

    return measure


@pytest.mark.parametrize("train", [{"train": "lora", "rank": 8}, {"train": "full"}], ids=["lora", "full"])
@pytest.mark.parametrize("method", METHODS)
def test_a_student_without_a_block_comes_closer_to_its_teacher(
    method: str,
    train: dict[str, Any],
    import_model: Callable[..., Artifact],
    run_stage: Callable[..., Artifact],
    make_tokens: Callable[..., Artifact],
    divergence_of: Callable[..., float],
    store: Store,
) -> None:
    teacher = import_model("llama")
    student = run_stage("prune/shortened-magnitude", {"model": teacher}, blocks=1, plus=False)
    data = make_tokens(teacher, samples=8)
    inputs = {"model": student, "teacher": teacher, "data": data}
    settings = {**TRAINING, "steps": 40, "teacher_weight": 1.0, **train}
    taught = run_stage(method, inputs, **settings)
    assert divergence_of(taught, teacher, data) < 0.8 * divergence_of(student, teacher, data)
    (action,) = store.actions(method)
    losses = action.provenance["training"]["losses"]
    assert losses[-1] < losses[0]
    if method == "distill/hidden":
        (removed,) = next(iter(store.actions("prune/shortened-magnitude"))).provenance["removed"]
        assert action.provenance["blocks"] == [block for block in range(3) if block != removed]


def test_hidden_states_alone_bring_the_blocks_outputs_closer(
    import_model: Callable[..., Artifact],
    run_stage: Callable[..., Artifact],
    make_tokens: Callable[..., Artifact],
    windows: Callable[[Artifact], Tensor],
    networks: Callable[..., tuple[Network, Network]],
) -> None:
    teacher = import_model("llama")
    student = run_stage("layers/arrange", {"model": teacher}, remove=[1])
    data = make_tokens(teacher, samples=8)
    settings = {**TRAINING, "steps": 30, "train": "full", "teacher_weight": 0, "hidden_weight": 1000.0}
    taught = run_stage("distill/hidden", {"model": student, "teacher": teacher, "data": data}, **settings)
    ids = windows(data)
    counted = torch.ones(len(ids), ids.shape[1] - 1, dtype=torch.bool)

    def apart(model: Artifact) -> float:
        parts = networks(model, teacher)
        parameters = HiddenParameters(teacher_weight=1.0, hidden_weight=1.0)
        both = [
            objective(parameters, *parts, forward_kl, pairs, squared_distance)(ids, counted) for pairs in ([(1, 2)], [])
        ]
        return float((both[0] - both[1]).detach())

    assert apart(taught) < 0.5 * apart(student)


@pytest.mark.parametrize("train", [{"train": "lora", "rank": 4}, {"train": "full"}], ids=["lora", "full"])
def test_masks_are_kept(
    train: dict[str, Any],
    import_model: Callable[..., Artifact],
    run_stage: Callable[..., Artifact],
    make_tokens: Callable[..., Artifact],
    read_tensors: Callable[..., dict[str, Tensor]],
    divergence_of: Callable[..., float],
    store: Store,
) -> None:
    teacher = import_model("llama")
    student = run_stage("prune/magnitude", {"model": teacher}, sparsity=0.5)
    data = make_tokens(teacher, samples=8)
    inputs = {"model": student, "teacher": teacher, "data": data}
    taught = run_stage("distill/kl", inputs, **{**TRAINING, "steps": 30}, **train, teacher_weight=1)
    before, after = read_tensors(student), read_tensors(taught)
    assert store.manifest(taught).masks == store.manifest(student).masks
    for name in store.manifest(student).masks:
        assert bool((after[name][before[name] == 0] == 0).all())
        assert not torch.equal(after[name], before[name])
    assert divergence_of(taught, teacher, data) < divergence_of(student, teacher, data)


def test_only_asked_modules_learn(
    import_model: Callable[..., Artifact],
    run_stage: Callable[..., Artifact],
    make_tokens: Callable[..., Artifact],
    read_tensors: Callable[..., dict[str, Tensor]],
) -> None:
    teacher = import_model("llama")
    student = run_stage("layers/arrange", {"model": teacher}, remove=[1])
    inputs = {"model": student, "teacher": teacher, "data": make_tokens(teacher)}
    before = read_tensors(student)
    after = read_tensors(run_stage("distill/kl", inputs, **TRAINING, rank=4, modules=["q_proj"]))
    changed = {name.split(".")[-2] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"q_proj"}


def test_packed_teachers_and_adapters_teach_what_their_weights_are(
    import_model: Callable[..., Artifact],
    run_stage: Callable[..., Artifact],
    make_tokens: Callable[..., Artifact],
    windows: Callable[[Artifact], Tensor],
    block_loop_logits: Callable[..., Tensor],
    networks: Callable[..., tuple[Network, Network]],
) -> None:
    model = import_model("llama")
    data = make_tokens(model)
    ids = windows(data)
    packed = run_stage("quantize/rtn", {"model": model}, bits=4, group_size=32)
    beside_dense = run_stage("adapt/lora", {"model": model, "data": data}, **TRAINING, rank=4)
    beside_packed = run_stage("adapt/lora", {"model": packed, "data": data}, **TRAINING, rank=4)
    for teacher in (packed, beside_dense, beside_packed):
        _, network = networks(model, teacher)
        torch.testing.assert_close(
            network.logits(network.features(ids)), block_loop_logits(teacher, ids), rtol=1e-3, atol=1e-3
        )
        run_stage("distill/kl", {"model": model, "teacher": teacher, "data": data}, **TRAINING, rank=4)


@pytest.mark.parametrize("family", ["opt", "gpt_neox", "gemma3_text"])
def test_other_families_are_taught_too(
    family: str,
    import_model: Callable[..., Artifact],
    run_stage: Callable[..., Artifact],
    make_tokens: Callable[..., Artifact],
    divergence_of: Callable[..., float],
) -> None:
    teacher = import_model(family)
    student = run_stage("layers/arrange", {"model": teacher}, remove=[1])
    data = make_tokens(teacher, samples=8)
    inputs = {"model": student, "teacher": teacher, "data": data}
    settings = {**TRAINING, "steps": 30, "teacher_weight": 1, "gradient_checkpointing": True}
    taught = run_stage("distill/hidden", inputs, **settings, rank=8)
    assert divergence_of(taught, teacher, data) < 0.9 * divergence_of(student, teacher, data)


def test_blocks_are_known_by_what_they_share(
    import_model: Callable[..., Artifact],
    run_stage: Callable[..., Artifact],
    make_tokens: Callable[..., Artifact],
    store: Store,
) -> None:
    teacher = import_model("llama")
    arranged = run_stage("layers/arrange", {"model": teacher}, order=[2, 0, 0])
    trained = run_stage("adapt/full", {"model": arranged, "data": make_tokens(teacher)}, **TRAINING)
    packed = run_stage("quantize/rtn", {"model": arranged}, bits=4, group_size=32)
    run = Run(store)
    with StoredModel(run, teacher) as dense:
        for student in (arranged, trained, packed):
            with StoredModel(run, student) as stored:
                assert origins(stored, dense) == [2, 0, 0]
        with (
            StoredModel(run, import_model("llama", tie_word_embeddings=True, hidden_size=32)) as other,
            pytest.raises(StageError, match=r"block 0 of the student shares no tensor with the teacher.*as blocks:"),
        ):
            origins(other, dense)
        with (
            StoredModel(run, arranged) as stored,
            pytest.raises(StageError, match="block 0 of the student shares as much with the teacher's blocks 1 and 2"),
        ):
            origins(dense, stored)


class Killed(Exception):
    """Stands for the end of the process."""


STAGES: Mapping[str, dict[str, Any]] = {
    "distill/kl": {"rank": 4, "dropout": 0.1},
    "distill/reverse-kl": {"train": "full"},
    "distill/hidden": {"rank": 4, "dropout": 0.1},
}


@pytest.mark.parametrize("saves", [True, False], ids=["always saved", "never saved"])
@pytest.mark.parametrize("asked", [False, True], ids=["killed", "asked to stop"])
@pytest.mark.parametrize("name", STAGES)
def test_a_killed_distillation_ends_as_an_undisturbed_one(
    name: str,
    asked: bool,
    saves: bool,
    store: Store,
    import_model: Callable[..., Artifact],
    run_stage: Callable[..., Artifact],
    make_tokens: Callable[..., Artifact],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(SavingPace, "due", lambda self: saves)
    teacher = import_model("llama")
    student = run_stage("layers/arrange", {"model": teacher}, remove=[1])
    inputs = {"model": student, "teacher": teacher, "data": make_tokens(teacher, samples=10)}
    seen: list[int] = []

    def attempt(dies: bool) -> Action:
        seen.clear()

        def progress(what: str, done: int, total: int) -> None:
            if what.startswith("distilling"):
                seen.append(done)
                if dies and not asked and done == 4:
                    raise Killed

        entry = stage_named(name)
        run = Run(store, progress=progress, stop_asked=lambda: dies and asked and 4 in seen)
        return compute(run, entry, entry.parameters(**TRAINING, **STAGES[name]), inputs)

    with pytest.raises(Preempted if asked else Killed):
        attempt(dies=True)
    resumed = attempt(dies=False)
    kept = 4 if asked else 3 if saves else 0
    assert seen == list(range(kept + 1, 7))
    store.files.delete(f"actions/{name}/{resumed.key}")
    undisturbed = attempt(dies=False)
    assert seen == list(range(1, 7))
    assert resumed.artifact == undisturbed.artifact
    assert resumed.provenance["training"] == undisturbed.provenance["training"]


def test_bad_input_is_told_in_a_sentence(
    import_model: Callable[..., Artifact],
    run_stage: Callable[..., Artifact],
    make_tokens: Callable[..., Artifact],
) -> None:
    teacher = import_model("llama")
    data = make_tokens(teacher)
    student = run_stage("layers/arrange", {"model": teacher}, remove=[1])
    inputs = {"model": student, "teacher": teacher, "data": data}
    larger, wider = import_model("llama", vocab_size=160), import_model("llama", hidden_size=32, head_dim=8)
    with pytest.raises(StageError, match="student's vocabulary has 128 tokens and the teacher's 160"):
        run_stage("distill/kl", {**inputs, "teacher": larger}, rank=4)
    with pytest.raises(StageError, match=r"put out 64 features and the teacher's 32.*use method kl"):
        run_stage("distill/hidden", {**inputs, "teacher": wider}, rank=4)
    with pytest.raises(StageError, match="names 3 of the teacher's blocks, but the student has 2"):
        run_stage("distill/hidden", inputs, rank=4, blocks="0-2")
    with pytest.raises(StageError, match="no block 3; it has blocks 0 to 2"):
        run_stage("distill/hidden", inputs, rank=4, blocks=[0, 3])
    with pytest.raises(StageError, match="rank 100 is more than"):
        run_stage("distill/kl", inputs, rank=100)
    packed = run_stage("quantize/nf4", {"model": student})
    with pytest.raises(StageError, match=r"can't read a checkpoint in the format 'bitsandbytes'; .* or quantize last"):
        run_stage("distill/kl", {**inputs, "model": packed}, rank=4)
    adapter = run_stage("adapt/lora", {"model": student, "data": data}, **TRAINING, rank=4)
    with pytest.raises(StageError, match="can't take an adapter as 'model'"):
        run_stage("distill/kl", {**inputs, "model": adapter}, rank=4)
    with pytest.raises(ValidationError, match="'rank' is of 'train: lora'"):
        stage_named("distill/kl").parameters(train="full", rank=4)
    with pytest.raises(ValidationError, match="order has 'x'"):
        stage_named("distill/hidden").parameters(blocks="x")


@pytest.mark.parametrize("settings", [{"train": "full"}, {"rank": 4}, {"train": "full", "blocks": [0, 2]}])
def test_settings_can_be_written_out_with_their_defaults(settings: dict[str, Any]) -> None:
    parameters = HiddenParameters.model_validate(settings)
    assert HiddenParameters.model_validate(parameters.model_dump(mode="json")) == parameters
