"""Benchmarks: what coldpress claims about speed and memory, measured on the machine at hand.

`python -m tests.bench [NAME...]` from the repository root (`make bench` runs them all).

- `__main__.py`         runs the benchmarks one after the other and prints one table
- `measuring.py`        rows of that table, fresh processes, interleaved timing
- `smollm2.py`          the model and the calibration windows, put into a store
- `wanda.py`            the Wanda stage against plain forward passes and against the published loop
- `published_wanda.py`  that loop, written anew
- `gptq.py`             the GPTQ stage against GPTQModel's own `quantize()`
- `training.py`         a training step of masked LoRA against LoRA's and PEFT's
- `memory.py`           peak memory of pruning 1.1 billion parameters, and whether it grows with depth
- `store.py`            writing to and reading from the store against plain files with one SHA-256
- `cached.py`           how long an answer takes when there is nothing to compute

Comparisons are made in one run, side by side and in turns, and given as ratios, so that a slow or busy machine slows
both sides. Everything is written to a temporary folder that is removed at the end.
"""
