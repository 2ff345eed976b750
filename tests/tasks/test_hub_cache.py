"""Models from the Hub, as far as they can be had without a network: from its local cache."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from coldpress.storage.artifacts import Artifact
from coldpress.storage.store import Store
from coldpress.tasks.sources.locate import SourceError, model_content

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cached_repo(tiny_model_folder: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The id of a model that lies in a Hub cache, under the name `main` and a commit."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    repo = tmp_path / "models--lab--tiny"
    shutil.copytree(tiny_model_folder("llama"), repo / "snapshots" / COMMIT)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(COMMIT)
    return "lab/tiny"


def test_a_cached_hub_model_is_keyed_by_its_commit_and_equals_the_folder(
    cached_repo: str, store: Store, run_stage: Callable[..., Artifact], tiny_model_folder: Callable[..., str]
) -> None:
    assert model_content(cached_repo, None) == {"hub": "lab/tiny", "commit": COMMIT}
    assert model_content(cached_repo, COMMIT) == {"hub": "lab/tiny", "commit": COMMIT}
    from_hub = run_stage("source/model", {}, source=cached_repo)
    assert from_hub == run_stage("source/model", {}, source=tiny_model_folder("llama"))


def test_a_hub_model_out_of_reach_is_a_sentence(cached_repo: str) -> None:
    with pytest.raises(SourceError, match="is not a local path, and the Hub can't be reached"):
        model_content("lab/another", None)
