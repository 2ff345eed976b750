"""A process for one call: `python -m tests.bench.process MODULE:FUNCTION ARGUMENTS ANSWER`.

ARGUMENTS is a JSON list; the result is written as JSON to the file ANSWER. See `measuring.in_fresh_process`.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import sys
from pathlib import Path


def main() -> None:
    """Import, call, write the answer."""
    target, arguments, answer = sys.argv[1:]
    module, _, name = target.partition(":")
    result = getattr(importlib.import_module(module), name)(*json.loads(arguments))
    Path(answer).write_text(json.dumps(result, default=dataclasses.asdict))


if __name__ == "__main__":
    main()
