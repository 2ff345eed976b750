"""AdaLoRA and SoRA: their maths against PEFT and by hand, and what their stages leave of each weight's term."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from coldpress.storage.artifacts import Artifact, ArtifactReader
from coldpress.storage.inspect import verify
from coldpress.storage.store import Action, Store
from coldpress.tasks.adaptation import adalora
from coldpress.tasks.adaptation.diagonal import GatedLora, SingularLora, soft_threshold
from coldpress.tasks.adaptation.layers import Frozen
from coldpress.tasks.catalogue import stage_named
from coldpress.tasks.resuming import SavingPace
from coldpress.tasks.stage import Preempted, Run, StageError, compute
from elsewhere import PEFT, Loaded
from torch import Tensor, nn

TRAINING = {"steps": 10, "batch_size": 2, "micro_batch_size": 2, "learning_rate": 1e-2, "dtype": "float32"}
LAYERS = 3 * 7  # of the tiny Llama
STAGES: dict[str, dict[str, Any]] = {
    "adapt/adalora": {"rank": 3, "initial_rank": 5, "dropout": 0.1},
    "adapt/sora": {"rank": 5, "threshold": 0.05, "dropout": 0.1},
}


@pytest.fixture
def adapt(
    store: Store, import_model: Callable[..., Artifact], make_tokens: Callable[..., Artifact]
) -> Callable[..., Action]:
    """`adapt("adapt/sora", **parameters)`: what training the tiny Llama records."""

    def run(name: str, **parameters: Any) -> Action:
        model = import_model("llama")
        entry = stage_named(name)
        values = entry.parameters(**{**TRAINING, **parameters})
        return compute(Run(store), entry, values, {"model": model, "data": make_tokens(model)})

    return run


# The maths


def test_the_choice_of_triplets_is_pefts() -> None:
    from peft import AdaLoraConfig
    from peft.tuners.adalora.layer import RankAllocator

    steps, t_init, t_final, interval, rank, target = 14, 2, 4, 2, 6, 2
    draw = torch.Generator().manual_seed(0)
    model = nn.ModuleDict()
    for name, (rows, columns) in {"one": (5, 7), "three": (4, 9), "two": (8, 3)}.items():
        shapes = {"lora_A": (rank, columns), "lora_E": (rank, 1), "lora_B": (rows, rank)}
        model[name] = nn.ModuleDict(
            {part: nn.ParameterDict({"default": torch.zeros(shape)}) for part, shape in shapes.items()}
        )
    config = AdaLoraConfig(
        init_r=rank, target_r=target, tinit=t_init, tfinal=t_final, deltaT=interval, total_step=steps, beta2=0.7
    )
    theirs = RankAllocator(model, config, "default")

    def part(layer: nn.Module, name: str) -> nn.Parameter:
        return layer[name]["default"]  # type: ignore[index, no-any-return]

    terms = [
        tuple(nn.Parameter(torch.zeros_like(part(layer, name))) for name in ("lora_B", "lora_E", "lora_A"))
        for layer in model.values()
    ]
    terms = [(p, nn.Parameter(torch.zeros(rank)), q) for p, _, q in terms]
    ours = adalora.Importance(terms)
    budgets = []
    for done in range(1, steps - t_final + 1):
        for scale, layer, (p, singular, q) in zip((1.0, 1.1, 0.8), model.values(), terms, strict=True):
            for name, mine in (("lora_B", p), ("lora_E", singular), ("lora_A", q)):
                other = part(layer, name)
                other.data, other.grad = scale * torch.rand(2, *other.shape, generator=draw)
                mine.data, mine.grad = other.data.clone().view_as(mine), other.grad.clone().view_as(mine)
        if done < steps - t_final:
            ours.observe(config.beta1, config.beta2)
        budget, pattern = theirs.update_and_allocate(model, done, force_mask=done == steps - t_final)
        budgets.append(budget)
        assert adalora.budget_after(done, steps, 3 * rank, 3 * target, t_init, t_final) == budget
        if pattern is not None:
            kept = adalora.most_important(ours.scores(), budget)
            assert kept.tolist() == [pattern[f"{name}.lora_E.default"] for name in model]
            assert int(kept.sum()) == budget
    assert budgets[0] == 3 * rank
    assert budgets[-1] == 3 * target
    assert len(set(budgets)) > 4
    assert len(set(kept.sum(1).tolist())) > 1


def test_the_budget_falls_as_a_cubic_between_its_ends() -> None:
    budgets = [adalora.budget_after(done, 20, 100, 36, t_init=4, t_final=6) for done in range(1, 21)]
    assert budgets[:4] == [100] * 4
    assert budgets[8] == 36 + 8  # half-way, an eighth of 64 is left
    assert budgets[13:] == [36] * 7
    assert budgets == sorted(budgets, reverse=True)


def test_exactly_the_budget_is_kept_among_equal_scores_too() -> None:
    scores = torch.tensor([[1.0, 2.0, 1.0], [3.0, 1.0, 1.0]])
    assert adalora.most_important(scores, 3).tolist() == [[True, True, False], [True, False, False]]
    assert int(adalora.most_important(torch.zeros(4, 5), 7).sum()) == 7


def test_orthogonality_is_the_mean_distance_from_the_identity() -> None:
    vectors = torch.eye(4)[:, :2]
    assert adalora.orthogonality([(vectors, vectors.T)]) == 0
    # |4 I - I| = 3 sqrt(2) for P, 0 for Q
    assert adalora.orthogonality([(2 * vectors, vectors.T)]) == pytest.approx(3 * 2**0.5 / 2)


def test_soft_threshold_is_the_proximal_step_of_the_absolute_value() -> None:
    gates = torch.tensor([-1.0, -0.3, -0.2, 0.0, 0.1, 0.25, 2.0])
    found = soft_threshold(gates, 0.25)
    grid = torch.linspace(-3, 3, 60001, dtype=torch.float64)
    costs = (grid[:, None] - gates).square() / 2 + 0.25 * grid.abs()[:, None]
    torch.testing.assert_close(found, grid[costs.argmin(0)].float(), rtol=0, atol=1e-4)
    assert found[2:6].tolist() == [0.0] * 4


@pytest.mark.parametrize("kind", [SingularLora, GatedLora])
def test_what_is_published_is_what_the_layer_adds(kind: type[Any]) -> None:
    torch.manual_seed(0)
    weight, inputs = torch.randn(6, 8), torch.randn(3, 8)
    layer = kind(Frozen(lambda: weight, None), (6, 8), rank=4, scale=2.0, dropout=0.0)
    torch.testing.assert_close(layer(inputs), inputs @ weight.T)
    with torch.no_grad():
        layer.b.normal_()
        layer.diagonal.copy_(torch.tensor([0.5, 0.0, -2.0, 0.0]))
    a, b = layer.factors()
    assert (layer.rank(), a.shape, b.shape) == (2, (2, 8), (6, 2))
    torch.testing.assert_close(layer(inputs), inputs @ (weight + b @ a).T)
    layer.diagonal.data.zero_()
    a, b = layer.factors()
    assert (layer.rank(), len(a), int(b.count_nonzero())) == (0, 1, 0)


# The stages


@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_training_lowers_the_loss_on_what_it_has_seen(
    name: str,
    family: str,
    import_model: Callable[..., Artifact],
    run_stage: Callable[..., Artifact],
    make_tokens: Callable[..., Artifact],
    read_metrics: Callable[[Artifact], dict[str, Any]],
) -> None:
    model = import_model(family)
    data = make_tokens(model)
    before = read_metrics(run_stage("evaluate/perplexity", {"model": model, "data": data}))["perplexity"]
    settings = {**TRAINING, **STAGES[name], "steps": 25, "learning_rate": 3e-2}
    adapted = run_stage(name, {"model": model, "data": data}, **settings)
    after = read_metrics(run_stage("evaluate/perplexity", {"model": adapted, "data": data}))["perplexity"]
    assert after < 0.95 * before


def test_adalora_ends_with_its_budget_spread_unevenly_and_stores_no_more(
    adapt: Callable[..., Action], read_tensors: Callable[..., dict[str, Tensor]]
) -> None:
    action = adapt("adapt/adalora", rank=2, initial_rank=5, modules=["q_proj", "up_proj"])
    ranks = action.provenance["ranks"]
    assert sum(ranks.values()) == 2 * len(ranks) == 2 * 3 * 2
    assert len(set(ranks.values())) > 1
    tensors = read_tensors(action.artifact)
    for layer, rank in ranks.items():
        module = f"base_model.model.{layer.removesuffix('.weight')}"
        assert len(tensors[f"{module}.lora_A.weight"]) == max(1, rank)
        assert bool(tensors[f"{module}.lora_B.weight"].any()) == (rank > 0)


def test_orthogonality_falls_with_its_weight(
    adapt: Callable[..., Action], read_tensors: Callable[..., dict[str, Tensor]]
) -> None:
    def distance(weight: float) -> float:
        action = adapt("adapt/adalora", rank=4, initial_rank=4, orthogonality=weight, steps=30, max_grad_norm=0)
        tensors = read_tensors(action.artifact)
        rows = [tensor for name, tensor in tensors.items() if name.endswith("lora_A.weight")]
        assert {len(q) for q in rows} == {4}
        return max(float((q @ q.T - torch.eye(4)).norm()) for q in rows)

    assert distance(10.0) < 0.3 < distance(0.0)


def test_the_noted_loss_is_that_of_the_text_alone(adapt: Callable[..., Action]) -> None:
    first = [
        adapt("adapt/adalora", rank=3, initial_rank=5, orthogonality=weight).provenance["training"]["losses"][0]
        for weight in (0.0, 5.0)
    ]
    assert first[0] == first[1]


def test_soras_gates_become_exactly_zero_and_their_directions_go(
    adapt: Callable[..., Action], read_tensors: Callable[..., dict[str, Tensor]]
) -> None:
    action = adapt("adapt/sora", rank=6, threshold=0.08)
    ranks = action.provenance["ranks"]
    assert len(ranks) == LAYERS
    assert 0 < sum(ranks.values()) < 6 * LAYERS
    tensors = read_tensors(action.artifact)
    assert sum(len(a) for name, a in tensors.items() if name.endswith("lora_A.weight")) == sum(
        max(1, rank) for rank in ranks.values()
    )
    shut = adapt("adapt/sora", rank=2, threshold=10.0)
    assert set(shut.provenance["ranks"].values()) == {0}
    assert not any(tensor.any() for name, tensor in read_tensors(shut.artifact).items() if "lora_B" in name)


def test_adapters_of_uneven_rank_load_in_peft_with_equal_logits(
    adapt: Callable[..., Action],
    import_model: Callable[..., Artifact],
    make_tokens: Callable[..., Artifact],
    windows: Callable[[Artifact], Tensor],
    block_loop_logits: Callable[..., Tensor],
    load_elsewhere: Callable[..., dict[str, Loaded]],
) -> None:
    models = {"base": import_model("llama")}
    for name, settings in STAGES.items():
        action = adapt(name, **settings, learning_rate=3e-2)
        assert len(set(action.provenance["ranks"].values())) > 1
        models[name] = action.artifact
    ids = windows(make_tokens(models["base"]))
    found = load_elsewhere(PEFT, ids, models)
    for name, model in models.items():
        torch.testing.assert_close(found[name].logits, block_loop_logits(model, ids), rtol=0, atol=1e-4)
        assert name == "base" or (found[name].logits - found["base"].logits).abs().max() > 0.05


class Killed(Exception):
    """Stands for the end of the process."""


@pytest.mark.parametrize("asked", [False, True], ids=["killed", "asked to stop"])
@pytest.mark.parametrize("after", [2, 5, 9])  # before ranks fall, while they do, and in the last phase
@pytest.mark.parametrize("name", STAGES)
def test_a_killed_stage_ends_as_an_undisturbed_one(
    name: str,
    after: int,
    asked: bool,
    store: Store,
    import_model: Callable[..., Artifact],
    make_tokens: Callable[..., Artifact],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(SavingPace, "due", lambda self: True)
    model = import_model("llama")
    inputs = {"model": model, "data": make_tokens(model)}
    entry = stage_named(name)
    parameters = entry.parameters(**TRAINING, **STAGES[name], **({"t_init": 0.3} if "adalora" in name else {}))

    def attempt(dies: bool) -> Action:
        seen: list[int] = []

        def progress(what: str, done: int, total: int) -> None:
            if what.startswith("training"):
                seen.append(done)
                if dies and not asked and done == after:
                    raise Killed

        run = Run(store, progress=progress, stop_asked=lambda: dies and asked and after in seen)
        return compute(run, entry, parameters, inputs)

    with pytest.raises(Preempted if asked else Killed):
        attempt(dies=True)
    resumed = attempt(dies=False)
    assert resumed.provenance["resumed"]["from_step"] == (after if asked else after - 1)
    assert verify(store) == []
    store.files.delete(f"actions/{name}/{resumed.key}")
    undisturbed = attempt(dies=False)
    assert resumed.artifact == undisturbed.artifact
    for note in ("training", "ranks"):
        assert resumed.provenance[note] == undisturbed.provenance[note]


def test_a_budget_is_met_however_few_the_steps(adapt: Callable[..., Action], store: Store) -> None:
    for steps in (1, 2, 3):
        action = adapt("adapt/adalora", rank=2, initial_rank=4, steps=steps, t_init=0.45, t_final=0.45)
        with ArtifactReader(store, action.artifact) as reader:
            kept = sum(entry.shape[0] for name, entry in reader.manifest.tensors.items() if "lora_A" in name)
        empty = sum(rank == 0 for rank in action.provenance["ranks"].values())
        assert kept - empty <= 2 * LAYERS


@pytest.mark.parametrize(
    ("name", "settings", "sentence"),
    [
        ("adalora", {"rank": 13}, "rank 13 is above initial_rank 12, but AdaLoRA only takes away; raise initial_rank"),
        ("adalora", {"t_init": 0.5, "t_final": 0.5}, "t_init 0.5 and t_final 0.5 leave no steps in which ranks fall"),
        ("adalora", {"rank": 4, "initial_rank": 40}, "initial_rank 40 is more than k_proj of 32 x 64 has; at most 32"),
        ("adalora", {"modules": ["c_attn"]}, "have no layer 'c_attn'"),
        ("sora", {"rank": 40}, "rank 40 is more than k_proj of 32 x 64 has"),
    ],
)
def test_bad_input_is_told_in_a_sentence(
    name: str, settings: dict[str, Any], sentence: str, adapt: Callable[..., Action]
) -> None:
    with pytest.raises(StageError, match=sentence):
        adapt(f"adapt/{name}", **settings)
