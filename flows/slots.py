"""Who computes where: the computing processes of a run, and the devices that runs share.

A run has slots; a stage takes one while it is computed. With named devices (`--devices 0,1`) each slot stands for one:
its process sees no other (`CUDA_VISIBLE_DEVICES`), and where a Prefect server is configured the device is also taken
there (`device_limits.py`), so that no two runs of the machine compute on it. Stages that need no device then go to a
process of their own that sees none.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..storage.errors import ColdpressError
from ..storage.leases import LeaseLost
from ..tasks.hardware import absent_gpus
from ..tasks.stage import Preempted, Stage
from .worker import InProcess, Worker, WorkerDied

if TYPE_CHECKING:
    from .device_limits import DeviceLease, DeviceLimits

SECONDS_BETWEEN_TRIES = 2.0  # to get a device that another run has
LOOKUPS_AT_ONCE = 4  # when nothing is to be computed: the server takes a moment to note each


class DeviceLost(LeaseLost):
    """The server gave a device to another run while a stage computed on it."""


def check_devices(text: str | None, slots: int | None) -> tuple[tuple[str, ...], int]:
    """(devices, slots) of `--devices 0,1` and `--slots N`. Raises ColdpressError.

    Devices are written as CUDA_VISIBLE_DEVICES wants them: numbers, or ids like GPU-8f6d… or MIG-….
    """
    devices = tuple(name.strip() for name in (text or "").split(",")) if text else ()
    for name in devices:
        if not name or not all(letter.isalnum() or letter in "-._" for letter in name):
            raise ColdpressError(f"--devices {text}: write numbers or ids as in CUDA_VISIBLE_DEVICES, like 0,1")
    if len(set(devices)) < len(devices):
        raise ColdpressError(f"--devices {text}: a device is there twice; for two stages at once on one use --slots 2")
    if devices and slots is not None and slots > len(devices):
        raise ColdpressError(f"--slots {slots} are more than the {len(devices)} devices of --devices {text}")
    return devices, slots or len(devices) or 1


def check_present(devices: Sequence[str]) -> None:
    """Raises ColdpressError when this machine doesn't have all of them."""
    if absent := absent_gpus(devices):
        raise ColdpressError(
            f"--devices {','.join(devices)}: this machine has no GPU {', '.join(absent)}; `nvidia-smi -L` lists those "
            "it has (with --device cpu the names only say how many stages compute at a time)"
        )


@dataclass(eq=False)
class Slot:
    """A place to compute. device: as in CUDA_VISIBLE_DEVICES; None is whatever the run was given, or no device.

    lost: the server has given the device away.
    """

    device: str | None = None
    worker: Worker | InProcess | None = None
    lost: bool = False

    def preempt(self) -> None:
        if self.worker is not None:
            self.worker.preempt()

    def kill(self) -> None:
        if self.worker is not None:
            self.worker.kill()


class Slots:
    """The slots of one run, for its threads. `start(device)` starts a computing process.

    devices: one slot each, of which `count` may be in use at a time; without any, `count` slots that are alike.
    expected: whether something is to be computed. If not, no process is started before a stage wants one after all, its
    result having gone since the plan was made, and more threads look things up.
    """

    def __init__(
        self,
        start: Callable[[str | None], Worker | InProcess],
        count: int = 1,
        devices: Sequence[str] = (),
        limits: DeviceLimits | None = None,
        expected: bool = True,
    ) -> None:
        self._start = start
        self._limits = limits
        self._condition = threading.Condition()
        self._devices = [Slot(device) for device in devices]
        # Without named devices the slow imports of the processes run while Prefect starts.
        ahead = expected and not devices
        self._others = [Slot(worker=start(None) if ahead else None) for _ in range(1 if devices else count)]
        self._free = [*self._devices, *self._others]
        self._usable = count
        self.threads = max(count + 1 if devices else count, 0 if expected else LOOKUPS_AT_ONCE)
        self.stopping = False
        self._stopped = threading.Event()

    @contextlib.contextmanager
    def taken(self, stage: Stage, waiting: Callable[[str], None]) -> Iterator[Worker | InProcess]:
        """A computing process for a stage, given back at the end; `waiting` is told what it waits for.

        Raises Preempted when the run is to stop; DeviceLost when the device went to another run meanwhile.
        """
        wanted = self._devices if self._devices and stage.on_device else self._others
        slot, lease = self._obtain(wanted, waiting)
        try:
            if slot.worker is None:
                slot.worker = self._start(slot.device)
            if self.stopping:
                raise Preempted("not begun when the run was asked to stop")
            yield slot.worker
        except Preempted as error:
            if slot.lost and not self.stopping:
                self._end_worker(slot)
                raise DeviceLost(f"device {slot.device} went to another run; trying again") from error
            raise
        except ColdpressError as error:
            if isinstance(error, WorkerDied):
                self._end_worker(slot)
            raise
        except BaseException:  # not the stage's end: its process may go on, and the next stage would get its answer
            self._end_worker(slot)
            raise
        finally:
            if slot.lost:  # its process was asked to stop, even if the stage was done before it heard of it
                self._end_worker(slot)
            if lease is not None and self._limits is not None:
                self._limits.release(lease)
            self._give_back(slot)

    def pause(self, seconds: float) -> None:
        """Wait, but not longer than until the run is to stop."""
        self._stopped.wait(seconds)

    def stop(self) -> None:
        """Ask all stages that are being computed to end soon."""
        self.stopping = True
        self._stopped.set()
        for slot in (*self._devices, *self._others):
            slot.preempt()
        with self._condition:
            self._condition.notify_all()

    def kill(self) -> None:
        """End all computing processes at once; no other is started."""
        self.stopping = True
        self._stopped.set()
        for slot in (*self._devices, *self._others):
            slot.kill()

    def _obtain(self, wanted: Sequence[Slot], waiting: Callable[[str], None]) -> tuple[Slot, DeviceLease | None]:
        """A slot of this run that no other run has; second, the server's lease of its device."""
        refused: list[Slot] = []
        while True:
            slot = self._reserve(wanted, refused)
            if slot is None:
                waiting("waiting for " + " or ".join(f"device {slot.device}" for slot in refused))
                self.pause(SECONDS_BETWEEN_TRIES)
                refused = []
                continue
            if slot.device is None or self._limits is None:
                return slot, None
            try:
                lease = self._limits.acquire(slot.device, lambda slot=slot: self._lose(slot))  # type: ignore[misc]
            except BaseException:
                self._give_back(slot)
                raise
            if lease is not None:
                slot.lost = False
                return slot, lease
            refused.append(slot)
            self._give_back(slot)

    def _reserve(self, wanted: Sequence[Slot], refused: Sequence[Slot]) -> Slot | None:
        """A free slot, waited for; None when another run has all those that are free here."""
        with self._condition:
            while not self.stopping:
                busy = sum(slot not in self._free for slot in wanted)
                free = [slot for slot in wanted if slot in self._free] if busy < self._usable else []
                for slot in sorted(free, key=lambda slot: slot.worker is None):  # processes that run already first
                    if slot not in refused:
                        self._free.remove(slot)
                        return slot
                if free:
                    return None
                self._condition.wait()
            raise Preempted("not begun when the run was asked to stop")

    def _give_back(self, slot: Slot) -> None:
        with self._condition:
            self._free.append(slot)
            self._condition.notify_all()

    def _lose(self, slot: Slot) -> None:
        slot.lost = True
        slot.preempt()

    def _end_worker(self, slot: Slot) -> None:
        """A process that died, or was asked to stop, computes nothing more; the next stage starts another."""
        slot.kill()
        slot.worker = None
