"""Who asked to be told of failed runs is: a real Prefect server calls a webhook and sends mail, to servers of ours."""

from __future__ import annotations

import json
import queue
import socketserver
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from email import message_from_string
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

from coldpress.flows.deployment import FLOW
from runs import environment
from up_process import COLDPRESS

RECEIVED: queue.Queue[tuple[str, str]] = queue.Queue()


class Hook(BaseHTTPRequestHandler):
    """Takes what it is sent."""

    def do_POST(self) -> None:
        text = self.rfile.read(int(self.headers["content-length"])).decode()
        RECEIVED.put(("webhook", text))
        self.send_response(200)
        self.end_headers()


class Mailbox(socketserver.StreamRequestHandler):
    """As much of SMTP as a mail needs."""

    def handle(self) -> None:
        self.wfile.write(b"220 here\r\n")
        while line := self.rfile.readline():
            command = line[:4].upper()
            if command == b"DATA":
                self.wfile.write(b"354 go on\r\n")
                lines = []
                while (line := self.rfile.readline()) != b".\r\n":
                    lines.append(line)
                RECEIVED.put(("mail", b"".join(lines).decode()))
            answers = {b"EHLO": b"250-here\r\n250 AUTH PLAIN\r\n", b"AUTH": b"235 you are\r\n", b"QUIT": b"221 bye\r\n"}
            self.wfile.write(answers.get(command, b"250 fine\r\n"))
            if command == b"QUIT":
                return


@contextmanager
def serving(server: socketserver.TCPServer) -> Iterator[int]:
    """The port on which it answers."""
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()


def test_a_failed_run_is_told_by_webhook_and_by_mail(server: str, tmp_path: Path) -> None:
    from prefect.client.orchestration import get_client
    from prefect.settings import PREFECT_API_URL, temporary_settings
    from prefect.states import Failed, Running

    with serving(HTTPServer(("127.0.0.1", 0), Hook)) as hook, serving(socketserver.ThreadingTCPServer(
        ("127.0.0.1", 0), Mailbox
    )) as mailbox:  # fmt: skip
        mail = f"mailto://anna:secret@127.0.0.1:{mailbox}?from=coldpress@example.org&to=team@example.org&mode=insecure"
        subprocess.run(
            [*COLDPRESS, "prepare", "--webhook", f"http://127.0.0.1:{hook}/token", "--mail", mail],
            env=environment(str(tmp_path), PREFECT_API_URL=server),
            check=True,
        )
        with temporary_settings({PREFECT_API_URL: server}), get_client(sync_client=True) as client:
            deployment = client.create_deployment(client.create_flow_from_name(FLOW), name="by hand")
            run = client.create_flow_run_from_deployment(deployment, name="demo 42", tags=["recipe:demo"])
            for state in (Running(), Failed(message="pruned failed: no room")):
                client.set_flow_run_state(run.id, state, force=True)
            told = dict(RECEIVED.get(timeout=60) for _ in range(2))
            client.delete_deployment(deployment)
    assert json.loads(told["webhook"])["text"].strip() == "coldpress run demo 42 has failed"
    got = message_from_string(told["mail"])
    assert (got["Subject"], got["To"]) == ("coldpress run demo 42 has failed", "team@example.org")
    assert got.get_content_type() == "text/plain"
    for words in (b"pruned failed: no room", b"recipe:demo", str(run.id).encode()):
        assert words in got.get_payload(decode=True)  # type: ignore[operator]
