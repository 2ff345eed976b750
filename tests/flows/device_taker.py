"""`python device_taker.py FOLDER DEVICES ROUNDS`: takes devices as a run's stages do, and proves to have each alone.

Whoever has a device locks its file in FOLDER without waiting, which fails if somebody else has it locked: the kernel
frees a lock the moment its process dies. Prints a line for each device that it got.
"""

from __future__ import annotations

import fcntl
import sys
import time
from pathlib import Path

from coldpress.flows.device_limits import DeviceLimits
from coldpress.flows.slots import Slots
from coldpress.flows.worker import InProcess
from coldpress.tasks.catalogue import stage_named

folder, devices, rounds = Path(sys.argv[1]), sys.argv[2].split(","), int(sys.argv[3])


class Place(InProcess):
    """A computing process, as far as is needed here."""

    def __init__(self, device: str | None) -> None:
        super().__init__("cpu")
        self.visible = device


slots = Slots(Place, 1, devices, DeviceLimits(devices))
for _ in range(rounds):
    with slots.taken(stage_named("prune/wanda"), lambda text: print(text, flush=True)) as place:
        assert isinstance(place, Place)
        with (folder / f"device-{place.visible}").open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # BlockingIOError: two have the device
            print(f"has {place.visible}", flush=True)
            time.sleep(0.1)
