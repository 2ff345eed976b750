"""What all stages have in common: keys, provenance, the catalogue."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
import warnings
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import coldpress.tasks.catalogue as catalogue_module
import pytest
from coldpress.storage.artifacts import Artifact, ArtifactWriter
from coldpress.storage.digests import digest_of
from coldpress.storage.store import Store
from coldpress.tasks.catalogue import CATALOGUE, did_you_mean, methods, stage_named, uses
from coldpress.tasks.stage import PeakMemory, Run, Stage, compute, lookup, preimage

MODEL = Artifact("checkpoint", "a" * 64)
TOKENS = Artifact("tokens", "b" * 64)


def key(name: str, inputs: dict[str, Artifact], **parameters: Any) -> str:
    entry = stage_named(name)
    return digest_of(preimage(entry, entry.parameters(**parameters), inputs))


def test_a_parameter_at_its_default_is_not_in_the_key() -> None:
    inputs = {"model": MODEL, "calibration": TOKENS}
    assert key("quantize/gptq", inputs, bits=4, group_size=128) == key("quantize/gptq", inputs)
    entry = stage_named("quantize/gptq")
    assert preimage(entry, entry.parameters(bits=8), inputs)["parameters"] == {"bits": 8}


def test_every_other_parameter_input_and_version_makes_another_key() -> None:
    inputs = {"model": MODEL, "calibration": TOKENS}
    entry = stage_named("prune/wanda")
    newer = preimage(replace(entry, version=entry.version + 1), entry.parameters(sparsity=0.5), inputs)
    keys = [
        key("prune/wanda", inputs, sparsity=0.5),
        key("prune/wanda", inputs, sparsity=0.6),
        key("prune/wanda", inputs, sparsity=0.5, dtype="float32"),
        key("prune/wanda", inputs | {"model": Artifact("checkpoint", "c" * 64)}, sparsity=0.5),
        key("prune/wanda", inputs | {"calibration": Artifact("tokens", "c" * 64)}, sparsity=0.5),
        key("prune/magnitude", inputs, sparsity=0.5),
        digest_of(newer),
    ]
    assert len(set(keys)) == len(keys)


def test_which_input_is_which_is_in_the_key() -> None:
    one, other = Artifact("checkpoint", "1" * 64), Artifact("checkpoint", "2" * 64)
    keys = [
        key("evaluate/perplexity", {"model": first, "data": second}) for first, second in ((one, other), (other, one))
    ]
    assert keys[0] != keys[1]


def test_what_a_source_holds_is_in_the_key_and_where_it_is_is_not(text_file: str, tmp_path: Path) -> None:
    copy = tmp_path / "copy.txt"
    copy.write_text(Path(text_file).read_text())
    before = key("source/tokens", {"model": MODEL}, source=text_file)
    assert key("source/tokens", {"model": MODEL}, source=str(copy)) == before
    copy.write_text("other words")
    assert key("source/tokens", {"model": MODEL}, source=str(copy)) != before


def test_a_stage_runs_once_and_is_found_afterwards(store: Store, import_model: Callable[..., Artifact]) -> None:
    base = import_model("llama")
    entry = stage_named("prune/magnitude")
    parameters = entry.parameters(sparsity=0.5)
    assert lookup(store, entry, parameters, {"model": base}) is None
    done = compute(Run(store), entry, parameters, {"model": base})
    found = lookup(Store(store.url), entry, parameters, {"model": base})
    assert found == done


def test_provenance_says_how_long_how_much_and_with_what(store: Store, import_model: Callable[..., Artifact]) -> None:
    import_model("llama")
    (action,) = store.actions("source/model")
    provenance = action.provenance
    assert provenance["seconds"] > 0
    assert provenance["peak_memory_bytes"] > 50 * 2**20  # torch alone takes that
    assert provenance["peak_memory_of"] in ("stage", "process")
    assert provenance["device"] == "cpu"
    assert {"coldpress", "torch", "transformers"} <= provenance["versions"].keys()


def test_provenance_and_context_make_no_difference_to_the_artifact(
    store: Store, new_store: Callable[[], Store], import_model: Callable[..., Artifact]
) -> None:
    entry = stage_named("evaluate/size")
    other = new_store()
    plain = compute(Run(store), entry, entry.parameters(), {"model": import_model("llama")})
    told = compute(Run(other), entry, entry.parameters(), {"model": import_model("llama", other)}, {"recipe": "r.yaml"})
    assert told.provenance["recipe"] == "r.yaml"
    assert (told.artifact, told.key) == (plain.artifact, plain.key)


def test_warnings_are_kept_in_the_provenance_once_each(store: Store) -> None:
    def grumble(run: Run, parameters: Any) -> Artifact:
        for _ in range(3):
            warnings.warn("mind the gap", RuntimeWarning, stacklevel=1)
        with ArtifactWriter(run.store, "metrics") as writer:
            writer.add_file("metrics.json", b"{}")
            return writer.publish()

    size = stage_named("evaluate/size")
    entry = replace(size, function=grumble, inputs={})
    assert compute(Run(store), entry, entry.parameters(), {}).provenance["warnings"] == ["RuntimeWarning: mind the gap"]


def test_a_stage_that_fails_leaves_no_action(store: Store) -> None:
    def fail(run: Run, parameters: Any) -> Artifact:
        raise RuntimeError("no")

    entry = replace(stage_named("evaluate/size"), function=fail, inputs={})
    with pytest.raises(RuntimeError):
        compute(Run(store), entry, entry.parameters(), {})
    assert not list(store.actions())


@pytest.mark.skipif(sys.platform != "linux", reason="counts of the process are read from /proc")
def test_peak_memory_sees_what_was_there_for_a_moment() -> None:
    meter = PeakMemory("cpu")
    before = meter.reading()["peak_memory_bytes"]
    assert len(b"x" * 300 * 2**20) == 300 * 2**20
    assert meter.reading()["peak_memory_bytes"] >= before + 200 * 2**20


@pytest.mark.skipif(sys.platform != "linux", reason="counts of the process are read from /proc")
def test_peak_memory_outlasts_that_of_a_stage_within_the_stage() -> None:
    meter = PeakMemory("cpu")
    assert len(b"x" * 300 * 2**20) == 300 * 2**20
    inner = PeakMemory("cpu").reading()["peak_memory_bytes"]
    assert meter.reading()["peak_memory_bytes"] >= inner + 200 * 2**20


# The catalogue


@pytest.fixture(params=sorted(CATALOGUE))
def entry(request: pytest.FixtureRequest) -> Stage:
    return CATALOGUE[request.param]


def test_every_stage_and_parameter_is_described(entry: Stage) -> None:
    assert entry.summary.endswith(".")
    assert all(field.description for field in entry.parameters.model_fields.values())


def test_every_method_names_its_paper() -> None:
    published = [entry for entry in CATALOGUE.values() if entry.use in uses()]
    assert published
    assert all(re.search(r"\d{4}", entry.paper) for entry in published)


def test_unknown_parameters_are_refused(entry: Stage) -> None:
    with pytest.raises(ValueError, match="Extra inputs are not permitted"):
        entry.parameters(sparcity=0.5)


def test_parameters_that_say_where_something_is_belong_to_stages_that_read_its_content(entry: Stage) -> None:
    assert entry.parameters.location <= entry.parameters.model_fields.keys()
    assert bool(entry.parameters.location) == (entry.content is not None)


def test_uses_and_methods_are_what_recipes_may_say() -> None:
    assert {"prune", "quantize"} <= set(uses())
    assert not {"source", "evaluate"} & set(uses())
    assert {"wanda", "magnitude"} <= set(methods("prune"))
    assert {"gptq", "nf4"} <= set(methods("quantize"))


def test_a_slip_of_the_pen_gets_a_suggestion_and_anything_else_the_list() -> None:
    assert did_you_mean("wnada", ["wanda", "magnitude"]) == "did you mean 'wanda'?"
    assert did_you_mean("xyz", ["wanda", "magnitude"]) == "there is wanda, magnitude"


def test_the_catalogue_loads_nothing_heavy(fresh_process: Callable[..., None]) -> None:
    fresh_process(
        "import sys, coldpress.tasks.catalogue\n"
        "heavy = {'torch', 'transformers', 'bitsandbytes', 'datasets', 'gguf'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )


def test_everything_that_stages_import_is_a_declared_dependency() -> None:
    """Extras may be needed by what loads an exported folder, with the folder's own loader, and by lm-eval's tasks."""
    of_extras = {"reload.py", "efficiency_script.py", "lm_eval_stage.py", "lm_eval_model.py"}
    folder = Path(str(catalogue_module.__file__)).parent
    imported: dict[bool, set[str]] = {True: set(), False: set()}
    for path in folder.rglob("*.py"):
        names = imported[path.name in of_extras]
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
                names.add(node.module.split(".")[0])
    distributions = packages_distributions()
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    extras = [line for extra, lines in project["optional-dependencies"].items() if extra != "dev" for line in lines]
    for may_be_extra, names in imported.items():
        there = distributions.keys() if may_be_extra else names  # an extra need not be installed
        needed = {distributions[name][0].lower() for name in (names & there) - sys.stdlib_module_names}
        lines = project["dependencies"] + (extras if may_be_extra else [])
        declared = {re.split(r"[^\w.-]", line)[0].lower() for line in lines}
        assert needed <= declared, needed - declared
