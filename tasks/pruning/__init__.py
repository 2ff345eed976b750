"""Pruning: which weights go.

- `criteria.py`   the maths: a score for every weight, and the registry of criteria
- `selection.py`  scores to masks: exact counts per row or per group
- `stage.py`      the stage around them
"""
