"""Scripts that load exported models in a process of their own, with nothing of coldpress in it."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

# Arguments: a folder with windows.safetensors, in which the results go, and the exported folders.
LOAD = """
import json, os, sys
import torch
from safetensors.torch import load_file, save_file
{imports}
assert not any(name.startswith("coldpress") for name in sys.modules)
work, folders = sys.argv[1], sys.argv[2:]
windows = load_file(os.path.join(work, "windows.safetensors"))["windows"]
errors = {{}}
for number, folder in enumerate(folders):
    try:
        {load}
    except Exception as error:
        errors[number] = f"{{type(error).__name__}}: {{error}}"
        continue
    results = {{}}
    for name, module in model.named_modules():
        {weight}
    with torch.no_grad():
        logits = [model(window[None], use_cache=False).logits.float() for window in windows]
    results["logits"] = torch.cat(logits)
    results = {{name: tensor.contiguous().clone() for name, tensor in results.items()}}
    save_file(results, os.path.join(work, f"{{number}}.safetensors"))
with open(os.path.join(work, "errors.json"), "w") as file:
    json.dump(errors, file)
"""
TRANSFORMERS = LOAD.format(
    imports="from transformers import AutoModelForCausalLM\nimport bitsandbytes as bnb",
    load="model = AutoModelForCausalLM.from_pretrained(folder).eval()",
    weight="""if isinstance(module, bnb.nn.Linear4bit):
            results[name] = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
        elif isinstance(module, bnb.nn.Linear8bitLt):
            scales = module.weight.SCB if module.weight.SCB is not None else module.state.SCB
            results[name] = bnb.functional.int8_vectorwise_dequant(module.weight.data, scales)""",
)
GPTQMODEL = LOAD.format(
    imports="os.environ['TORCHDYNAMO_DISABLE'] = '1'  # compiling takes longer than all the rest\n"
    "from gptqmodel import BACKEND, GPTQModel",
    load="""loaded = GPTQModel.load(folder, device="cpu", backend=BACKEND.GPTQ_TORCH, dtype=torch.float16)
        model = loaded.model.eval()""",
    weight="""if hasattr(module, "dequantize_weight"):
            results[name] = module.dequantize_weight().T.float()""",
)
AWQ = LOAD.format(
    imports="from gptqmodel import BACKEND, GPTQModel\n"
    "from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm",
    load="""loaded = GPTQModel.load(folder, device="cpu", backend=BACKEND.AWQ_TORCH, dtype=torch.float16)
        model = loaded.model.eval()""",
    weight="""if hasattr(module, "qweight"):
            parts = module.qweight, module.qzeros, module.scales, module.bits, module.group_size
            results[name] = dequantize_gemm(*parts).T.float()""",
)
# Unpacked while they are read, in the scales' float16.
COMPRESSED_TENSORS = LOAD.format(
    imports="from transformers import AutoModelForCausalLM, CompressedTensorsConfig",
    load="""config = CompressedTensorsConfig(dequantize=True)
        model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config).eval()""",
    weight="""if isinstance(module, torch.nn.Linear):
            results[name] = module.weight.detach().float()""",
)
# Adapters belong to the checkpoint before them. Where GPTQModel is installed PEFT asks for optimum too, whatever the
# model; so here it is not.
PEFT = LOAD.format(
    imports="sys.modules['gptqmodel'] = None\n"
    "from peft import PeftModel\nfrom transformers import AutoModelForCausalLM",
    load="""is_adapter = os.path.exists(os.path.join(folder, "adapter_config.json"))
        base = base if is_adapter else folder
        model = AutoModelForCausalLM.from_pretrained(base).eval()
        if is_adapter:
            model = PeftModel.from_pretrained(model, folder).eval()""",
    weight="""if hasattr(module, "get_delta_weight"):
            results[name.removeprefix("base_model.model.")] = module.get_delta_weight("default")""",
)


class Loaded(NamedTuple):
    """logits: [windows, length, vocabulary]. weights: of packed layers, dequantized, by layer name."""

    logits: Tensor
    weights: dict[str, Tensor]
