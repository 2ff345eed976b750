"""Budgets of bits: spent where rounding costs most, exactly, and never exceeded by what is stored."""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Callable, Mapping
from typing import Any

import plain_methods
import pytest
import torch
from coldpress.storage.artifacts import Artifact
from coldpress.storage.store import Store
from coldpress.tasks.catalogue import stage_named
from coldpress.tasks.quantization.bit_allocation import cheapest
from coldpress.tasks.quantization.precision import precision_of
from coldpress.tasks.stage import ModelFacts, Preempted, Run, compute
from torch import Tensor

Tensors = dict[str, Tensor]

ALL = [{"bits": bits} for bits in (2, 3, 4, 8)]
LLAMA = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 128,
}  # fmt: skip


def settings_of(store: Store, model: Artifact) -> Mapping[str, Any]:
    found = store.manifest(model).quantization
    assert found is not None
    return found


@pytest.fixture
def llama(import_model: Callable[..., Artifact]) -> Artifact:
    return import_model("llama")


@pytest.fixture
def quantize(
    llama: Artifact, make_tokens: Callable[..., Artifact], run_stage: Callable[..., Artifact]
) -> Callable[..., Artifact]:
    """`quantize("gptq", **parameters)`: the tiny Llama in groups of 32."""

    def run(method: str, **parameters: Any) -> Artifact:
        inputs = {"model": llama, "calibration": make_tokens(llama)}
        return run_stage(f"quantize/{method}", inputs, **{"group_size": 32, **parameters})

    return run


@pytest.mark.parametrize("seed", range(8))
def test_the_cheapest_plan_is_that_of_trying_all(seed: int) -> None:
    draw = random.Random(seed)
    sizes = [sorted(draw.sample(range(8, 200, 4), 4)) for _ in range(5)]
    losses = [[draw.random() ** 3 for _ in one] for one in sizes]  # more bytes may lose more
    least, most = sum(one[0] for one in sizes), sum(one[-1] for one in sizes)
    for budget in (least, least + 1, (2 * least + most) // 3, (least + most) // 2, most):
        chosen = cheapest(losses, sizes, budget)
        assert sum(size[choice] for size, choice in zip(sizes, chosen, strict=True)) <= budget
        best = min(
            sum(loss[choice] for loss, choice in zip(losses, plan, strict=True))
            for plan in itertools.product(range(4), repeat=5)
            if sum(size[choice] for size, choice in zip(sizes, plan, strict=True)) <= budget
        )
        assert sum(loss[choice] for loss, choice in zip(losses, chosen, strict=True)) == pytest.approx(best, rel=1e-5)


def test_a_large_plan_is_within_its_budget_and_the_same_every_time() -> None:
    draw = random.Random(0)
    sizes = [[draw.choice([1, 3]) * 2**20 * bits // 8 + 24 * number for bits in (2, 3, 4, 8)] for number in range(200)]
    losses = [[draw.random() * 4.0**-bits for bits in (2, 3, 4, 8)] for _ in sizes]
    budget = sum(size[1] for size in sizes) + 12_345
    chosen = cheapest(losses, sizes, budget)
    assert chosen == cheapest(losses, sizes, budget)
    assert 0 <= budget - sum(size[choice] for size, choice in zip(sizes, chosen, strict=True)) < 2**17


def test_plans_that_cannot_be_made_are_refused() -> None:
    with pytest.raises(ValueError, match="not even the smallest"):
        cheapest([[1.0, 0.5]], [[8, 16]], 7)
    with pytest.raises(ValueError, match="NaN"):
        cheapest([[1.0, float("nan")]], [[8, 16]], 12)


def test_choices_that_gain_nothing_are_not_bought() -> None:
    assert cheapest([[0.0, 0.0, 0.0], [1.0, 2.0, 0.5]], [[8, 4, 16], [4, 8, 12]], 100) == [1, 2]


@pytest.mark.parametrize("symmetric", [True, False])
def test_sensitivities_are_half_the_fisher_weighted_squares_of_rounding_errors(
    symmetric: bool,
    llama: Artifact,
    make_tokens: Callable[..., Artifact],
    run_stage: Callable[..., Artifact],
    read_tensors: Callable[..., Tensors],
    whole_model: Callable[..., Any],
    windows: Callable[[Artifact], Tensor],
) -> None:
    tokens = make_tokens(llama)
    choices = [(2, 32), (4, 64), (8, -1)]
    measured = run_stage(
        "statistics/sensitivity", {"model": llama, "calibration": tokens}, choices=choices, symmetric=symmetric
    )
    found = read_tensors(measured)
    model = whole_model("llama").requires_grad_(True)
    squares: dict[str, list[Tensor]] = {}
    for window in windows(tokens):
        model.zero_grad()
        model(window[None], labels=window[None], use_cache=False).loss.backward()
        for name, parameter in model.named_parameters():
            squares.setdefault(name, []).append(parameter.grad.double().square())
    assert len(found) == 3 * 7
    for name, losses in found.items():
        weight_name = name.removesuffix("losses") + "weight"
        weight, fisher = model.get_parameter(weight_name).detach().double(), torch.stack(squares[weight_name]).mean(0)
        for loss, (bits, size) in zip(losses.tolist(), choices, strict=True):
            columns = weight.shape[1] if size == -1 else size
            error = plain_methods.round_to_nearest(weight, bits, columns, symmetric) - weight
            assert loss == pytest.approx(float((fisher * error**2).sum() / 2), rel=2e-2), (name, bits)


@pytest.mark.parametrize("method", ["rtn", "gptq", "awq"])
@pytest.mark.parametrize("budget", [{"bits_per_weight": 4.7}, {"megabytes": 0.07}, {"bits_per_weight": 3.9}])
def test_what_is_stored_is_within_the_budget_and_a_step_of_it(
    method: str,
    budget: dict[str, float],
    quantize: Callable[..., Artifact],
    run_stage: Callable[..., Artifact],
    read_metrics: Callable[..., dict[str, Any]],
) -> None:
    found = read_metrics(run_stage("evaluate/size", {"model": quantize(method, budget=budget, choices=ALL)}))
    weights = found["linear_weights"]
    asked = budget.get("bits_per_weight") or budget["megabytes"] * 8e6 / weights
    step = 128 * 64 * 4.3 / weights  # from 4 to 8 bits of the largest layer
    assert asked - step < found["bits_per_weight"] <= asked


def test_a_budget_buys_bits_where_rounding_costs_most(
    store: Store, quantize: Callable[..., Artifact], read_tensors: Callable[..., Tensors]
) -> None:
    choices = [{"bits": 2, "group_size": 64}, {"bits": 8}]
    quantized = quantize("rtn", budget={"bits_per_weight": 6}, choices=choices, symmetric=False)
    (measured,) = list(store.actions("statistics/sensitivity"))
    losses = read_tensors(measured.artifact)
    settings = settings_of(store, quantized)
    gains: dict[int, list[float]] = {2: [], 8: []}
    for name, (rough, fine) in ((name, one.tolist()) for name, one in losses.items()):
        module = name.removesuffix(".losses")
        if module.rpartition(".")[2] in ("gate_proj", "up_proj", "down_proj"):  # layers of one size
            precision = precision_of(settings, module)
            assert precision in ((2, 64), (8, 32))
            gains[precision.bits].append(rough - fine)
    assert gains[2]
    assert min(gains[8]) >= max(gains[2])
    (action,) = [one for one in store.actions("quantize/rtn") if one.artifact == quantized]
    plan = action.provenance["precision"]
    assert {module: precision_of(settings, module)._asdict() for module in plan} == plan  # type: ignore[union-attr]
    assert len(plan) == 3 * 7
    sizes = {"self_attn.q_proj": 4, "self_attn.k_proj": 2, "self_attn.v_proj": 2, "self_attn.o_proj": 4}
    sizes |= dict.fromkeys(("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"), 8)
    bits = sum(size * plan[f"model.layers.1.{name}"]["bits"] for name, size in sizes.items()) / 36
    assert action.provenance["bits_of_block"]["1"] == pytest.approx(bits)


def test_budgets_share_what_was_measured(store: Store, quantize: Callable[..., Artifact]) -> None:
    models = {
        quantize(method, budget={"bits_per_weight": bits}, symmetric=False).id
        for method in ("rtn", "gptq", "awq")
        for bits in (5, 6)
    }
    assert len(models) == 6
    for choices in ([8, 4, 3], [3, 4, 8]):
        quantize("rtn", budget={"megabytes": 0.07}, symmetric=False, choices=[{"bits": bits} for bits in choices])
    assert len(list(store.actions("statistics/sensitivity"))) == 1


@pytest.mark.parametrize(
    ("budget", "sentence"),
    [
        ({"bits_per_weight": 2}, r"bits_per_weight 2 is less than the smallest choices take .* write 4.\d+ to 9.\d+"),
        ({"bits_per_weight": 16}, r"bits_per_weight 16 is more than the largest choices take .* write 4.\d+ to 9.\d+"),
        ({"megabytes": 0.01}, r"megabytes 0.01 is less than .* write 0.0\d+ to 0.1\d+"),
    ],
)
def test_budgets_that_cannot_be_met_name_those_that_can(budget: dict[str, float], sentence: str) -> None:
    entry = stage_named("quantize/gptq")
    (error,) = entry.check(entry.parameters(group_size=32, budget=budget), ModelFacts(LLAMA))
    assert re.search(sentence, error), error
    for limit in re.findall(r"\d+\.\d+", error.partition("write")[2]):
        met = entry.parameters(group_size=32, budget={next(iter(budget)): float(limit)})
        assert list(entry.check(met, ModelFacts(LLAMA))) == []


@pytest.mark.parametrize("name", ["statistics/sensitivity", "quantize/gptq"])
def test_a_killed_stage_ends_in_the_same_artifact(
    name: str,
    store: Store,
    llama: Artifact,
    make_tokens: Callable[..., Artifact],
    quantize: Callable[..., Artifact],
) -> None:
    budget = {"group_size": 32, "budget": {"bits_per_weight": 5}}
    quantize("gptq", budget=budget["budget"])  # makes what the stage derives
    undisturbed = {one: next(iter(store.actions(one))) for one in ("statistics/sensitivity", "quantize/gptq")}
    entry = stage_named(name)
    inputs = {"model": llama, "calibration": make_tokens(llama)}
    if name == "quantize/gptq":
        inputs["sensitivity"] = undisturbed["statistics/sensitivity"].artifact
        parameters = entry.parameters(**budget)
    else:
        parameters = entry.parameters(
            **stage_named("quantize/gptq").parameters(**budget).sensitivity()["sensitivity"][1]
        )
    store.files.delete(f"actions/{name}/{undisturbed[name].key}")
    said: list[str] = []
    run = Run(
        store, progress=lambda what, done, total: said.append(what), stop_asked=lambda: "first pass" not in said[-1]
    )
    said.append("first pass")
    with pytest.raises(Preempted):
        compute(run, entry, parameters, inputs)
    resumed = compute(Run(store), entry, parameters, inputs)
    assert resumed.provenance["resumed"]["from_block"] >= 1
    assert (resumed.key, resumed.artifact) == (undisturbed[name].key, undisturbed[name].artifact)
    assert resumed.provenance.get("precision") == undisturbed[name].provenance.get("precision")
