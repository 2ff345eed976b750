"""Found by every Python process that has this folder in PYTHONPATH: what evaluations ask a model is written down.

A line a question goes to the file `$ASKED` when the model has answered. lm-eval's answers are committed at once instead
of every five seconds, and both take a little longer, so that there is a middle to be killed in.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import time
from importlib.machinery import ModuleSpec
from typing import Any

PAUSE = 0.02  # seconds


def count(owner: Any, name: str, questions: Any) -> None:
    """Let `owner.name` write down as many lines as `questions` says of its arguments."""
    ask = getattr(owner, name)

    def counted(*arguments: Any, **keywords: Any) -> Any:
        time.sleep(PAUSE)
        answer = ask(*arguments, **keywords)
        with open(os.environ["ASKED"], "a", encoding="utf-8") as file:
            file.write("1\n" * questions(arguments, keywords))
        return answer

    setattr(owner, name, counted)


def count_lm_eval(module: Any) -> None:
    module.COMMIT_EVERY = 0.0
    count(module.JournaledModel, "_model_call", lambda arguments, keywords: len(arguments[1]))
    count(module.JournaledModel, "_model_generate", lambda arguments, keywords: len(keywords["context"]))


def count_generations(module: Any) -> None:
    count(module, "_continue", lambda arguments, keywords: 1)


CHANGED = {
    "coldpress.tasks.evaluation.lm_eval_model": count_lm_eval,
    "coldpress.tasks.evaluation.generations": count_generations,
}


class Finder:
    """Changes the modules above as they are imported."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name not in CHANGED:
            return None
        change = CHANGED.pop(name)
        spec = importlib.util.find_spec(name)
        loader: Any = spec and spec.loader
        execute = loader.exec_module

        def exec_and_change(module: Any) -> None:
            execute(module)
            change(module)

        loader.exec_module = exec_and_change
        return spec


sys.meta_path.insert(0, Finder())  # type: ignore[arg-type]
