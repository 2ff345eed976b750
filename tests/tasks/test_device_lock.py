"""Measurements alone on their device: who waits for whom, with real processes; and which hardware keys name."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from coldpress.flows.plan import compare
from coldpress.storage.artifacts import Artifact, ArtifactWriter
from coldpress.storage.digests import digest_of
from coldpress.storage.errors import ColdpressError
from coldpress.storage.leases import Lease
from coldpress.storage.store import Store
from coldpress.tasks import hardware
from coldpress.tasks.catalogue import CATALOGUE, stage_named
from coldpress.tasks.device_lock import device_lock
from coldpress.tasks.stage import Preempted, Run, Stage, StageError, compute, lookup, preimage

MODEL = Artifact("checkpoint", "a" * 64)

# Says "waiting" once if it has to, "holds" when it has the device, and keeps it until its input ends.
HOLDER = """
import sys
from coldpress.tasks.device_lock import device_lock
said = []
def waiting():
    if not said:
        said.append(print("waiting", flush=True))
with device_lock("cpu", alone=sys.argv[1] == "alone", waiting=waiting):
    print("holds", flush=True)
    sys.stdin.read()
"""


class Holder:
    """Another process that takes the device."""

    def __init__(self, how: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, how], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def says(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def end(self) -> None:
        self.process.kill()  # -9: nobody tidies up
        self.process.communicate()


@pytest.fixture
def other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Holder]]:
    """`other("shared")`, `other("alone")`: a process that takes the CPU, whose locks are this test's own."""
    monkeypatch.setenv("COLDPRESS_LOCKS", str(tmp_path))
    started: list[Holder] = []

    def start(how: str) -> Holder:
        started.append(Holder(how))
        return started[-1]

    yield start
    for holder in started:
        holder.end()


class _Waited(Exception):
    pass


def free(*, alone: bool) -> bool:
    """Whether the device can be had at once."""

    def waiting() -> None:
        raise _Waited

    try:
        with device_lock("cpu", alone=alone, waiting=waiting):
            return True
    except _Waited:
        return False


def test_computing_stages_share_a_device_and_a_measurement_has_it_alone(other: Callable[[str], Holder]) -> None:
    assert free(alone=True)
    sharing = other("shared")
    assert sharing.says() == "holds"
    assert free(alone=False)
    assert not free(alone=True)
    sharing.end()
    measuring = other("alone")
    assert measuring.says() == "holds"
    assert not free(alone=False)
    assert not free(alone=True)
    measuring.end()  # by kill -9
    assert free(alone=True)


def test_a_measurement_waits_for_who_is_there_and_those_who_come_later_wait_for_it(
    other: Callable[[str], Holder],
) -> None:
    sharing = other("shared")
    assert sharing.says() == "holds"
    measuring = other("alone")
    assert measuring.says() == "waiting"
    assert not free(alone=False)  # or it could be kept out for ever
    sharing.end()
    assert measuring.says() == "holds"


def test_devices_are_taken_one_by_one(other: Callable[[str], Holder]) -> None:
    assert other("alone").says() == "holds"
    with device_lock("mps", alone=True, waiting=lambda: pytest.fail("another device is free")):
        pass


def published(run: Run) -> Artifact:
    with ArtifactWriter(run.store, "metrics") as writer:
        writer.add_file("metrics.json", b"{}")
        return writer.publish()


def entry_of(function: Callable[..., Artifact], *, alone: bool = False) -> Stage:
    return replace(stage_named("evaluate/size"), function=function, inputs={}, alone=alone)


def test_a_stage_within_a_stage_does_not_wait_for_a_measurement_that_waits_for_both(
    store: Store, other: Callable[[str], Holder]
) -> None:
    def inner(run: Run, parameters: Any) -> Artifact:
        return published(run)

    def outer(run: Run, parameters: Any) -> Artifact:
        assert other("alone").says() == "waiting"
        nested = replace(run, progress=lambda *report: pytest.fail("it waits for itself"))
        parts = replace(entry_of(inner), method="inner")
        return compute(nested, parts, parts.parameters(), {}).artifact

    entry = entry_of(outer)
    assert compute(Run(store), entry, entry.parameters(), {}).artifact.kind == "metrics"


@pytest.mark.parametrize("alone", [True, False])
def test_a_stage_says_that_it_waits_and_heeds_the_request_to_stop(
    alone: bool, store: Store, other: Callable[[str], Holder]
) -> None:
    assert other("alone").says() == "holds"
    reports: list[tuple[str, int, int]] = []
    run = Run(store, progress=lambda *report: reports.append(report), stop_asked=lambda: len(reports) == 2)
    entry = entry_of(lambda run, parameters: pytest.fail("it must not begin"), alone=alone)
    with pytest.raises(Preempted):
        compute(run, entry, entry.parameters(), {})
    assert reports == [("waiting until the device is free", 0, 1)] * 2


def test_a_measurement_holds_the_device_while_it_runs(store: Store, other: Callable[[str], Holder]) -> None:
    def measure(run: Run, parameters: Any) -> Artifact:
        assert not free(alone=False)
        return published(run)

    entry = entry_of(measure, alone=True)
    compute(Run(store), entry, entry.parameters(), {})
    assert free(alone=True)


def test_locks_that_cannot_be_written_are_a_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("COLDPRESS_LOCKS", str(tmp_path / "nowhere"))
    with pytest.raises(ColdpressError, match=r"can't be opened .*; name a folder .* in COLDPRESS_LOCKS"):
        free(alone=False)


# Hardware

TWO_GPUS = """\
GPU 0: NVIDIA A100-SXM4-40GB (UUID: GPU-aaaa)
GPU 1: Tesla T4 (UUID: GPU-bbbb)
"""
SLICED = """\
GPU 0: NVIDIA A100-SXM4-40GB (UUID: GPU-aaaa)
  MIG 1g.5gb      Device  0: (UUID: MIG-1111)
  MIG 2g.10gb     Device  1: (UUID: MIG-2222)
GPU 1: Tesla T4 (UUID: GPU-bbbb)
"""


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """`driver(text)`: what nvidia-smi lists from now on."""
    hardware._all_gpus.cache_clear()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    script = tmp_path / "nvidia-smi"

    def install(text: str) -> None:
        script.write_text(f"#!/bin/sh\ncat <<'END'\n{text}END\n")
        script.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    yield install
    hardware._all_gpus.cache_clear()


@pytest.mark.parametrize(
    ("listed", "visible", "names"),
    [
        (TWO_GPUS, None, ["NVIDIA A100-SXM4-40GB", "Tesla T4"]),
        (TWO_GPUS, "1", ["Tesla T4"]),
        (TWO_GPUS, "GPU-bb, 0", ["Tesla T4", "NVIDIA A100-SXM4-40GB"]),
        (TWO_GPUS, "0,7,1", ["NVIDIA A100-SXM4-40GB"]),
        (TWO_GPUS, "", []),
        (SLICED, None, ["NVIDIA A100-SXM4-40GB MIG 1g.5gb", "Tesla T4"]),
        (SLICED, "MIG-2222", ["NVIDIA A100-SXM4-40GB MIG 2g.10gb"]),
    ],
)
def test_gpus_are_those_that_cuda_shows(
    listed: str, visible: str | None, names: list[str], driver: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    driver(listed)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert [gpu.name for gpu in hardware.visible_gpus()] == names


def test_a_device_is_locked_by_what_it_is_and_described_by_its_kind(
    driver: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    driver(TWO_GPUS)
    assert hardware.describe("cuda:1").startswith("Tesla T4, ")
    assert hardware.describe("cpu") in hardware.describe("cuda")
    second = hardware.device_id("cuda:1")
    assert second != hardware.device_id("cuda")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert hardware.device_id("cuda:0") == hardware.device_id("cuda") == second


def test_auto_is_a_gpu_only_where_torch_can_use_one(
    driver: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hardware, "_torch_knows_cuda", lambda: True)
    monkeypatch.setenv("PATH", "")
    assert hardware.resolve_device("auto") == "cpu"
    hardware._all_gpus.cache_clear()
    monkeypatch.undo()
    driver(TWO_GPUS)
    monkeypatch.setattr(hardware, "_torch_knows_cuda", lambda: False)
    assert hardware.resolve_device("auto") == "cpu"
    monkeypatch.setattr(hardware, "_torch_knows_cuda", lambda: True)
    assert hardware.resolve_device("auto") == "cuda"


def test_a_gpu_without_a_name_is_a_sentence(driver: Callable[[str], None]) -> None:
    driver("")
    with pytest.raises(ColdpressError, match=r"which GPU cuda:1 is can't be told: nvidia-smi shows 0"):
        hardware.describe("cuda:1")
    with pytest.raises(ColdpressError, match=r"there is no device 'cuda:one'"):
        hardware.describe("cuda:one")


def test_hardware_and_versions_are_in_the_key_of_measurements_only(
    driver: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    driver(TWO_GPUS)
    for entry in CATALOGUE.values():
        assert entry.alone == (entry.name == "evaluate/latency")
    size, latency = stage_named("evaluate/size"), stage_named("evaluate/latency")
    assert preimage(size, size.parameters(), {"model": MODEL}, "cpu") == preimage(
        size, size.parameters(), {"model": MODEL}, "cuda"
    )
    images = [preimage(latency, latency.parameters(), {"model": MODEL}, device) for device in ("cpu", "cuda", "cuda:1")]
    assert len({digest_of(image) for image in images}) == 3
    assert [difference.field for difference in compare(images[1], images[0])] == ["hardware.machine"]
    monkeypatch.setattr(hardware, "version", lambda name: "9.9")
    newer = preimage(latency, latency.parameters(), {"model": MODEL}, "cpu")
    assert "hardware.versions.torch" in [difference.field for difference in compare(newer, images[0])]


def test_a_result_of_another_machine_is_none_for_this_one(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = entry_of(lambda run, parameters: published(run), alone=True)
    monkeypatch.setattr(hardware, "_processor", lambda: "a faster one")
    compute(Run(store), entry, entry.parameters(), {})
    assert lookup(store, entry, entry.parameters(), {}, "cpu") is not None
    monkeypatch.setattr(hardware, "_processor", lambda: "a slower one")
    assert lookup(store, entry, entry.parameters(), {}, "cpu") is None


def test_what_was_planned_for_other_hardware_is_not_measured_here(store: Store) -> None:
    entry = entry_of(lambda run, parameters: pytest.fail("it must not begin"), alone=True)
    with pytest.raises(StageError, match=r"was planned for other hardware than cpu"):
        compute(Run(store), entry, entry.parameters(), {}, lease=Lease("f" * 64, 1, "token"))


def test_telling_the_hardware_imports_nothing_heavy(fresh_process: Callable[..., None]) -> None:
    fresh_process(
        "import sys\n"
        "from coldpress.tasks.hardware import device_id, hardware_id\n"
        "hardware_id('auto'), device_id('auto')\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
