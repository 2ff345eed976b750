"""Run as a script, without coldpress: load an exported folder as its ecosystem does, and time it.

Argument: a JSON file {folder, format, adapter (a folder or null), device, threads, prompt, generate, batch_size,
repeats, warmup, seed}. Standard output gets JSON lines: any number of {"progress": [what, done, total]}, then
{"result": …} with raw figures. Ends when standard input is closed: whoever started it holds the other end.
"""

import inspect
import json
import os
import select
import sys
import threading
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any


def main(path: str) -> None:
    """Measure what the file asks for."""
    # Before anything slow: who asked may die while torch is imported.
    threading.Thread(target=end_with_parent, daemon=True).start()
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print goes to standard error

    def answer(**message: object) -> None:
        answers.write(json.dumps(message) + "\n")
        answers.flush()

    with open(path, encoding="utf-8") as file:
        asked = json.load(file)
    answer(progress=["loading", 0, 1])
    answer(result=measure(asked, lambda what, done, total: answer(progress=[what, done, total])))


def end_with_parent() -> None:
    """End this process when the other end of standard input is gone."""
    poll = select.poll()
    poll.register(sys.stdin.fileno(), 0)  # asks for nothing but what is always told: POLLHUP
    poll.poll()
    os._exit(1)


def measure(asked: dict[str, Any], progress: Callable[[str, int, int], None]) -> dict[str, Any]:
    """Load and time the model."""
    import torch

    torch.set_num_threads(asked["threads"])
    device = asked["device"]
    load = loader(asked)  # the imports, which are not the model's
    before = memory_of_process()
    clock = time.perf_counter()
    model, runtime = load()
    synchronize(device)
    load_seconds = time.perf_counter() - clock

    generator = torch.Generator().manual_seed(asked["seed"])
    shape = asked["batch_size"], asked["prompt"] + asked["generate"]
    tokens = torch.randint(model.config.get_text_config().vocab_size, shape, generator=generator).to(device)
    # The prompt's last token is all that `generate` asks logits of.
    few = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    prefill, decode = [], []
    energy = EnergyMeter(device)
    rounds = asked["warmup"] + asked["repeats"]
    with torch.inference_mode():
        for number in range(rounds):
            if number == asked["warmup"]:
                energy.start()
                others = OtherProcesses()
            seconds = one_repeat(model, tokens, asked["prompt"], few, device)
            if number >= asked["warmup"]:
                prefill.append(seconds[0])
                decode.append(seconds[1])
            progress("measuring" if number >= asked["warmup"] else "warming up", number + 1, rounds)
    assert "coldpress" not in {name.split(".")[0] for name in sys.modules}
    return {
        "prefill_seconds": prefill,
        "decode_seconds": decode,
        "load_seconds": load_seconds,
        "runtime": runtime,
        "others_busy_processors": others.reading(),
        **memory_of_model(device, before),
        **energy.reading(),
    }


def one_repeat(model: Any, tokens: Any, prompt: int, few: dict[str, int], device: str) -> tuple[float, float]:
    """Seconds of reading the prompt [batch, prompt], and of then decoding the rest of the tokens with the KV cache."""
    synchronize(device)
    start = time.perf_counter()
    cache = model(tokens[:, :prompt], use_cache=True, **few).past_key_values
    synchronize(device)
    middle = time.perf_counter()
    for position in range(prompt, tokens.shape[1]):
        cache = model(tokens[:, position : position + 1], past_key_values=cache, use_cache=True, **few).past_key_values
    synchronize(device)
    return middle - start, time.perf_counter() - middle


def loader(asked: dict[str, Any]) -> Callable[[], tuple[Any, str]]:
    """Imports what loads the folder; returns a function that gives the model and a name for its runtime."""
    import torch
    import transformers

    folder, format, adapter, device = asked["folder"], asked["format"], asked["adapter"], asked["device"]
    if format in ("gptq", "awq"):
        os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # its thread pool fails on small machines otherwise
        import gptqmodel
        from gptqmodel.nn_modules.qlinear import BaseQuantLinear
    elif adapter is not None:
        sys.modules["gptqmodel"] = None  # type: ignore[assignment]  # PEFT would ask for its partner `optimum`, whatever the model
    if format == "bitsandbytes":
        import bitsandbytes  # noqa: F401
    if adapter is not None:
        import peft
    with torch.device("meta"):  # imports the code of the model's family, and what that needs
        transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(folder))

    def load() -> tuple[Any, str]:
        if format in ("gptq", "awq"):
            settings: dict[str, Any] = {"dtype": torch.float16} if device == "cpu" else {}
            loaded = gptqmodel.GPTQModel.load(folder, device=device, **settings)
            model = loaded.model
            kernels = {type(module).__name__ for module in model.modules() if isinstance(module, BaseQuantLinear)}
            runtime = f"GPTQModel {version('gptqmodel')} ({', '.join(sorted(kernels))})"
        else:
            settings = {} if device == "cpu" else {"device_map": {"": device}}
            model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto", **settings)
            runtime = f"transformers {version('transformers')}"
            if format == "bitsandbytes":
                runtime += f", bitsandbytes {version('bitsandbytes')}"
        dtype = str(model.dtype).removeprefix("torch.")
        if adapter is not None:
            model = peft.PeftModel.from_pretrained(model, adapter)
            runtime += f", PEFT {version('peft')}"
        return model.eval(), f"{runtime}, {dtype}"

    return load


class OtherProcesses:
    """How many processors other processes have kept busy in the mean since construction; on Linux only.

    The kernel counts in hundredths of a second, so less than a second says nothing.
    """

    def __init__(self) -> None:
        self.began = self._now()

    @staticmethod
    def _now() -> tuple[float, float]:
        """Seconds of a clock, and seconds of processor time that others have had."""
        if sys.platform != "linux":
            return time.monotonic(), 0.0
        with open("/proc/stat", encoding="ascii") as file:
            user, nice, system, _idle, _waiting, interrupts, soft = map(int, file.readline().split()[1:8])
        busy = (user + nice + system + interrupts + soft) / os.sysconf("SC_CLK_TCK")
        return time.monotonic(), busy - time.process_time()

    def reading(self) -> float | None:
        """The mean number, None where it isn't known."""
        clock, busy = self._now()
        seconds = clock - self.began[0]
        if sys.platform != "linux" or seconds < 1.0:
            return None
        return max(0.0, (busy - self.began[1]) / seconds)


def synchronize(device: str) -> None:
    """Wait until the device has done all that it was given."""
    import torch

    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def memory_of_process() -> int | None:
    """Peak resident bytes of this process so far; on Linux only."""
    if sys.platform != "linux":
        return None
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM:"))


def memory_of_model(device: str, before: int | None) -> dict[str, Any]:
    """Peak memory of loading and running: on CUDA of the device, else of the process, with what it was before."""
    if device.startswith("cuda"):
        import torch

        return {
            "device_memory_bytes": torch.cuda.max_memory_allocated(device),
            "device_reserved_bytes": torch.cuda.max_memory_reserved(device),
            "gpu": torch.cuda.get_device_name(device),
        }
    peak = memory_of_process()
    return {} if peak is None else {"process_memory_bytes": peak, "process_memory_before_bytes": before}


class EnergyMeter:
    """The energy that a GPU took since `start`, by its own counter; where that can't be read, why."""

    def __init__(self, device: str) -> None:
        self.why = "energy is only read of NVIDIA's GPUs"
        self.handle: Any = None
        if not device.startswith("cuda"):
            return
        try:
            import pynvml
        except ImportError:
            self.why = "energy was not read: nvidia-ml-py is not installed"
            return
        import torch

        self.nvml = pynvml
        try:
            pynvml.nvmlInit()
            uuid = str(torch.cuda.get_device_properties(device).uuid)
            self.handle = pynvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}")
            self.millijoules()
        except pynvml.NVMLError as error:
            self.handle = None
            self.why = f"energy was not read: {error}"

    def millijoules(self) -> int:
        """What the counter says."""
        return int(self.nvml.nvmlDeviceGetTotalEnergyConsumption(self.handle))

    def start(self) -> None:
        """Begin to count."""
        if self.handle is not None:
            self.began = self.millijoules()

    def reading(self) -> dict[str, Any]:
        """{"energy_joules": …} or {"no_energy": why}."""
        if self.handle is None:
            return {"no_energy": self.why}
        return {"energy_joules": (self.millijoules() - self.began) / 1000}


if __name__ == "__main__":
    main(sys.argv[1])
