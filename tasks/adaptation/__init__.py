"""Adaptation: low-rank terms beside compressed weights, as adapters that PEFT loads.

- `eora.py`          EoRA and plain SVD of what compression took away (maths)
- `compensation.py`  the stages around them
- `peft_format.py`   how an adapter's tensors and its configuration are written, and what they stand for
"""
