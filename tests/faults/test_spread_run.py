"""One recipe on several workers that share nothing but the store and the server: its branches are shared between them.

Each worker has a home, a folder and a pretended device of its own, by which it is told apart in what the computing
processes write down (`watched/sitecustomize.py`).
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from coldpress.storage.inspect import verify
from coldpress.storage.store import Store
from up_process import Up, end, eventually, ids, undisturbed_ids

STAGES = 6  # the model, what all branches start from, and four branches


@pytest.fixture
def recipe(tiny_model_folder: Callable[..., str], tmp_path: Path) -> Path:
    model = tiny_model_folder("llama", num_hidden_layers=6)
    branches = "".join(
        f"  rtn{number}: {{use: quantize, method: rtn, bits: {bits}, group_size: {size}, model: pruned}}\n"
        for number, (bits, size) in enumerate(itertools.product((4, 8), (32, 64)))
    )
    path = tmp_path / "spread.yaml"
    path.write_text(
        f"name: spread\nmodel: {{source: {model}}}\nstages:\n"
        f"  pruned: {{use: prune, method: magnitude, model: base, sparsity: 0.5}}\n{branches}"
    )
    return path


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[tuple[Up, Up]]:
    """The first has the server."""
    (tmp_path / "log").touch()
    watched = {"PYTHONPATH": str(Path(__file__).with_name("watched")), "WATCHED": str(tmp_path), "WATCHED_PAUSE": "0.5"}
    folders = [tmp_path / name for name in ("first", "second")]
    for folder in folders:
        folder.mkdir()
    first = Up(folders[0], "--devices", "0", **watched)
    address = first.environment_of_client["PREFECT_API_URL"]
    second = Up(folders[1], "--no-server", "--devices", "1", **watched, PREFECT_API_URL=address)
    yield first, second
    for machine in (second, first):
        if machine.process.poll() is None:
            end(machine)


def events(folder: Path, name: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "log").read_text().splitlines()]
    return [line for line in lines if line["event"] == name]


def branches_on(folder: Path, device: str) -> list[dict[str, Any]]:
    """The branches that were begun on a worker's device, oldest first."""
    begun = events(folder, "computes")
    return [line for line in begun if line["node"].startswith("rtn") and line["device"] == device]


def submit(first: Up, recipe: Path) -> dict[str, str]:
    """Run id -> flow run id of the two parts. Returns when each is held in the middle of a branch."""
    first.submit(recipe, "--store", str(recipe.parent / "shared"), "--device", "cpu", "--spread", "2")
    found = first.ask("POST", "/flow_runs/filter", flows={"name": {"any_": ["coldpress"]}})
    parts = {part["parameters"]["run"]: part["id"] for part in found}
    lead, other = sorted(parts)
    assert other == f"{lead}-2"
    folder = recipe.parent
    eventually(lambda: any(line["node"] == "pruned" for line in events(folder, "published")), 240)
    (folder / "hold").touch()
    eventually(lambda: bool(branches_on(folder, "0") and branches_on(folder, "1")), 240)
    return parts


def test_workers_share_the_branches_and_compute_each_stage_once(
    machines: tuple[Up, Up], recipe: Path, tmp_path: Path
) -> None:
    first, _ = machines
    parts = submit(first, recipe)
    (tmp_path / "hold").unlink()
    eventually(lambda: [first.state(part) for part in parts.values()] == ["Completed"] * 2, 240, pause=0.5)

    assert Counter(line["key"] for line in events(tmp_path, "published")).most_common(1)[0][1] == 1
    assert len(events(tmp_path, "published")) == len(events(tmp_path, "computes")) == STAGES
    assert events(tmp_path, "shared") == []

    store = Store(str(tmp_path / "shared"))
    assert {action.provenance["run"] for action in store.actions("quantize/rtn")} == set(parts)
    assert ids(tmp_path / "shared") == undisturbed_ids(recipe, tmp_path)
    assert verify(store) == []
    for run in parts:  # each knows the whole result
        assert {stage["state"] for stage in store.runs()[run]["stages"]} == {"cached", "computed"}


@pytest.mark.long
def test_when_one_machine_dies_another_finishes_its_branches_too(
    machines: tuple[Up, Up], recipe: Path, tmp_path: Path
) -> None:
    first, second = machines
    parts = submit(first, recipe)

    lost = branches_on(tmp_path, "1")[-1]["key"]
    for process in second.processes():
        process.kill()
    (tmp_path / "hold").unlink()
    survivor = parts[branches_on(tmp_path, "0")[0]["run"]]
    eventually(lambda: first.state(survivor) == "Completed", 120, pause=0.5)
    assert Counter(line["key"] for line in events(tmp_path, "published"))[lost] == 1
    assert ids(tmp_path / "shared") == undisturbed_ids(recipe, tmp_path)
    # What died is noticed by the missing heartbeat, comes to the machine that is left, and finds all done.
    eventually(lambda: [first.state(part) for part in parts.values()] == ["Completed"] * 2, 240, pause=0.5)
    assert len(events(tmp_path, "published")) == STAGES
