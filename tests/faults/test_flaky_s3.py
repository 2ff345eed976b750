"""A run of the command line whose store is on S3, where every fifth request fails or hangs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import fsspec
import pytest
from coldpress.storage.inspect import verify
from coldpress.storage.store import Store
from runs import RECIPE, artifacts, finish, start, states
from up_process import ids, undisturbed_ids

from tests.faults.flaky_proxy import FlakyProxy


@pytest.fixture
def recipe(tiny_model_folder: Callable[..., str], text_file: str, tmp_path: Path) -> Path:
    path = tmp_path / "flaky.yaml"
    path.write_text(RECIPE.format(model=tiny_model_folder("llama"), text=text_file))
    return path


def test_a_run_ends_well_though_a_fifth_of_the_requests_fail_or_hang(
    recipe: Path, server: str, tmp_path: Path, proxy: FlakyProxy, s3_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = {
        "PREFECT_API_URL": server,
        "AWS_ENDPOINT_URL": proxy.url,
        "COLDPRESS_REMOTE_TIMEOUT_SECONDS": "2",
        "COLDPRESS_CACHE": str(tmp_path / "cache"),
    }
    proxy.fail(0.2)
    far = finish(start(recipe, s3_url, **environment))
    assert set(states(far).values()) == {"computed"}
    assert set(proxy.fates) == {"pass", "503", "dropped", "lost", "hang"}

    again = finish(start(recipe, s3_url, **environment))
    assert artifacts(again) == artifacts(far)
    assert set(states(again).values()) == {"cached"}
    monkeypatch.setitem(fsspec.config.conf, "s3", {"endpoint_url": proxy.url})
    proxy.fate = lambda method, path: "pass"
    assert verify(Store(s3_url)) == []
    assert ids(s3_url) == undisturbed_ids(recipe, tmp_path)
    assert list(Store(s3_url).files.list("journals")) == []
