"""Slots of a run, and devices that several runs share. A device is pretended: what computes is the CPU."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from coldpress.flows.cli import main
from coldpress.flows.device_limits import device_of, limit_name
from coldpress.flows.slots import DeviceLost, Slots, check_devices
from coldpress.flows.submitted import worker_slots
from coldpress.flows.worker import InProcess, Worker, WorkerDied
from coldpress.storage.errors import ColdpressError
from coldpress.tasks.catalogue import stage_named
from coldpress.tasks.stage import Preempted

COMPUTES, READS = stage_named("prune/wanda"), stage_named("source/model")


def silent(text: str) -> None:
    """Nobody listens to what a stage waits for."""


class Place(InProcess):
    """A computing process, as far as slots know it."""

    def __init__(self, device: str | None) -> None:
        super().__init__("cpu")
        self.visible = device
        self.asked_to_stop = False
        self.dead = False

    def preempt(self) -> None:
        self.asked_to_stop = True

    def kill(self) -> None:
        self.dead = True


class Limits:
    """A server on which other runs have the devices `taken`."""

    def __init__(self, *taken: str) -> None:
        self.taken = set(taken)
        self.lost: dict[str, Callable[[], None]] = {}

    def acquire(self, device: str, lost: Callable[[], None]) -> Any:
        if device in self.taken:
            return None
        self.taken.add(device)
        self.lost[device] = lost
        return device

    def release(self, lease: Any) -> None:
        self.taken.remove(lease)


def at_once(slots: Slots, jobs: int) -> tuple[int, set[Any]]:
    """The most stages that were computed at a time when many wanted to be, and the devices they used."""
    lock, running, most, used = threading.Lock(), 0, 0, set()

    def job() -> None:
        nonlocal running, most
        with slots.taken(COMPUTES, silent) as place:
            with lock:
                assert place not in at_work
                at_work.append(place)
                running += 1
                most = max(most, running)
                used.add(place.visible)  # type: ignore[union-attr]
            time.sleep(0.02)
            with lock:
                at_work.remove(place)
                running -= 1

    at_work: list[Any] = []
    threads = [threading.Thread(target=job) for _ in range(jobs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return most, used


def test_as_many_stages_are_computed_at_a_time_as_there_are_slots() -> None:
    assert at_once(Slots(Place, 3), 12) == (3, {None})
    assert at_once(Slots(Place, 2, ("0", "1", "2")), 12)[0] == 2
    assert at_once(Slots(Place, 3, ("0", "1", "2")), 12) == (3, {"0", "1", "2"})


def test_when_nothing_is_to_be_computed_a_process_starts_only_for_a_stage_that_wants_one() -> None:
    started: list[str | None] = []

    def start(device: str | None) -> Place:
        started.append(device)
        return Place(device)

    slots = Slots(start, 1, expected=False)
    assert started == []
    with slots.taken(COMPUTES, silent) as place:
        assert started == [None]
    with slots.taken(COMPUTES, silent) as again:
        assert again is place
    slots.kill()
    assert place.dead


def test_what_only_reads_takes_no_device() -> None:
    slots = Slots(Place, 1, ("0",))
    with slots.taken(COMPUTES, silent) as computing, slots.taken(READS, silent) as reading:
        assert (computing.visible, reading.visible) == ("0", None)  # type: ignore[union-attr]


def test_a_device_that_another_run_has_is_left_alone_and_waited_for_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coldpress.flows.slots.SECONDS_BETWEEN_TRIES", 0.01)
    limits = Limits("0")
    slots = Slots(Place, 2, ("0", "1"), limits)  # type: ignore[arg-type]
    with slots.taken(COMPUTES, silent) as first:
        assert first.visible == "1"  # type: ignore[union-attr]
        said: list[str] = []

        def told(text: str) -> None:
            said.append(text)
            limits.taken.discard("0")

        with slots.taken(COMPUTES, told) as second:
            assert second.visible == "0"  # type: ignore[union-attr]
        assert set(said) == {"waiting for device 0"}
    assert limits.taken == set()


def test_a_stage_that_loses_its_device_stops_and_starts_again_in_a_new_process() -> None:
    limits = Limits()
    slots = Slots(Place, 1, ("0",), limits)  # type: ignore[arg-type]
    with slots.taken(COMPUTES, silent) as first:
        pass

    def compute_and_lose() -> None:
        with slots.taken(COMPUTES, silent):
            limits.lost["0"]()
            assert first.asked_to_stop  # type: ignore[union-attr]
            raise Preempted("stopped")

    with pytest.raises(DeviceLost, match="device 0 went to another run"):
        compute_and_lose()
    assert first.dead  # type: ignore[union-attr]
    with slots.taken(COMPUTES, silent) as again:
        assert again is not first


def test_a_process_that_was_asked_to_stop_too_late_is_replaced_too() -> None:
    """Its stage was done; the next one would be taken for pre-empted."""
    limits = Limits()
    slots = Slots(Place, 1, ("0",), limits)  # type: ignore[arg-type]
    with slots.taken(COMPUTES, silent) as first:
        limits.lost["0"]()
    with slots.taken(COMPUTES, silent) as again:
        assert again is not first
    assert first.dead  # type: ignore[union-attr]


def test_stages_that_wait_for_a_device_do_not_wake_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coldpress.flows.slots.SECONDS_BETWEEN_TRIES", 600.0)
    slots = Slots(Place, 1, ("0",), Limits("0"))  # type: ignore[arg-type]
    said: list[str] = []

    def wait() -> None:
        with pytest.raises(Preempted), slots.taken(COMPUTES, said.append):
            pass

    threads = [threading.Thread(target=wait) for _ in range(3)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 60
    while len(said) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(0.2)
    slots.stop()
    for thread in threads:
        thread.join()
    assert len(said) == 3


def test_a_process_that_died_is_replaced_and_its_slot_stays() -> None:
    slots = Slots(Place, 1)
    with pytest.raises(WorkerDied), slots.taken(COMPUTES, silent) as place:
        raise WorkerDied("killed")
    with slots.taken(COMPUTES, silent) as again:
        assert again is not place


def test_a_process_that_was_left_in_the_middle_of_a_stage_is_ended_lest_the_next_one_gets_its_answer() -> None:
    slots = Slots(Place, 1)
    with pytest.raises(KeyError), slots.taken(COMPUTES, silent) as place:
        raise KeyError("of the run's own")
    assert place.dead  # type: ignore[union-attr]
    with pytest.raises(ColdpressError), slots.taken(COMPUTES, silent) as again:
        raise ColdpressError("what the stage answered")
    assert again is not place
    assert not again.dead  # type: ignore[union-attr]


def test_stopping_frees_who_waits_and_asks_who_computes() -> None:
    slots = Slots(Place, 1)
    ended: list[BaseException] = []

    def wait_for_a_slot() -> None:
        with pytest.raises(Preempted) as caught, slots.taken(COMPUTES, silent):
            pass
        ended.append(caught.value)

    with slots.taken(COMPUTES, silent) as place:
        thread = threading.Thread(target=wait_for_a_slot)
        thread.start()
        slots.stop()
        thread.join(10)
    assert "not begun" in str(ended[0])
    assert place.asked_to_stop  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("devices", "slots", "error"),
    [
        ("0,,1", None, "write numbers or ids as in CUDA_VISIBLE_DEVICES"),
        ("0,0", None, "a device is there twice"),
        ("0,1", 3, "--slots 3 are more than the 2 devices"),
    ],
)
def test_devices_that_cannot_be_are_a_sentence(devices: str, slots: int | None, error: str) -> None:
    with pytest.raises(ColdpressError, match=error):
        check_devices(devices, slots)


def test_devices_and_slots_have_defaults_for_each_other() -> None:
    assert check_devices(None, None) == ((), 1)
    assert check_devices(None, 4) == ((), 4)
    assert check_devices("0, GPU-8f6d", None) == (("0", "GPU-8f6d"), 2)
    assert check_devices("0,1", 1) == (("0", "1"), 1)


def test_a_submitted_run_has_the_devices_of_the_machine_it_comes_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLDPRESS_DEVICES", "2,3")
    assert worker_slots() == (("2", "3"), 2)
    monkeypatch.setenv("COLDPRESS_SLOTS", "one")
    with pytest.raises(ColdpressError, match="COLDPRESS_SLOTS is 'one'; write a number"):
        worker_slots()


def test_wrong_devices_are_refused_before_anything_runs(tiny_recipe: Path) -> None:
    ended = CliRunner().invoke(main, ["run", str(tiny_recipe), "--devices", "0,0"])
    assert ended.exit_code == 2
    assert "a device is there twice" in ended.output
    ended = CliRunner().invoke(main, ["run", str(tiny_recipe), "--devices", "0", "--store", "memory://here"])
    assert ended.exit_code == 2
    assert "only one process sees a memory:// store" in ended.output


def test_names_of_limits_tell_machine_and_device() -> None:
    assert device_of(limit_name("GPU-8f", "node 7")) == ("node 7", "GPU-8f")
    assert device_of("somebody else's") is None


def test_a_computing_process_sees_its_device_alone() -> None:
    worker = Worker("cpu", visible="3")
    environment = Path(f"/proc/{worker._process.pid}/environ")
    # Empty for a moment, while the program is being loaded.
    while not (seen := environment.read_text()) and worker._process.poll() is None:
        time.sleep(0.01)
    worker.kill()
    assert "CUDA_VISIBLE_DEVICES=3" in seen.split("\0")


@pytest.fixture
def taker(prefect_server: None, tmp_path: Path) -> Iterator[Callable[[str, int], subprocess.Popen[str]]]:
    """`taker(devices, rounds)`: a process that takes devices again and again."""
    from prefect.settings import PREFECT_API_URL

    script = Path(__file__).with_name("device_taker.py")
    environment = {**os.environ, "PREFECT_API_URL": str(PREFECT_API_URL.value())}
    started = []

    def start(devices: str, rounds: int) -> subprocess.Popen[str]:
        command = [sys.executable, str(script), str(tmp_path), devices, str(rounds)]
        started.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        )
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def active(*devices: str) -> list[int]:
    """How many slots the server counts as taken."""
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        limits = [client.read_global_concurrency_limit_by_name(limit_name(device)) for device in devices]
    return [limit.active_slots for limit in limits]


def test_no_two_processes_get_a_device_and_each_is_given_back(taker: Callable[..., Any]) -> None:
    processes = [taker("a,b", 5) for _ in range(3)]
    ended = [(process.communicate(timeout=120), process.returncode) for process in processes]
    assert [status for _, status in ended] == [0, 0, 0], ended
    got = [line for (output, _), _ in ended for line in output.splitlines() if line.startswith("has")]
    assert len(got) == 15
    assert active("a", "b") == [0, 0]


def test_who_finds_a_device_taken_gets_the_other(taker: Callable[..., Any]) -> None:
    from coldpress.flows.device_limits import DeviceLimits

    limits = DeviceLimits(["a", "b"])
    lease = limits.acquire("a", lambda: None)
    assert lease is not None
    said, _ = taker("a,b", 1).communicate(timeout=120)
    limits.release(lease)
    assert "has b" in said.splitlines()
    assert active("a", "b") == [0, 0]
