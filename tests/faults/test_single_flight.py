"""Several jobs that need the same stages: each stage is computed by one of them, whatever becomes of the others."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path

import pytest
from coldpress.storage.inspect import verify
from coldpress.storage.store import Store
from runs import artifacts, committed, finish, holders, kill_all, start, states, wait_for
from up_process import ids, undisturbed_ids

CLOCK_AN_HOUR_AHEAD = """\
import time
_time, _time_ns = time.time, time.time_ns
time.time = lambda: _time() + 3600
time.time_ns = lambda: _time_ns() + 3600 * 10**9
"""


@pytest.mark.parametrize("jobs", [2, pytest.param(8, marks=pytest.mark.long)])
def test_jobs_started_at_once_compute_each_stage_once(recipe: Path, server: str, tmp_path: Path, jobs: int) -> None:
    recipe.write_text(recipe.read_text() + "  nf4: {use: quantize, method: nf4, model: pruned}\n")
    store = str(tmp_path / "shared")
    (tmp_path / "ahead").mkdir()
    (tmp_path / "ahead/sitecustomize.py").write_text(CLOCK_AN_HOUR_AHEAD)
    ahead = {"PYTHONPATH": str(tmp_path / "ahead")}
    running = [start(recipe, store, PREFECT_API_URL=server, **(ahead if n % 2 else {})) for n in range(jobs)]
    documents = [finish(process) for process in running]
    computed = Counter(
        name for document in documents for name, state in states(document).items() if state == "computed"
    )
    assert computed == dict.fromkeys(["base", "calibration", "pruned", "gptq", "nf4"], 1)
    assert {state for document in documents for state in states(document).values()} == {"computed", "cached"}
    assert len({tuple(artifacts(document).items()) for document in documents}) == 1
    assert verify(Store(store)) == []
    assert list(Path(store).glob("leases/*/*")) == list(Path(store).glob("journals/*")) == []


def test_a_waiting_job_takes_over_from_one_that_is_killed_and_goes_on_from_its_journal(
    recipe: Path, server: str, undisturbed: Path, tmp_path: Path
) -> None:
    store = str(tmp_path / "shared")
    first = start(recipe, store, PREFECT_API_URL=server)
    wait_for(first, lambda: committed(store, "pruned") >= 2)
    second = start(recipe, store, PREFECT_API_URL=server)
    time.sleep(1)
    wait_for(first, lambda: committed(store, "gptq") >= 2)
    if second.pid in holders(store):  # it asked at the very moment between the first one's two stages
        first, second = second, first
    kill_all(first)
    after = finish(second)
    assert states(after)["gptq"] in ("resumed", "cached")
    (action,) = Store(store).actions("quantize/gptq")
    assert action.provenance["resumed"]["from_block"] >= 2
    assert len({attempt["run"] for attempt in action.provenance["attempts"]}) == 2
    assert ids(Path(store)) == undisturbed_ids(recipe, undisturbed)
