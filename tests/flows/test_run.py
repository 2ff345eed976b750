"""Running a recipe on Prefect: states, references, artifacts, failures, interruption."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from coldpress.flows.prefect_server import server_configured
from coldpress.flows.recipe import load_recipe
from coldpress.flows.result import RunResult
from coldpress.flows.run import run_recipe
from coldpress.flows.terminal import Terminal
from coldpress.storage.inspect import verify
from coldpress.storage.store import Store, artifact_path
from coldpress.tasks import hardware
from coldpress.tasks.evaluation import efficiency_stage
from coldpress.tasks.reporting.report import markdown_table

Run = Callable[..., RunResult]


@pytest.fixture
def run(prefect_server: None, tiny_recipe: Path, quiet_terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> Run:
    """`run(store, *overrides)`: the tiny recipe, reporting to the tests' server."""
    monkeypatch.setattr("coldpress.flows.run.server_configured", lambda: True)

    def start(store: Store, *overrides: str) -> RunResult:
        return run_recipe(load_recipe(str(tiny_recipe), overrides), store, quiet_terminal, device="cpu")

    return start


@pytest.fixture
def memory(request: pytest.FixtureRequest) -> Store:
    """A store that only this process sees, so that stages are computed in it."""
    return Store(f"memory://{request.node.name}-{os.getpid()}")


def states(result: RunResult) -> dict[str, str]:
    return {name: entry.state for name, entry in result.stages.items()}


def asked_of_prefect(path: str, **query: Any) -> Any:
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        return client._client.post(path, json=query).json()


def task_runs(result: RunResult) -> dict[str, dict[str, Any]]:
    """Task run name -> task run, as the server has them once all events have arrived."""
    query = {"flow_runs": {"name": {"any_": [result.run]}}, "limit": 200}
    for _ in range(100):
        found = {entry["name"]: entry for entry in asked_of_prefect("/task_runs/filter", **query)}
        if len(found) == len(result.stages) and all(entry["state_type"] == "COMPLETED" for entry in found.values()):
            break
        time.sleep(0.2)
    return found


def test_a_second_run_computes_nothing_and_finds_the_same_artifacts(run: Run, memory: Store) -> None:
    first, second = run(memory), run(memory)
    assert set(states(first).values()) == {"computed"}
    assert set(states(second).values()) == {"cached"}
    assert {n: e.artifact for n, e in first.stages.items()} == {n: e.artifact for n, e in second.stages.items()}
    assert first.metrics == second.metrics
    assert set(first.metrics) == {"base", "pruned", "gptq", "nf4"}
    assert first.metrics["gptq"]["sparsity"] == pytest.approx(0.5, abs=0.01)


def test_the_dashboard_shows_the_dag_with_the_stages_own_names_and_cached_states(run: Run, memory: Store) -> None:
    result = run(memory)
    shown = task_runs(result)
    assert set(shown) == set(result.stages)
    ids = {entry["id"]: name for name, entry in shown.items()}
    arrows = {ids[i["id"]] for sources in shown["gptq"]["task_inputs"].values() for i in sources if "id" in i}
    assert arrows == {"pruned", "calibration"}
    assert {entry["state_name"] for entry in task_runs(run(memory)).values()} == {"Cached"}


def test_every_stage_links_its_artifact_and_block_stages_show_progress(run: Run, memory: Store) -> None:
    result = run(memory)
    ids = {entry["id"]: name for name, entry in task_runs(result).items()}
    artifacts = asked_of_prefect("/artifacts/filter", artifacts={"task_run_id": {"any_": list(ids)}}, limit=200)
    markdown = {ids[a["task_run_id"]]: a["data"] for a in artifacts if a["type"] == "markdown"}
    assert set(markdown) == set(result.stages)
    for name, text in markdown.items():
        artifact = result.stages[name].artifact
        assert artifact is not None
        assert artifact.id in text
    progress = {ids[a["task_run_id"]]: a["data"] for a in artifacts if a["type"] == "progress"}
    assert progress["pruned"] == 100.0
    assert progress["gptq"] == 100.0
    (report,) = asked_of_prefect("/artifacts/filter", artifacts={"key": {"any_": ["tiny-report"]}}, limit=1)
    assert "| gptq |" in report["data"]


def test_changing_one_stage_recomputes_it_and_what_follows(run: Run, memory: Store) -> None:
    run(memory)
    changed = states(run(memory, "stages.pruned.sparsity=0.6"))
    assert changed["base"] == changed["calibration"] == changed["base/perplexity"] == "cached"
    assert changed["pruned"] == changed["gptq"] == changed["nf4/size"] == "computed"


def test_measurements_are_made_again_on_other_hardware_and_nothing_else_is(
    run: Run, memory: Store, change: Callable[[str, str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    timings: dict[str, Any] = {
        "prefill_seconds": [0.2, 0.2, 0.2], "decode_seconds": [0.4, 0.4, 0.4], "load_seconds": 1.0,
        "runtime": "somewhere, float32", "others_busy_processors": 1.25, "no_energy": "no counter",
    }  # fmt: skip
    monkeypatch.setattr(efficiency_stage, "_measure", lambda run, asked, folder: dict(timings))
    monkeypatch.setattr(hardware, "_processor", lambda: "a slow one")
    change("  variants: [base, pruned, gptq, nf4]\n", "  variants: [base]\n  latency: {generate: 4, repeats: 3}\n")
    first = run(memory)
    figures = first.metrics["base"]
    assert figures["decode_ms_per_token"] == pytest.approx(100)
    assert figures["hardware"] == "a slow one"
    assert first.runtimes["base"]["perplexity"] == "coldpress block loop, float32"
    assert re.fullmatch(r"somewhere, float32, \d+ threads?", first.runtimes["base"]["latency"])
    (action,) = memory.actions("evaluate/latency")
    assert any("other processes kept 1.2 of" in warning for warning in action.provenance["warnings"])
    assert set(states(run(memory)).values()) == {"cached"}
    monkeypatch.setattr(hardware, "_processor", lambda: "a fast one")
    monkeypatch.setitem(timings, "decode_seconds", [0.2, 0.2, 0.2])
    second = run(memory)
    assert {name for name, state in states(second).items() if state != "cached"} == {"base/latency"}
    assert second.metrics["base"]["decode_ms_per_token"] == pytest.approx(50)
    assert second.metrics["base"]["hardware"] == "a fast one"


def test_an_evaluation_with_a_name_of_its_own_has_a_row_of_its_own(
    run: Run, memory: Store, change: Callable[[str, str], Path]
) -> None:
    cache = "kv_cache: {bits: 2, group_size: 16, residual: 16}"
    change(
        "  variants: [base, pruned, gptq, nf4]\n",
        f"  variants: [base, nf4]\n  kv2: {{method: perplexity, variants: [base], data: held_out, {cache}}}\n",
    )
    document = run(memory).to_json()
    metrics = document["metrics"]
    assert list(metrics) == ["base", "base/kv2", "nf4"]
    assert metrics["base"]["perplexity"] != metrics["base/kv2"]["perplexity"]
    assert "kv_cache_bytes" not in metrics["base"]
    title, _, *rows = (line.strip("| \n").split(" | ") for line in markdown_table(document).splitlines())
    assert [row[0] for row in rows] == ["base", "base/kv2", "nf4"]
    sizes = metrics["base/kv2"]["kv_cache_bytes"], metrics["base/kv2"]["kv_cache_bytes_in_full"]
    place = title.index("KV cache")
    assert title[place + 1] == "in full"
    assert rows[1][place : place + 2] == [f"{size / 1e6:.2f} MB" for size in sizes]
    assert rows[0][place : place + 2] == ["-", "-"]
    del metrics["base/kv2"]
    assert "KV cache" not in markdown_table(document)


def test_an_adapter_is_measured_with_the_checkpoint_it_belongs_to(
    run: Run, memory: Store, change: Callable[[str, str], Path]
) -> None:
    stage = "  back: {use: compensate, method: svd, model: nf4, original: base, rank: 32}\nevaluate:"
    change("[base, pruned, gptq, nf4]", "[base, nf4, back]")
    change("evaluate:", stage)
    metrics = run(memory).metrics
    assert set(metrics) == {"base", "nf4", "back"}
    dense, without, compensated = (metrics[name]["loss_nats"] for name in ("base", "nf4", "back"))
    assert abs(compensated - dense) < abs(without - dense)
    assert metrics["back"]["bits_per_weight"] > metrics["nf4"]["bits_per_weight"]
    assert metrics["back"]["sparsity"] == metrics["nf4"]["sparsity"]


def test_a_server_that_goes_away_costs_what_the_dashboard_shows_and_no_stage(
    run: Run, memory: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*arguments: Any, **named: Any) -> None:
        raise httpx.ConnectError("All connection attempts failed")

    for name in ("create_progress_artifact", "update_progress_artifact", "create_markdown_artifact"):
        monkeypatch.setattr(f"prefect.artifacts.{name}", away)
    assert set(states(run(memory)).values()) == {"computed"}


def test_no_stage_asks_the_server_before_it_begins(run: Run, memory: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    from prefect.client.orchestration import PrefectClient

    def away(*arguments: Any, **named: Any) -> None:
        raise httpx.ConnectError("All connection attempts failed")

    monkeypatch.setattr(PrefectClient, "increment_concurrency_slots_with_lease", away)
    assert set(states(run(memory)).values()) == {"computed"}


def test_a_failed_branch_leaves_the_others_running(run: Run, memory: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    from coldpress.tasks.quantization import nf4_format

    def fail(*arguments: object) -> None:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(nf4_format, "pack", fail)
    result = run(memory)
    ended = states(result)
    assert ended["nf4"] == "failed"
    assert "no such kernel" in str(result.stages["nf4"].error)
    assert ended["nf4/size"] == ended["nf4/perplexity"] == "skipped"
    assert ended["gptq/perplexity"] == "computed"
    assert result.failed
    assert verify(memory) == []
    monkeypatch.undo()
    assert lookup_is_absent(memory, "quantize/nf4")


def lookup_is_absent(store: Store, stage: str) -> bool:
    return not list(store.actions(stage))


def test_two_stores_get_the_same_artifact_ids(run: Run, memory: Store, new_store: Callable[[], Store]) -> None:
    """One computed in this process, one in a computing process of its own."""
    here, there = run(memory), run(new_store())
    assert {n: e.artifact for n, e in here.stages.items()} == {n: e.artifact for n, e in there.stages.items()}


COMMAND = [sys.executable, "-m", "coldpress.flows.cli", "run"]


def environment(folder: Path) -> dict[str, str]:
    """A home without Prefect settings, and no server."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("PREFECT_", "COLDPRESS_"))}
    return {**kept, "PREFECT_HOME": str(folder / "prefect"), "HOME": str(folder)}


def test_an_interrupted_run_leaves_nothing_half_published_and_goes_on_later(tiny_recipe: Path, tmp_path: Path) -> None:
    command = [*COMMAND, str(tiny_recipe), "--store", str(tmp_path / "store"), "--json"]
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        env=environment(tmp_path),
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    store = Store(str(tmp_path / "store"))
    deadline = time.monotonic() + 120
    while not list(store.actions("source/model")):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to Prefect's temporary server, too
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "all finished work is kept" in said
    assert verify(store) == []

    again = subprocess.run(command, cwd=tmp_path, env=environment(tmp_path), capture_output=True, text=True, check=True)
    document = json.loads(again.stdout)
    ended = {stage["name"]: stage["state"] for stage in document["stages"]}
    assert ended["base"] == "cached"
    assert ended["nf4/perplexity"] == "computed"
    assert set(document["metrics"]["nf4"]) >= {"perplexity", "sparsity", "bits_per_weight", "size_bytes"}

    # Everything is there now: the answer needs neither torch nor Prefect.
    probe = (
        "import sys, coldpress.flows.cli as cli\n"
        f"sys.argv = ['coldpress', 'run', {str(tiny_recipe)!r}, '--store', {str(tmp_path / 'store')!r}]\n"
        "try: cli.main()\nexcept SystemExit as end: assert end.code == 0, end.code\n"
        "print('imported', sorted({'torch', 'transformers', 'prefect'} & set(sys.modules)))\n"
    )
    cached = subprocess.run(
        [sys.executable, "-c", probe],
        cwd=tmp_path,
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        check=True,
    )
    assert "imported []" in cached.stdout
    assert "perplexity" in cached.stdout
    assert "report.html" in cached.stdout


def test_a_configured_server_is_seen_in_the_environment_and_in_prefects_profile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    monkeypatch.delenv("PREFECT_PROFILES_PATH", raising=False)
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path))
    assert not server_configured()
    (tmp_path / "profiles.toml").write_text(
        'active = "lab"\n[profiles.lab]\nPREFECT_API_URL = "http://127.0.0.1:4200/api"\n[profiles.none]\n'
    )
    assert server_configured()
    monkeypatch.setenv("PREFECT_PROFILE", "none")
    assert not server_configured()
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:4200/api")
    assert server_configured()


def test_a_server_that_does_not_answer_is_a_sentence(tiny_recipe: Path, tmp_path: Path) -> None:
    address = "http://127.0.0.1:9/api"
    ended = subprocess.run(
        [*COMMAND, str(tiny_recipe)],
        cwd=tmp_path,
        env={**environment(tmp_path), "PREFECT_API_URL": address},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 2
    assert f"the Prefect server at {address} does not answer" in ended.stderr
    assert "Traceback" not in ended.stderr


def flip_a_blob_of(store: Store, result: RunResult, name: str) -> None:
    """Change a byte of what only this stage's result holds, if anything."""
    artifact = result.stages[name].artifact
    assert artifact is not None
    others = {entry.artifact for entry in result.stages.values() if entry.artifact} - {artifact}
    shared = {blob for other in others for blob in store.manifest(other).blobs}
    blobs = store.manifest(artifact).blobs.keys()
    blob = min(blobs - shared or blobs)
    path = f"blobs/sha256/{blob[:2]}/{blob[2:]}"
    data = bytearray(store.files.read(path))
    data[-1] ^= 1
    store.files.replace(path, [bytes(data)])


def test_a_run_that_meets_damage_computes_again_what_is_damaged_and_goes_on(run: Run, memory: Store) -> None:
    undisturbed = run(Store(f"{memory.url}-undisturbed"), "stages.pruned.sparsity=0.6")
    flip_a_blob_of(memory, run(memory), "base")
    result = run(Store(memory.url), "stages.pruned.sparsity=0.6")
    assert not result.failed
    assert {n: e.artifact for n, e in result.stages.items()} == {n: e.artifact for n, e in undisturbed.stages.items()}
    assert result.stages["base"].state == "computed"
    assert verify(Store(memory.url)) == []


def test_a_result_that_goes_between_plan_and_run_is_computed_again(
    run: Run, memory: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run(memory)
    gone = first.stages["gptq"].artifact
    assert gone is not None

    def lose(plan: object, store: Store) -> None:
        store.files.delete(artifact_path(gone.id))

    monkeypatch.setattr("coldpress.flows.run.check_disk", lose)
    again = run(memory)
    assert {name: state for name, state in states(again).items() if state != "cached"} == {"gptq": "computed"}
    assert again.stages["gptq"].artifact == gone


def test_after_verify_the_next_run_computes_exactly_what_was_damaged(run: Run, memory: Store) -> None:
    first = run(memory)
    flip_a_blob_of(memory, first, "gptq")
    (finding,) = verify(memory)
    assert finding.needed_by == ("tiny/gptq",)
    second = run(Store(memory.url))
    assert {name for name, state in states(second).items() if state == "computed"} == {"gptq"}
    assert {n: e.artifact for n, e in first.stages.items()} == {n: e.artifact for n, e in second.stages.items()}
    assert verify(memory) == []


def test_a_run_leaves_a_record_from_its_beginning(run: Run, memory: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    from coldpress.tasks.quantization import nf4_format

    seen: list[dict[str, Any]] = []
    pack = nf4_format.pack

    def look(*arguments: Any, **keywords: Any) -> Any:
        seen.append(next(iter(memory.runs().values())))
        return pack(*arguments, **keywords)

    monkeypatch.setattr(nf4_format, "pack", look)
    run(memory)
    during = {stage["name"]: (stage["state"], bool(stage["artifact"])) for stage in seen[0]["stages"]}
    assert during["pruned"] == ("computed", True)
    assert during["nf4"] == ("pending", False)
    assert "tiny/pruned" in memory.refs()
