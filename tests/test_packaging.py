"""A built wheel works on its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_a_wheel_has_the_code_and_the_shipped_recipes_and_runs_without_the_checkout(tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(
        ROOT, source, ignore=shutil.ignore_patterns(".*", "build", "dist", "reports", "*.egg-info", "__pycache__")
    )
    build = [
        sys.executable,
        "-m",
        "build",
        "--wheel",
        "--no-isolation",
        "--outdir",
        str(tmp_path / "dist"),
        str(source),
    ]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    installed = tmp_path / "installed"
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(installed)
    assert not [name for name in names if name.split("/")[0] in ("flows", "tasks", "storage", "tests")]

    program = (
        "import coldpress.flows.cli as cli; from coldpress.flows.recipe import load_recipe; "
        "print(cli.__file__); print(load_recipe('smollm2-branching').name)"
    )
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    said = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    ).stdout.split()
    assert said[0].startswith(str(installed))
    assert said[1] == "smollm2-branching"
    recipes = {path.name for path in (ROOT / "flows" / "recipes").glob("*.yaml")}
    assert recipes <= {Path(name).name for name in names if name.startswith("coldpress/flows/recipes/")}
