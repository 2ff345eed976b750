"""Quantization: the block linears in few bits.

- `grid.py`         scales and zero points, codes and back, rounding to the nearest code
- `gptq.py`         the GPTQ solver (maths)
- `awq.py`          AWQ's searches for scales and clipping ranges (maths)
- `folding.py`      scales of features moved into the modules before
- `gptq_format.py`  packing for GPTQModel, vLLM and transformers, and unpacking
- `awq_format.py`   AWQ's own packing, and unpacking
- `nf4_format.py`, `int8_format.py`  bitsandbytes' NF4 and LLM.int8(), to its tensors and back
- `compressed_tensors_format.py`  what `export` makes of GPTQ's and AWQ's formats for vLLM
- `stage.py`, `awq_stage.py`  the stages; `joint_stage.py` prunes and quantizes in one pass
"""
