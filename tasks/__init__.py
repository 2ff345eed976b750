"""What the work is: one folder for each family of stages.

- `stage.py`          what a stage is: parameters, inputs, key; running one
- `catalogue.py`      the list of all stages
- `architectures.py`  all that is particular to a model family
- `blocks.py`         the one block-by-block loop that layer-wise methods share; `resuming.py`: how stages go on
- `skeleton.py`       a model without its weights, called block by block
- `formats.py`        stored tensors <-> dense weights, for dense and packed checkpoints
- `sources/`          models and token sets in
- `pruning/`          weights, heads and channels, or whole blocks that go
- `quantization/`     RTN, GPTQ, AWQ, NF4, LLM.int8(), SparseGPT with GPTQ
- `adaptation/`       what is put beside compressed weights: EoRA
- `evaluation/`       perplexity, size, bits per weight, sparsity; lm-eval's tasks; continuations of prompts
- `reporting/`        the table, the charts and the page over all variants

Modules that the catalogue imports (everything but the work itself) import torch inside functions only, so that
planning and cached runs never load it.
"""
