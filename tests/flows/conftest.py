"""Recipes on a tiny model, for tests of planning and running."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

TINY_RECIPE = """\
name: tiny
model: {{source: "{model}"}}
data:
  calibration: {{source: "{text}", samples: 3, length: 32}}
  held_out: {{source: "{text}", split: test, samples: 3, length: 32}}
stages:
  pruned: {{use: prune, method: wanda, model: base, calibration: calibration, sparsity: 0.5}}
  gptq: {{use: quantize, method: gptq, model: pruned, calibration: calibration, group_size: 32}}
  nf4: {{use: quantize, method: nf4, model: pruned}}
evaluate:
  variants: [base, pruned, gptq, nf4]
  perplexity: {{data: held_out}}
"""


@pytest.fixture
def tiny_recipe(tiny_model_folder: Callable[..., str], text_file: str, tmp_path: Path) -> Path:
    """A branching recipe on a random tiny Llama."""
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY_RECIPE.format(model=tiny_model_folder("llama"), text=text_file))
    return path


@pytest.fixture
def change(tiny_recipe: Path) -> Callable[[str, str], Path]:
    """`change(old, new)`: the tiny recipe with a piece of its text replaced."""

    def apply(old: str, new: str) -> Path:
        text = tiny_recipe.read_text()
        assert old in text
        tiny_recipe.write_text(text.replace(old, new))
        return tiny_recipe

    return apply


@pytest.fixture(scope="session")
def prefect_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A Prefect server of the tests' own, on a temporary data base."""
    from coldpress.flows.prefect_server import configure_prefect

    configure_prefect()
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(server_startup_timeout=120):
        yield


@pytest.fixture
def quiet_terminal() -> Any:
    """A terminal that nobody reads."""
    import io

    from coldpress.flows.terminal import Terminal
    from rich.console import Console

    return Terminal(Console(file=io.StringIO(), width=200))
