"""`coldpress up` on Postgres, behind a password: for teams, as in deploy/compose.yaml."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from runs import environment
from up_process import COLDPRESS, eventually

pytestmark = pytest.mark.long
PASSWORD, SECRET = "pg-s3cret", "team:api-s3cret"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def postgres() -> Iterator[str]:
    """The connection URL of a data base server of the test's own."""
    import tempfile

    program = os.path.realpath(shutil.which("postgres") or "/nowhere")
    initdb = Path(program).with_name("initdb")
    if not initdb.exists():
        pytest.skip("Postgres is not installed")
    as_user = []
    if os.getuid() == 0:  # whom Postgres refuses
        try:
            pwd.getpwnam("postgres")
        except KeyError:
            pytest.skip("Postgres does not run as root, and there is no user of its own")
        as_user = ["runuser", "-u", "postgres", "--"]
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o777)
        data, word, port = f"{folder}/data", Path(folder, "password"), _free_port()
        word.write_text(PASSWORD)
        word.chmod(0o644)
        make = [str(initdb), "-D", data, "-U", "prefect", "-A", "scram-sha-256", f"--pwfile={word}", "--no-sync"]
        subprocess.run([*as_user, *make], check=True, capture_output=True)
        serve = [program, "-D", data, "-p", str(port), "-h", "127.0.0.1", "-k", folder]
        process = subprocess.Popen([*as_user, *serve], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

        def answers() -> bool:
            with socket.socket() as client:
                return client.connect_ex(("127.0.0.1", port)) == 0

        eventually(answers, 60)
        yield f"postgresql+asyncpg://prefect:{PASSWORD}@127.0.0.1:{port}/postgres"
        process.terminate()
        process.wait(60)


def test_a_run_goes_through_postgres_and_nobody_gets_in_without_the_password(
    postgres: str, recipe: Path, tmp_path: Path
) -> None:
    port = _free_port()
    server = {"PREFECT_SERVER_DATABASE_CONNECTION_URL": postgres, "PREFECT_SERVER_API_AUTH_STRING": SECRET}
    log = tmp_path / "up.log"
    with log.open("w") as output:
        up = subprocess.Popen(
            [*COLDPRESS, "up", "--port", str(port), "--devices", "0,1"],
            cwd=tmp_path,
            env=environment(str(tmp_path), **server),
            stdout=output,
            stderr=output,
        )
    try:
        eventually(lambda: "started!" in log.read_text() or up.poll() is not None, 240)
        assert up.poll() is None, log.read_text()

        def ask(*arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
            client = environment(str(tmp_path), PREFECT_API_URL=f"http://127.0.0.1:{port}/api", **more)
            command = [*COLDPRESS, *arguments]
            return subprocess.run(command, cwd=tmp_path, env=client, capture_output=True, text=True, check=False)

        refused = ask("submit", str(recipe))
        assert refused.returncode == 2
        assert "refuses: it wants PREFECT_API_AUTH_STRING" in refused.stderr
        ended = ask("submit", str(recipe), "--wait", "--device", "cpu", PREFECT_API_AUTH_STRING=SECRET)
        assert ended.returncode == 0, ended.stderr
        status = ask("status", PREFECT_API_AUTH_STRING=SECRET)
        assert "Completed" in status.stdout, status.stderr
        assert sum(line.split()[1:] == [device, "free"] for line in status.stdout.splitlines() for device in "01") == 2
    finally:
        up.terminate()
        up.wait(90)
    said = [path.read_text() for path in (log, tmp_path / "prefect/coldpress-server.log")]
    assert not [text for text in said if PASSWORD in text or SECRET in text]
