"""Latency and memory as an evaluation: what is measured, how figures are made of it, and how it ends."""

from __future__ import annotations

import importlib.util
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import coldpress.tasks.evaluation.efficiency_stage as efficiency_stage
import pytest
import torch
from coldpress.flows.recipe import RecipeError, load_recipe
from coldpress.storage.artifacts import Artifact
from coldpress.storage.errors import ColdpressError
from coldpress.storage.store import Store
from coldpress.tasks.blocks import StoredModel
from coldpress.tasks.catalogue import stage_named
from coldpress.tasks.evaluation.efficiency import speeds, summary
from coldpress.tasks.evaluation.exported import last_error
from coldpress.tasks.hardware import describe
from coldpress.tasks.reporting.ratios import ratios
from coldpress.tasks.stage import ModelFacts, Preempted, Run, StageError, compute
from transformers import AutoModelForCausalLM

SCRIPT = Path(efficiency_stage.__file__).with_name("efficiency_script.py")
SHORT = {"prompt": 8, "generate": 3, "repeats": 4, "warmup": 1}


# Figures


def test_the_summary_is_the_median_and_how_far_apart_the_middle_half_lies() -> None:
    assert summary([5.0, 1.0, 2.0, 4.0, 3.0]) == (3.0, 2.0)  # quartiles 2 and 4
    assert summary([1.0, 2.0, 3.0, 100.0]) == (2.5, 27.25 - 1.75)
    assert summary([7.0, 7.0, 7.0]) == (7.0, 0.0)


def test_one_slow_repeat_does_not_move_the_figures() -> None:
    prefill, decode = [0.1, 0.1, 9.0, 0.1, 0.1], [0.4, 0.4, 9.0, 0.4, 0.4]
    found = speeds(prefill, decode, batch_size=2, generate=8)
    assert found["prefill_ms"] == pytest.approx(100)
    assert found["decode_ms_per_token"] == pytest.approx(50)
    assert found["tokens_per_second"] == pytest.approx(16 / 0.5)
    assert found["prefill_ms_iqr"] == found["decode_ms_per_token_iqr"] == pytest.approx(0)
    assert (found["prefill_seconds"], found["decode_seconds"]) == (prefill, decode)


def test_repeats_belong_together() -> None:
    with pytest.raises(ValueError, match="3 timings of prompts and 2 of decoding"):
        speeds([1.0, 1.0, 1.0], [1.0, 1.0], batch_size=1, generate=1)


# Measuring


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_a_model_is_measured_in_the_library_that_its_users_run_it_in(
    import_model: Callable[..., Artifact],
    run_stage: Callable[..., Artifact],
    read_metrics: Callable[[Artifact], dict[str, Any]],
    store: Store,
) -> None:
    found = read_metrics(run_stage("evaluate/latency", {"model": import_model("llama")}, **SHORT, threads=1))
    assert len(found["prefill_seconds"]) == len(found["decode_seconds"]) == SHORT["repeats"]
    again = speeds(found["prefill_seconds"], found["decode_seconds"], batch_size=1, generate=SHORT["generate"])
    assert {name: found[name] for name in again} == again
    assert all(value > 0 for value in (*found["prefill_seconds"], *found["decode_seconds"], found["load_seconds"]))
    assert found["process_memory_bytes"] > found["process_memory_before_bytes"] > 50e6
    assert found["runtime"].startswith("transformers ")
    assert found["runtime"].endswith(", float32, 1 thread")
    assert found["hardware"] == describe("cpu")
    assert (found["batch_size"], found["prompt_tokens"], found["generated_tokens"]) == (1, 8, 3)
    assert not {"energy_joules_per_token", "device_memory_bytes"} & found.keys()  # not zero: not known
    (action,) = store.actions("evaluate/latency")
    assert action.provenance["energy"] == "energy is only read of NVIDIA's GPUs"
    assert action.preimage["hardware"]["machine"] == found["hardware"]


def test_an_adapter_beside_a_packed_model_runs_in_peft(
    import_model: Callable[..., Artifact],
    run_stage: Callable[..., Artifact],
    read_metrics: Callable[[Artifact], dict[str, Any]],
) -> None:
    pytest.importorskip("peft")
    base = import_model("llama")
    packed = run_stage("quantize/nf4", {"model": base})
    adapter = run_stage("compensate/svd", {"model": packed, "original": base}, rank=4)
    found = read_metrics(run_stage("evaluate/latency", {"model": adapter}, **SHORT, batch_size=2))
    assert "bitsandbytes" in found["runtime"]
    assert "PEFT" in found["runtime"]
    assert len(found["decode_seconds"]) == SHORT["repeats"]


def written(run: Run, model: Artifact, folder: Path, **parameters: Any) -> dict[str, Any]:
    settings = stage_named("evaluate/latency").parameters(**parameters)
    with StoredModel(run, model) as stored:
        return efficiency_stage._export_all(run, settings, model, stored, str(folder))  # type: ignore[arg-type]


@pytest.mark.parametrize("method", ["nf4", "rtn", "int8"])
def test_dequantized_is_a_dense_model_with_the_weights_that_the_packed_one_stands_for(
    method: str,
    import_model: Callable[..., Artifact],
    run_stage: Callable[..., Artifact],
    dense_weights: Callable[..., dict[str, torch.Tensor]],
    store: Store,
    tmp_path: Path,
) -> None:
    base = import_model("llama")
    packed = run_stage(f"quantize/{method}", {"model": base}, **({"group_size": 32} if method == "rtn" else {}))
    adapter = run_stage("compensate/svd", {"model": packed, "original": base}, rank=4)
    for model, said in ((packed, "dequantized, "), (adapter, "dequantized, adapter merged, ")):
        found = written(Run(store), model, tmp_path / model.short, runtime="dequantized")
        assert (found["format"], found["adapter"]) == ("dense", None)
        assert found["note"].endswith(said)
        loaded = AutoModelForCausalLM.from_pretrained(found["folder"], dtype="auto")
        assert not hasattr(loaded, "hf_quantizer")
        state = loaded.state_dict()
        expected = dense_weights(model)
        assert expected
        for name, weight in expected.items():
            assert torch.equal(state[f"{name}.weight"].float(), weight), name


@pytest.mark.parametrize("family", ["llama", "gemma2", "opt", "gpt_neox"])
def test_parameters_are_counted_as_transformers_counts_them_packed_or_not(
    family: str, import_model: Callable[..., Artifact], run_stage: Callable[..., Artifact],
    whole_model: Callable[..., Any], store: Store,
) -> None:  # fmt: skip
    run = Run(store)
    base = import_model(family)
    model = whole_model(family)
    count = sum(math.prod(parameter.shape) for parameter in model.parameters())  # a tied head is counted once
    packed = [run_stage("quantize/nf4", {"model": base}), run_stage("quantize/rtn", {"model": base}, group_size=32)]
    for artifact in (base, *packed):
        with StoredModel(run, artifact) as stored:
            assert efficiency_stage.count_parameters(stored, run, artifact) == count
    adapter = run_stage("compensate/svd", {"model": packed[0], "original": base}, rank=4)
    with StoredModel(run, adapter) as stored:
        linears = [shape for index in range(stored.blocks) for shape in stored.linear_shapes(index).values()]
        added = sum(4 * (rows + columns) for rows, columns in linears)
        assert efficiency_stage.count_parameters(stored, run, adapter) == count + added


def test_processors_that_others_keep_busy_are_noticed() -> None:
    specification = importlib.util.spec_from_file_location("script", SCRIPT)
    assert specification is not None
    assert specification.loader is not None
    script = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(script)
    assert script.OtherProcesses().reading() is None  # too short to say
    other = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    meter = script.OtherProcesses()
    time.sleep(1.2)
    other.kill()
    other.wait()
    assert meter.reading() > 0.2


# Ends


def test_a_request_to_stop_ends_the_measuring_process(import_model: Callable[..., Artifact], store: Store) -> None:
    entry = stage_named("evaluate/latency")
    reports: list[str] = []
    run = Run(store, progress=lambda what, *_: reports.append(what), stop_asked=lambda: "loading" in reports)
    with pytest.raises(Preempted):
        compute(run, entry, entry.parameters(**SHORT), {"model": import_model("llama")})
    assert reports[-1] == "loading"
    assert not list(store.actions("evaluate/latency"))
    assert not children()


def children() -> set[str]:
    """Process ids of measurements that this process has begun."""
    listed = subprocess.run(["ps", "--ppid", str(os.getpid()), "-o", "args="], capture_output=True, text=True)
    return {line for line in listed.stdout.splitlines() if SCRIPT.name in line}


def test_a_measuring_process_does_not_outlive_who_began_it(tmp_path: Path) -> None:
    asked = tmp_path / "asked.json"
    os.mkfifo(asked)  # the script waits for what it is asked
    process = subprocess.Popen([sys.executable, str(SCRIPT), str(asked)], stdin=subprocess.PIPE)
    time.sleep(0.2)
    assert process.poll() is None
    assert process.stdin is not None
    process.stdin.close()  # as the kernel does after kill -9
    assert process.wait(timeout=60) == 1


def test_a_model_that_does_not_run_says_why(tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = "import sys\nprint('loading', file=sys.stderr)\nraise ValueError('no such kernel')\n"
    (tmp_path / "efficiency_script.py").write_text(broken)
    monkeypatch.setattr(efficiency_stage, "__file__", str(tmp_path / "efficiency_stage.py"))
    with pytest.raises(StageError, match=r"did not run \(status 1\): ValueError: no such kernel"):
        efficiency_stage._measure(Run(store), {"threads": 1}, str(tmp_path))
    assert last_error("") == "no message"


# Checks


def check(facts: ModelFacts, **parameters: Any) -> list[str]:
    entry = stage_named("evaluate/latency")
    return list(entry.check(entry.parameters(**parameters), facts))


def test_tokens_beyond_the_context_are_refused() -> None:
    facts = ModelFacts({"max_position_embeddings": 64})
    assert check(facts, prompt=48, generate=16) == []
    (problem,) = check(facts, prompt=48, generate=17)
    assert "prompt 48 and generate 17 make 65 tokens, but the model's context is 64; lower one of them" in problem


@pytest.mark.parametrize("format", ["gptq", "awq"])
def test_a_format_without_its_package_is_refused_unless_it_is_dequantized(
    format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = ModelFacts({}, format)
    monkeypatch.setattr(efficiency_stage, "find_spec", lambda name: None)
    (problem,) = check(facts)
    assert "runs in gptqmodel, which is not installed: pip install 'coldpress[gptqmodel]'" in problem
    assert check(facts, runtime="dequantized") == []
    assert check(ModelFacts({}, "bitsandbytes")) == []


def test_an_adapter_without_what_runs_it_is_refused(
    import_model: Callable[..., Artifact], run_stage: Callable[..., Artifact], store: Store,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    base = import_model("llama")
    packed = run_stage("quantize/rtn", {"model": base}, group_size=32)
    adapter = run_stage("compensate/svd", {"model": packed, "original": base}, rank=4)
    entry = stage_named("evaluate/latency")
    for installed, wanted in (
        (set(), r"pip install 'coldpress\[peft\]'"),
        ({"gptqmodel", "peft"}, "PEFT needs optimum"),
    ):
        monkeypatch.setattr(efficiency_stage, "find_spec", lambda name, known=installed: name in known or None)
        with pytest.raises(StageError, match=wanted):
            entry.function(Run(store), entry.parameters(), adapter)


def test_a_gpu_other_than_the_one_in_the_key_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(efficiency_stage, "gpu_of", lambda device: type("Gpu", (), {"name": "Tesla T4"}))
    efficiency_stage._check_gpu("cuda", "Tesla T4")
    with pytest.raises(ColdpressError, match=r"calls cuda 'Tesla T4', but it was measured on 'NVIDIA L4'"):
        efficiency_stage._check_gpu("cuda", "NVIDIA L4")


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ("repeats: 2", "repeats"),
        ("runtime: vllm", "'auto' or 'dequantized'"),
        ("prompt: 0", "prompt"),
        ("threads: 0", "threads"),
    ],
)
def test_bad_settings_are_refused_with_their_line(
    settings: str, part: str, tiny_model_folder: Callable[..., str], tmp_path: Path
) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(
        f"name: r\nmodel: {{source: '{tiny_model_folder('llama')}'}}\nevaluate:\n  latency: {{{settings}}}\n"
    )
    with pytest.raises(RecipeError) as caught:
        load_recipe(str(path))
    (problem,) = caught.value.problems
    assert part in problem.message
    assert problem.line == 4


# Ratios


def document(metrics: dict[str, dict[str, Any]], roots: dict[str, str]) -> dict[str, Any]:
    return {
        "stages": [{"name": name, "root": root} for name, root in roots.items()],
        "variants": [name for name in metrics if name in roots],
        "metrics": metrics,
    }


def test_ratios_are_against_the_model_at_the_root_of_the_branch() -> None:
    """The study's own arithmetic: 13.48 GB and 24.24 GB in full, and what became of them."""
    on = {"hardware": "one"}
    found = ratios(
        document(
            {
                "7b": {"size_bytes": 800, "device_memory_bytes": 13803.52, **on},
                "7b-gptq": {"size_bytes": 200, "device_memory_bytes": 4786.0, **on},
                "13b": {"size_bytes": 1600, "device_memory_bytes": 24826.0, **on},
                "13b-gptq": {"size_bytes": 400, "device_memory_bytes": 7782.0, **on},
            },
            {"7b": "7b", "7b-gptq": "7b", "13b": "13b", "13b-gptq": "13b"},
        )
    )
    assert found["7b"] == {"size": 1.0, "memory": 1.0}
    assert found["7b-gptq"] == {"size": 4.0, "memory": pytest.approx(2.884, abs=1e-3)}
    assert found["13b-gptq"] == {"size": 4.0, "memory": pytest.approx(3.19, abs=1e-2)}


def test_the_memory_of_interpreter_and_libraries_is_no_part_of_a_ratio() -> None:
    base = {"process_memory_bytes": 1300, "process_memory_before_bytes": 500, "hardware": "one"}
    small = {"process_memory_bytes": 900, "process_memory_before_bytes": 700, "hardware": "one"}
    found = ratios(document({"base": base, "small": small}, {"base": "base", "small": "base"}))
    assert found["small"] == {"memory": 4.0}


def test_there_is_no_ratio_between_machines_or_of_what_was_not_measured() -> None:
    base = {"size_bytes": 10, "device_memory_bytes": 8, "hardware": "one"}
    found = ratios(
        document(
            {
                "base": base,
                "elsewhere": {"size_bytes": 5, "device_memory_bytes": 2, "hardware": "another"},
                "unmeasured": {"size_bytes": 5},
                "nothing": {},
                "orphan": {"size_bytes": 5, "device_memory_bytes": 2, "hardware": "one"},
            },
            {"base": "base", "elsewhere": "base", "unmeasured": "base", "nothing": "base", "orphan": "left-out"},
        )
    )
    assert found["elsewhere"] == found["unmeasured"] == {"size": 2.0}
    assert found["nothing"] == found["orphan"] == {}


def test_an_evaluation_with_a_name_of_its_own_is_compared_with_its_like() -> None:
    on = {"hardware": "one"}
    metrics = {
        "base": {"device_memory_bytes": 100, **on},
        "base/batch": {"device_memory_bytes": 300, **on},
        "small": {"device_memory_bytes": 50, **on},
        "small/batch": {"device_memory_bytes": 100, **on},
        "small/lonely": {"device_memory_bytes": 10, **on},
    }
    given = document(metrics, {"base": "base", "small": "base"})
    found = ratios(given)
    assert (found["small"], found["small/batch"], found["small/lonely"]) == ({"memory": 2.0}, {"memory": 3.0}, {})
