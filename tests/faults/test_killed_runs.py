"""Runs of the command line whose processes are really killed, or asked to stop, in the middle of a stage."""

from __future__ import annotations

import json
import random
import signal
import time
from pathlib import Path

import pytest
from coldpress.storage.inspect import verify
from coldpress.storage.store import Store
from runs import BLOCKS, committed, finish, kill_all, start, states, wait_for
from up_process import ids, undisturbed_ids


def test_killed_runs_go_on_from_their_last_block_and_end_in_the_same_artifacts(
    recipe: Path, server: str, undisturbed: Path, tmp_path: Path
) -> None:
    store = str(tmp_path / "killed")
    chance = random.Random(0)
    for node in ("pruned", "gptq"):
        blocks = chance.randrange(1, BLOCKS // 2)
        # Killed once with the temporary server that it has without another, once with a server that lives on.
        process = start(recipe, store, **({"PREFECT_API_URL": server} if node == "gptq" else {}))
        wait_for(process, lambda node=node, blocks=blocks: committed(store, node) >= blocks)  # type: ignore[misc]
        assert process.poll() is None, process.communicate()
        kill_all(process)
        assert verify(Store(store)) == []
    after = finish(start(recipe, store, PREFECT_API_URL=server))
    assert verify(Store(store)) == []
    assert states(after) == {"base": "cached", "calibration": "cached", "pruned": "cached", "gptq": "resumed"}
    for stage in ("prune/wanda", "quantize/gptq"):
        (action,) = Store(store).actions(stage)
        assert 0 < action.provenance["resumed"]["from_block"] <= BLOCKS
    assert ids(Path(store)) == undisturbed_ids(recipe, undisturbed)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_asked_to_stop_is_pre_empted_and_goes_on_later(
    recipe: Path, server: str, tmp_path: Path, number: signal.Signals
) -> None:
    store = str(tmp_path / "stopped")
    # A terminal's Ctrl-C comes to a run with a temporary server, a batch system's SIGTERM to one that shares another.
    process = start(recipe, store, **({"PREFECT_API_URL": server} if number == signal.SIGTERM else {}))
    wait_for(process, lambda: committed(store, "pruned") >= 3)
    for _ in range(50):  # launchers signal the process, and its group: the second comes while the first is heeded
        process.send_signal(number)
        time.sleep(0.0005)
    output, said = process.communicate(timeout=60)
    assert process.returncode == 128 + number, said
    assert "the same command goes on from there" in said
    assert states(json.loads(output)) == {
        "base": "computed",
        "calibration": "computed",
        "pruned": "pre-empted",
        "gptq": "skipped",
    }
    assert verify(Store(store)) == []

    again = finish(start(recipe, store, PREFECT_API_URL=server))
    assert states(again)["pruned"] == "resumed"
    note = next(Store(store).actions("prune/wanda")).provenance["resumed"]
    assert note["from_block"] >= 3
    assert note["recomputed_blocks"] == 0
