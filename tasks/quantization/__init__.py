"""Quantization: the block linears in few bits.

- `grid.py`          scales and zero points, codes and back
- `gptq.py`          the GPTQ solver (maths)
- `gptq_format.py`   packing for GPTQModel, vLLM and transformers, and unpacking
- `nf4_format.py`    bitsandbytes' NF4, to its tensors and back
- `int8_format.py`  bitsandbytes' LLM.int8(), to its tensors and back
- `stage.py`         the stages
- `joint_stage.py`   the stage that prunes and quantizes in one pass
"""
