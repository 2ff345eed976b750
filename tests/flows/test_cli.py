"""The command line: what it prints, and how it ends."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from coldpress.flows.cli import main
from coldpress.storage.artifacts import Artifact
from coldpress.storage.store import Store, blob_path
from coldpress.tasks.stage import CATALOGUE


@pytest.fixture
def call(store: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Result]:
    """`call("ls")`: a command on the test's store."""
    monkeypatch.setenv("COLDPRESS_STORE", store.url)
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: CliRunner().invoke(main, list(arguments))


@pytest.fixture
def pruned(store: Store, import_model: Callable[..., Artifact], run_stage: Callable[..., Artifact]) -> Artifact:
    """A pruned tiny model with a name."""
    artifact = run_stage("prune/magnitude", {"model": import_model("llama")}, sparsity=0.5)
    store.set_ref("tiny/pruned", artifact)
    return artifact


def test_help_is_there_without_loading_anything_heavy() -> None:
    probe = (
        "import sys\nfrom coldpress.flows.cli import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "print(sorted({'torch', 'prefect', 'transformers', 'pydantic', 'rich', 'yaml'} & set(sys.modules)))"
    )
    said = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True).stdout
    assert "export" in said
    assert said.strip().endswith("[]")


def test_a_bad_recipe_ends_with_status_2_and_sentences(call: Callable[..., Result], tiny_recipe: Path) -> None:
    tiny_recipe.write_text(tiny_recipe.read_text().replace("sparsity: 0.5", "sparsity: 1.5"))
    result = call("run", str(tiny_recipe))
    assert result.exit_code == 2
    assert "tiny.yaml:7: stage 'pruned': sparsity is 1.5" in result.stderr
    assert "Traceback" not in result.output


def test_plan_shows_states_as_a_table_and_as_json(
    call: Callable[..., Result], tiny_recipe: Path, import_model: Callable[..., Artifact]
) -> None:
    base = import_model("llama")
    document = json.loads(call("plan", str(tiny_recipe), "--json").stdout)
    found = {entry["name"]: entry for entry in document["stages"]}
    assert found["base"]["state"] == "cached"
    assert found["base"]["artifact"] == base.id
    assert found["gptq"]["state"] == "undecided"
    table = call("plan", str(tiny_recipe)).stdout
    assert "calibration" in table
    assert "undecided" in table


def test_why_says_what_a_stage_waits_for_and_what_is_cached(
    call: Callable[..., Result], tiny_recipe: Path, import_model: Callable[..., Artifact]
) -> None:
    assert "has never run" in call("why", str(tiny_recipe), "base").stdout
    import_model("llama")
    assert "is cached" in call("why", str(tiny_recipe), "base").stdout
    assert "undecided: its key needs the results of calibration" in call("why", str(tiny_recipe), "pruned").stdout
    misspelt = call("why", str(tiny_recipe), "prund")
    assert misspelt.exit_code == 2
    assert "did you mean 'pruned'" in misspelt.stderr


def test_stages_lists_the_catalogue_and_every_parameter_of_one(call: Callable[..., Result]) -> None:
    everything = call("stages").stdout
    assert all(name in everything for name in CATALOGUE)
    one = call("stages", "quantize/gptq").stdout
    for name, info in CATALOGUE["quantize/gptq"].parameters.model_fields.items():
        assert f"{name}: {info.description}" in one
    assert "Frantar" in one


def test_every_parameter_of_every_stage_is_described() -> None:
    for stage in CATALOGUE.values():
        assert stage.summary, stage.name
        assert all(info.description for info in stage.parameters.model_fields.values()), stage.name


def test_ls_show_export_verify_and_du_work_on_a_store(
    call: Callable[..., Result], pruned: Artifact, store: Store, tmp_path: Path
) -> None:
    assert pruned.short in call("ls").stdout
    assert json.loads(call("ls", "--json").stdout)["tiny/pruned"]["artifact"] == pruned.id
    shown = json.loads(call("show", "tiny/pruned").stdout)
    assert shown["artifact"] == pruned.id
    assert shown["made_by"][0]["preimage"]["parameters"] == {"sparsity": 0.5}
    assert json.loads(call("show", pruned.id[:10]).stdout)["artifact"] == pruned.id
    assert call("export", "tiny/pruned", str(tmp_path / "out")).exit_code == 0
    checked = call("export", "tiny/pruned", str(tmp_path / "again"), "--check")
    assert checked.exit_code == 0
    assert "logits agree, by 0.0000 on average" in checked.stdout
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert "sound" in call("verify").stdout
    assert "2 artifacts" in call("du").stdout

    blob = next(iter(store.manifest(pruned).tensors.values())).blob
    Path(store.url, blob_path(blob)).write_bytes(b"damaged")
    damaged = call("verify")
    assert damaged.exit_code == 1
    assert "needed by" in damaged.stdout
    assert "tiny/pruned" in damaged.stdout


def test_a_quantized_checkpoint_is_exported_in_another_format_and_a_pruned_one_refused(
    call: Callable[..., Result], pruned: Artifact, run_stage: Callable[..., Artifact], tmp_path: Path
) -> None:
    quantized = run_stage("quantize/rtn", {"model": pruned}, group_size=32)
    asked = "--format", "compressed-tensors"
    assert call("export", quantized.short, str(tmp_path / "out"), *asked).exit_code == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    refused = call("export", "tiny/pruned", str(tmp_path / "none"), *asked)
    assert refused.exit_code == 2
    assert "has no format for pruned dense weights" in refused.stderr
    assert not (tmp_path / "none").exists()


def test_an_exported_adapter_says_which_checkpoint_to_export_with_it(
    call: Callable[..., Result],
    pruned: Artifact,
    import_model: Callable[..., Artifact],
    run_stage: Callable[..., Artifact],
    tmp_path: Path,
) -> None:
    adapter = run_stage("compensate/svd", {"model": pruned, "original": import_model("llama")}, rank=4)
    said = call("export", adapter.short, str(tmp_path / "out"))
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    assert f"the adapter of checkpoint {pruned.short}" in said.stderr
    assert json.loads(call("show", adapter.short).stdout)["base"] == pruned.id
    assert call("export", pruned.short, str(tmp_path / "base")).stderr == ""


def test_an_unknown_name_is_a_sentence_with_status_2(call: Callable[..., Result], pruned: Artifact) -> None:
    result = call("show", "tiny/prund")
    assert result.exit_code == 2
    assert "did you mean 'tiny/pruned'" in result.stderr
