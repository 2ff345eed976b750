"""Runs that share two pretended devices, one of them killed: the others go on, and no device is lost."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from coldpress.flows.device_limits import limit_name
from coldpress.storage.inspect import verify
from coldpress.storage.store import Store
from runs import committed, finish, kill_all, start, wait_for

pytestmark = pytest.mark.long


def test_runs_share_devices_and_a_killed_one_gives_its_own_back(recipe: Path, server: str, tmp_path: Path) -> None:
    import httpx

    def active() -> list[int]:
        limits = [f"{server}/v2/concurrency_limits/{limit_name(device)}" for device in "01"]
        return [httpx.get(address, timeout=30).raise_for_status().json()["active_slots"] for address in limits]

    options = ("--device", "cpu", "--devices", "0,1")
    branches = "  nf4: {use: quantize, method: nf4, model: pruned}\n"
    recipe.write_text(recipe.read_text() + branches)
    stores = [str(tmp_path / name) for name in ("killed", "second", "third")]
    victim, *others = [start(recipe, store, *options, PREFECT_API_URL=server) for store in stores]
    wait_for(victim, lambda: committed(stores[0], "pruned") >= 1)
    assert victim.poll() is None
    kill_all(victim)
    documents = [finish(process) for process in others]
    again = finish(start(recipe, stores[0], *options, PREFECT_API_URL=server))
    ids = [{stage["name"]: stage["artifact"] for stage in document["stages"]} for document in (*documents, again)]
    assert ids[0] == ids[1] == ids[2]
    deadline = time.monotonic() + 120
    while active() != [0, 0]:
        assert time.monotonic() < deadline
        time.sleep(1)
    assert [verify(Store(store)) for store in stores] == [[], [], []]
