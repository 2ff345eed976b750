"""Fixtures of the fault tests: a recipe on a tiny model, and a Prefect server that runs can share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from runs import BLOCKS, RECIPE, a_server


@pytest.fixture
def recipe(tiny_model_folder: Callable[..., str], text_file: str, tmp_path: Path) -> Path:
    path = tmp_path / "killed.yaml"
    path.write_text(RECIPE.format(model=tiny_model_folder("llama", num_hidden_layers=BLOCKS), text=text_file))
    return path


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which `undisturbed_ids` keeps what all tests compare with."""
    return tmp_path_factory.mktemp("undisturbed")


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The API address of a Prefect server that all runs of the tests can share."""
    with a_server(str(tmp_path_factory.mktemp("server"))) as (address, _):
        yield address
