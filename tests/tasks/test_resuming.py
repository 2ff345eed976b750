"""A stage that dies or is stopped at any block goes on from there, to the artifact of an undisturbed run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from coldpress.storage.artifacts import Artifact, ArtifactWriter
from coldpress.storage.inspect import verify
from coldpress.storage.store import Action, Store
from coldpress.tasks.catalogue import stage_named
from coldpress.tasks.resuming import SavingPace
from coldpress.tasks.stage import Preempted, Run, compute

BLOCKS = 5
STAGES = {
    "prune/wanda": ("calibration", {"sparsity": 0.5}),
    "prune/magnitude": (None, {"sparsity": 0.5}),
    "prune/sparsegpt": ("calibration", {"sparsity": 0.5}),
    "prune/alps": ("calibration", {"pattern": "2:4"}),
    "prune/magnitude-sp": (None, {"sparsity": 0.5}),
    "prune/wanda-sp": ("calibration", {"sparsity": 0.5}),
    "quantize/gptq": ("calibration", {"group_size": 32}),
    "quantize/rtn": (None, {"group_size": 32}),
    "quantize/awq": ("calibration", {"bits": 3, "group_size": 32}),
    "statistics/owl": ("calibration", {}),
    "statistics/rmi": ("calibration", {}),
    "statistics/fluctuation": ("calibration", {}),
    "statistics/influence": ("calibration", {}),
    "statistics/removal": ("calibration", {}),
    "evaluate/perplexity": ("data", {}),
    "quantize/nf4": (None, {}),
    "quantize/int8": (None, {}),
    "quantize/sparsegpt-gptq": ("calibration", {"sparsity": 0.5, "group_size": 32}),
    "compensate/eora": ("calibration", {"rank": 4}),
    "compensate/svd": (None, {"rank": 4}),
}


class Killed(Exception):
    """Stands for the end of the process."""


@dataclass
class Attempt:
    """One attempt at a stage, which dies (or is asked to stop) at its report number `blocks`."""

    store: Store
    blocks: int = 10**6
    asked: bool = False
    done: int = 0
    said: list[tuple[str, int, int]] = field(default_factory=list)

    def progress(self, what: str, done: int, total: int) -> None:
        self.said.append((what, done, total))
        self.done = done
        if not self.asked and len(self.said) == self.blocks:
            raise Killed

    def run(self) -> Run:
        return Run(self.store, progress=self.progress, stop_asked=lambda: self.asked and len(self.said) >= self.blocks)


@pytest.fixture
def deep_model(import_model: Callable[..., Artifact]) -> Artifact:
    return import_model("llama", num_hidden_layers=BLOCKS)


@pytest.fixture
def attempt(
    store: Store, deep_model: Artifact, make_tokens: Callable[..., Artifact], run_stage: Callable[..., Artifact]
) -> Callable[[str, Attempt], Action]:
    tokens = make_tokens(deep_model)

    def begin(name: str, how: Attempt) -> Action:
        role, parameters = STAGES.get(name, ("calibration", {}))
        entry = stage_named(name)
        inputs = {"model": deep_model, **({role: tokens} if role else {})}
        if "original" in entry.inputs:
            inputs |= {"model": run_stage("quantize/nf4", {"model": deep_model}), "original": deep_model}
        return compute(how.run(), entry, entry.parameters(**parameters), inputs)

    return begin


@pytest.fixture(params=["activations are always saved", "activations are never saved"])
def saving(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    always = request.param == "activations are always saved"
    monkeypatch.setattr(SavingPace, "due", lambda self: always)
    return always


@pytest.mark.parametrize("asked", [False, True], ids=["killed", "asked to stop"])
@pytest.mark.parametrize("dies_after", range(1, BLOCKS))
@pytest.mark.parametrize("name", STAGES)
def test_a_stage_goes_on_where_it_ended(
    name: str,
    dies_after: int,
    asked: bool,
    saving: bool,
    store: Store,
    attempt: Callable[[str, Attempt], Action],
) -> None:
    with pytest.raises(Preempted if asked else Killed):
        attempt(name, Attempt(store, dies_after, asked))
    assert list(store.actions(name)) == []
    second = Attempt(store)
    resumed = attempt(name, second)
    calibrated = STAGES[name][0] is not None
    # Killed in the report of a block: it is committed, its activations not yet saved.
    unsaved = 0 if asked or not calibrated else 1 if saving else dies_after
    note = resumed.provenance["resumed"]
    assert (note["from_block"], note["of"], note["recomputed_blocks"]) == (dies_after, BLOCKS, unsaved)
    assert list(store.files.list("journals")) == []
    assert verify(store) == []

    store.files.delete(f"actions/{name}/{resumed.key}")
    undisturbed = attempt(name, Attempt(store))
    assert "resumed" not in undisturbed.provenance
    assert resumed.artifact == undisturbed.artifact
    assert resumed.provenance.get("sparsity") == undisturbed.provenance.get("sparsity")


def test_death_at_every_block_one_after_the_other_still_ends_in_the_same_artifact(
    store: Store, attempt: Callable[[str, Attempt], Action]
) -> None:
    for _ in range(BLOCKS - 2):
        with pytest.raises(Preempted):
            attempt("quantize/gptq", Attempt(store, 2, asked=True))  # the first report says where it goes on
    resumed = attempt("quantize/gptq", Attempt(store))
    store.files.delete(f"actions/quantize/gptq/{resumed.key}")
    assert attempt("quantize/gptq", Attempt(store)).artifact == resumed.artifact


def test_a_stage_killed_between_its_last_block_and_publishing_computes_no_block_again(
    store: Store, attempt: Callable[[str, Attempt], Action]
) -> None:
    with pytest.raises(Killed):
        attempt("prune/wanda", Attempt(store, BLOCKS))
    second = Attempt(store)
    resumed = attempt("prune/wanda", second)
    assert [done for _, done, _ in second.said] == [BLOCKS]
    assert resumed.provenance["resumed"]["recomputed_blocks"] == 0


@pytest.mark.parametrize("name", [*STAGES, "statistics/gradients", "statistics/taylor"])
def test_a_stage_that_could_not_publish_what_it_finished_can_the_next_time(
    name: str, store: Store, attempt: Callable[[str, Attempt], Action], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: ArtifactWriter, **settings: Any) -> Artifact:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(ArtifactWriter, "publish", full)
        with pytest.raises(Killed):
            attempt(name, Attempt(store))
    resumed = attempt(name, Attempt(store))
    store.files.delete(f"actions/{name}/{resumed.key}")
    assert attempt(name, Attempt(store)).artifact == resumed.artifact


def test_a_stop_during_the_calibration_pass_is_heeded_before_the_block_is_done(
    store: Store, attempt: Callable[[str, Attempt], Action], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []

    def asked(self: Run) -> None:
        calls.append(1)
        if len(calls) == 3:  # before the first windows of the second block
            raise Preempted("stop")

    with monkeypatch.context() as patch:
        patch.setattr(Run, "stop_if_asked", asked)
        with pytest.raises(Preempted):
            attempt("prune/wanda", Attempt(store))
    second = Attempt(store)
    resumed = attempt("prune/wanda", second)
    note = resumed.provenance["resumed"]
    assert (note["from_block"], note["recomputed_blocks"]) == (1, 0)
    store.files.delete(f"actions/prune/wanda/{resumed.key}")
    assert attempt("prune/wanda", Attempt(store)).artifact == resumed.artifact
