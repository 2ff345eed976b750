"""Which hardware a measurement is of, told without importing torch, because keys are made while planning.

A speed or a memory figure holds for one kind of processor, a number of cores and versions of libraries. `hardware_id`
is what stands for them in the key of a measurement, `describe` the line that the report prints. Two machines with the
same parts have the same id; so have two equal GPUs of one machine. NVIDIA's GPUs are listed by `nvidia-smi`, which
comes with their driver.
"""

from __future__ import annotations

import functools
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any, NamedTuple

from ..storage.errors import ColdpressError

# Libraries that a measured model may run in.
LIBRARIES = ("torch", "transformers", "bitsandbytes", "gptqmodel", "peft")


class Gpu(NamedTuple):
    """A GPU, or the slice of one (MIG): its name as torch says it, and its UUID."""

    name: str
    uuid: str


def resolve_device(device: str) -> str:
    """ "auto" is CUDA where there is a GPU and torch is built for it, else the CPU."""
    if device != "auto":
        return device
    return "cuda" if visible_gpus() and _torch_knows_cuda() else "cpu"


def hardware_id(device: str) -> dict[str, Any]:
    """What a measurement on a device ("auto", "cpu", "cuda:1" …) depends on, for its key."""
    return {"machine": describe(device), "versions": library_versions()}


def describe(device: str) -> str:
    """One line: "Intel(R) Xeon(R) Processor (6-167-1), 2 threads of 2 cores", on CUDA after the GPU's name.

    Raises ColdpressError when it can't be told which GPU a CUDA device is.
    """
    device = resolve_device(device)
    if device == "cpu":
        return _processor()
    name = gpu_of(device).name if device.startswith("cuda") else device
    return f"{name}, {_processor()}"


def device_id(device: str) -> str:
    """What tells a device of this host from its others, under whatever number a process knows it."""
    device = resolve_device(device)
    number = _number(device)
    if not device.startswith("cuda") or number >= len(visible_gpus()):
        return device.replace(":", "-")
    return visible_gpus()[number].uuid


def gpu_of(device: str) -> Gpu:
    """The GPU that "cuda" or "cuda:1" stands for in this process. Raises ColdpressError if there is none."""
    found = visible_gpus()
    if (number := _number(device)) >= len(found):
        raise ColdpressError(
            f"which GPU {device} is can't be told: nvidia-smi shows {len(found)}, and measurements name their "
            "hardware; name another device (--device), or make nvidia-smi work here"
        )
    return found[number]


def visible_gpus() -> list[Gpu]:
    """The GPUs in the order in which CUDA numbers them here (those of one kind by their bus), CUDA_VISIBLE_DEVICES
    heeded.
    """
    gpus, slices = _all_gpus()
    asked = os.environ.get("CUDA_VISIBLE_DEVICES")
    if asked is None:
        return gpus
    found: list[Gpu] = []
    for entry in (part.strip() for part in asked.split(",")):
        if entry.isdecimal():
            named = gpus[int(entry) : int(entry) + 1]
        else:
            named = [gpu for gpu in (*gpus, *slices) if entry and gpu.uuid.startswith(entry)]
        if len(named) != 1:
            break  # as CUDA does: what follows an entry that is none can't be seen
        found += named
    return found


def absent_gpus(devices: Sequence[str]) -> list[str]:
    """Those, written as in CUDA_VISIBLE_DEVICES, that this machine lacks; [] where that can't be told (AMD's)."""
    gpus, slices = _all_gpus()
    if os.path.exists("/dev/kfd") and not gpus:
        return []
    return [
        name
        for name in devices
        if not (int(name) < len(gpus) if name.isdecimal() else any(g.uuid.startswith(name) for g in (*gpus, *slices)))
    ]


def library_versions() -> dict[str, str]:
    """Versions of those of LIBRARIES that are installed."""
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def usable_cpus() -> set[int]:
    """The processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def _number(device: str) -> int:
    _, _, number = device.partition(":")
    if number and not number.isdecimal():
        raise ColdpressError(f"there is no device '{device}'; write cpu, cuda, or cuda:1 …")
    return int(number or 0)


@functools.cache
def _all_gpus() -> tuple[list[Gpu], list[Gpu]]:
    """The host's GPUs, each that is sliced by its first slice, which CUDA shows; and all slices."""
    listed = shutil.which("nvidia-smi")
    if listed is None:
        return [], []
    try:
        done = subprocess.run([listed, "-L"], capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return [], []  # no driver behind it
    whole: list[Gpu] = []
    gpus: dict[str, Gpu] = {}
    slices: list[Gpu] = []
    for line in done.stdout.splitlines():
        if gpu := re.match(r"GPU \d+: (.+) \(UUID: (\S+)\)", line):
            whole.append(Gpu(*gpu.groups()))
        elif part := re.match(r"\s+MIG (\S+)\s.*\(UUID: (\S+)\)", line):
            slices.append(Gpu(f"{whole[-1].name} MIG {part[1]}", part[2]))
            gpus.setdefault(whole[-1].uuid, slices[-1])
    return [gpus.get(gpu.uuid, gpu) for gpu in whole], slices


@functools.cache
def _torch_knows_cuda() -> bool:
    """Whether the installed torch was built for CUDA, as its version.py says."""
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        return False
    with open(os.path.join(os.path.dirname(spec.origin), "version.py"), encoding="utf-8") as file:
        return re.search(r"^cuda\b[^=\n]*= *['\"]", file.read(), re.MULTILINE) is not None


@functools.cache
def _processor() -> str:
    """The processor's name (on x86 with family, model and stepping), and how much of it this process may use."""
    cpus = usable_cpus()
    threads = f"{len(cpus)} thread{'s' if len(cpus) > 1 else ''}"
    cores = len({_siblings(cpu) for cpu in cpus})
    return f"{_processor_name()}, {threads} of {cores} core{'s' if cores > 1 else ''}"


def _processor_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            text = file.read().split("\n\n")[0]
    except OSError:
        return platform.processor() or platform.machine()  # not Linux
    pairs = (line.split(":", 1) for line in text.splitlines() if ":" in line)
    values = {key.strip(): value.strip() for key, value in pairs}
    numbers = [values[key] for key in ("cpu family", "model", "stepping") if key in values]
    name = values.get("model name") or values.get("CPU part") or platform.machine()
    return f"{name} ({'-'.join(numbers)})" if numbers else name


def _siblings(cpu: int) -> str:
    """The hardware threads of a processor's core, as the system writes them."""
    try:
        with open(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list", encoding="ascii") as file:
            return file.read()
    except OSError:
        return str(cpu)  # not told here
