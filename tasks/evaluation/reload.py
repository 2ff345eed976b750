"""Run as a script, without coldpress: load an exported folder as its ecosystem does and save the logits of one window.

Arguments: the folder, its format, a safetensors file with "window" [length], and where "logits" are to be saved.
"""

import os
import sys

import torch
from safetensors.torch import load_file, save_file


def main(folder: str, format: str, given: str, target: str) -> None:
    """Save logits [length, vocabulary] in float32."""
    window = load_file(given)["window"]
    if format in ("gptq", "awq"):
        os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # its thread pool fails on small machines otherwise
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
        from gptqmodel import BACKEND, GPTQModel

        if torch.cuda.is_available():
            model = GPTQModel.load(folder, device="cuda").model
        else:
            backend = BACKEND.GPTQ_TORCH if format == "gptq" else BACKEND.AWQ_TORCH
            model = GPTQModel.load(folder, device="cpu", backend=backend, dtype=torch.float16).model
    else:
        from transformers import AutoModelForCausalLM

        settings = {}
        if format == "compressed-tensors":
            from transformers import CompressedTensorsConfig

            # Unpacked while they are read: layers kept packed have no room for packed zero points in version 0.20.
            settings["quantization_config"] = CompressedTensorsConfig(dequantize=True)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", **settings)
    assert "coldpress" not in {name.split(".")[0] for name in sys.modules}
    with torch.no_grad():
        logits = model.eval()(window[None].to(model.device), use_cache=False).logits[0]
    save_file({"logits": logits.float().cpu().contiguous()}, target)


if __name__ == "__main__":
    main(*sys.argv[1:])
