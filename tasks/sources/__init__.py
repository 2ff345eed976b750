"""Sources: models and texts from outside, turned into artifacts.

- `locate.py`  what a source string points at, and the content id of that, without loading anything
- `models.py`  Hub ids, folders, GGUF files and files inside packages, streamed into a checkpoint
- `texts.py`   plain text, jsonl, Hub data sets and the Python documentation, dealt into splits
- `tokens.py`  text to windows of token ids
"""
