"""Adaptation: what compression lost is computed or learned back, in adapters that PEFT loads or in the weights.

- `eora.py`          EoRA and plain SVD of what compression took away (maths)
- `compensation.py`  the stages around them
- `training.py`      the training loop: batches, schedule, journal
- `network.py`       a whole model in memory whose linear layers are replaced by
- `layers.py`        frozen, low-rank, masked low-rank and masked full ones
- `lora_stage.py`    the stages lora, sparse-lora and full
- `losa.py`          LoSA's schedules and ranks (maths)
- `losa_stage.py`    LoSA: rounds of pruning and training
- `adalora.py`       importance, budget and orthogonality of AdaLoRA (maths)
- `diagonal.py`      low-rank layers whose directions can be switched off, SoRA's proximal step
- `rank_stage.py`    the stages adalora and sora
- `distillation.py`  how far a student is from its teacher (maths)
- `distill_stage.py` the stages kl, reverse-kl and hidden
- `merging.py`       the stage that adds an adapter to its checkpoint's weights
- `peft_format.py`   how an adapter's tensors and its configuration are written, and what they stand for
"""
