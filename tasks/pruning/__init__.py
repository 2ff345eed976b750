"""Pruning: what goes, weights, heads and channels, or whole blocks.

- `criteria.py`     a score for every weight, and the registry of criteria; `sparsegpt.py`, `alps.py`: the solvers
- `selection.py`    scores to masks: exact counts per row or per group
- `allocation.py`   how much of each block
- `stage.py`        the stages around them: unstructured and N:M
- `width.py`        heads and FFN channels: scores, choice, the narrower block; `width_stage.py` around it;
                    `wanda_sp_stage.py`, also under masks, which `slice_stage.py` turns into a narrower model
- `depth.py`        whole blocks; `order.py`: layer recipes
- `statistics.py`, `gradients.py`  what is measured of the dense model for them, each a cached stage
"""
