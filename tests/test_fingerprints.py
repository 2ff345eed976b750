"""Versions don't rot silently."""

from __future__ import annotations

import ast
import json

from tests import fingerprints


def test_code_that_changed_has_a_new_version_or_was_looked_at() -> None:
    recorded = json.loads(fingerprints.RECORD.read_text())
    changed = [name for name, entry in fingerprints.fingerprints().items() if recorded.get(name) != entry]
    assert not changed, (
        f"the code behind {', '.join(changed)} changed: where results change too, raise the stage's version; "
        "then run `make fingerprints`"
    )


def test_a_fingerprint_follows_imports_and_ignores_comments_and_docstrings() -> None:
    modules = fingerprints.imported(
        ast.parse("from ..blocks import run_blocks\nfrom .grid import fit_grid\nimport torch\n"),
        "tasks.quantization.stage",
        is_package=False,
    )
    assert modules == {"tasks.blocks", "tasks.quantization.grid"}
    text, _ = fingerprints.code_of("tasks.quantization.grid")
    assert "Uniform quantization grids" not in text
    assert "fit_grid" in text
