"""`coldpress up`: a Prefect server, a work pool and a worker under one supervisor, which starts again what dies.

Each child leads a process group of its own, so that Ctrl-C reaches only the supervisor, and it decides in which order
things end: the worker, then the runs it had started (asked to stop, their work kept), then the server. Prefect's worker
would kill its runs at once when told to stop; killed itself, it leaves them alone.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NoReturn
from uuid import UUID

import httpx

from ..storage.errors import ColdpressError
from .deployment import prepare_server, schedule_crashed
from .execution import grace_seconds
from .overview import keep_showing

Say = Callable[[str], None]

_SECONDS_TO_START = 600.0  # a loaded machine takes minutes; a server that has died is noticed at once
_SECONDS_BETWEEN_LOOKS = 2.0
_LONGEST_PAUSE = 60.0
_LASTING = 60.0  # a child that lived so long has started well: the next pause is short again


@dataclass(frozen=True)
class Options:
    """What `coldpress up` was asked for. heartbeat: seconds between a run's signs of life."""

    host: str
    port: int
    pool: str
    limit: int
    heartbeat: int
    own_server: bool

    @property
    def address(self) -> str:
        """Where this machine reaches the server: an address to listen on everywhere is none to call."""
        host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(self.host, self.host)
        return f"http://{host}:{self.port}"


class _Stop(Exception):
    """SIGTERM or Ctrl-C."""


class Child:
    """A command in a process group of its own, that is started again when it ends."""

    def __init__(self, name: str, command: Sequence[str], orphaned: signal.Signals, output: IO[Any] | None) -> None:
        self.name = name
        self._command = [sys.executable, "-m", "coldpress.flows.tether", orphaned.name, str(os.getpid()), *command]
        self._output = output
        self._process: subprocess.Popen[bytes] | None = None
        self._began = 0.0
        self._pause = 1.0
        self._again_at: float | None = None

    def start(self) -> None:
        """Start it."""
        self._again_at = None
        self._began = time.monotonic()
        self._process = subprocess.Popen(
            self._command,
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=subprocess.STDOUT if self._output else None,
            start_new_session=True,
        )

    def look(self, say: Say) -> None:
        """Start it again if it has ended, after a pause that grows when it keeps ending."""
        if self._again_at is not None:
            if time.monotonic() >= self._again_at:
                self.start()
            return
        assert self._process is not None
        status = self._process.poll()
        if status is None:
            return
        if time.monotonic() - self._began > _LASTING:
            self._pause = 1.0
        say(f"the {self.name} ended ({_how(status)}); starting it again in {self._pause:.0f} s")
        self.end_rest()
        self._again_at = time.monotonic() + self._pause
        self._pause = min(2 * self._pause, _LONGEST_PAUSE)

    def died(self) -> str | None:
        """How it ended, if it has."""
        status = self._process.poll() if self._process else None
        return None if status is None else _how(status)

    def end(self, number: signal.Signals) -> None:
        """Send it the signal, and end what it leaves behind."""
        if self._process is None or self._again_at is not None:
            return
        self._process.send_signal(number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=10)
        self.end_rest()

    def end_rest(self) -> None:
        """SIGTERM for its process group; what doesn't end in the time that runs have to stop is killed."""
        deadline = time.monotonic() + grace_seconds() + 10
        number = signal.SIGTERM
        while self._signal_group(number):
            while self._signal_group(None) and time.monotonic() < deadline:
                time.sleep(0.05)
            number = signal.SIGKILL
            deadline = time.monotonic() + 5

    def _signal_group(self, number: signal.Signals | None) -> bool:
        """Whether there is anybody left to get it. Reaps the child: a zombie is somebody, too."""
        assert self._process is not None
        self._process.poll()
        try:
            os.killpg(self._process.pid, number or 0)
        except ProcessLookupError:
            return False
        return True


def _how(status: int) -> str:
    return f"status {status}" if status >= 0 else f"killed by {signal.Signals(-status).name}"


def up(options: Options, say: Say) -> None:
    """Serve until SIGTERM or Ctrl-C. Raises ColdpressError when it can't begin."""
    address = options.address if options.own_server else _given_address()
    if options.own_server:
        _check_port(options.host, options.port)
    os.environ.update(_settings(f"{address}/api", options))
    grace_seconds()  # a wrong value is better told now
    children: list[Child] = []
    with _heeding_signals():
        try:
            if options.own_server:
                children.append(_start_server(options, address, say))
            _prepare(options)
            worker = ["worker", "start", "--pool", options.pool, "--type", "process", "--limit", str(options.limit)]
            # Killed and not asked to stop: see above.
            children.append(Child("worker", _prefect(*worker), signal.SIGKILL, None))
            children[-1].start()
            _welcome(address, options, say)
            threading.Thread(target=keep_showing, args=(threading.Event(), say), daemon=True).start()
            _watch(children, say)
        except _Stop:
            say("ending: runs keep their work and go on with the next `coldpress up`")
        finally:
            with _deaf():
                for child in reversed(children):
                    child.end(signal.SIGKILL if child.name == "worker" else signal.SIGTERM)


def _watch(children: Sequence[Child], say: Say) -> NoReturn:
    """Keep the children alive, and crashed runs scheduled."""
    from prefect.client.orchestration import get_client

    looked = time.monotonic()
    crashed: dict[UUID, float] = {}
    with get_client(sync_client=True) as client:
        while True:
            time.sleep(0.2)
            for child in children:
                child.look(say)
            if time.monotonic() - looked > _SECONDS_BETWEEN_LOOKS:
                looked = time.monotonic()
                with contextlib.suppress(httpx.HTTPError):  # the server is away; the next time, then
                    schedule_crashed(client, crashed)


def _settings(api: str, options: Options) -> Mapping[str, str]:
    """Environment variables for the children, and for the client in this process."""
    folder = os.path.dirname(sys.executable)
    settings = {
        "PREFECT_API_URL": api,
        "DO_NOT_TRACK": "1",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": str(options.heartbeat),
        "PATH": f"{folder}{os.pathsep}{os.environ.get('PATH', os.defpath)}",  # runs start as `python -m prefect.engine`
    }
    defaults = {
        "PREFECT_WORKER_QUERY_SECONDS": "2",
        # Kept in memory, they would be lost, and slots with them, when the server is started again.
        "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
        "PREFECT_SERVER_LOGGING_LEVEL": "WARNING",
        # Else the dashboard calls the API at an address that may be good on this machine only.
        "PREFECT_UI_API_URL": "/api",
    }
    if options.own_server and (secret := os.environ.get("PREFECT_SERVER_API_AUTH_STRING")):
        defaults["PREFECT_API_AUTH_STRING"] = secret  # its own worker may come in
    return {**{name: value for name, value in defaults.items() if name not in os.environ}, **settings}


def _prefect(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "prefect", *arguments]


def _given_address() -> str:
    api = os.environ.get("PREFECT_API_URL", "")
    if not api:
        raise ColdpressError("--no-server uses the server at PREFECT_API_URL, which is not set")
    return api.rstrip("/").removesuffix("/api")


def _check_port(host: str, port: int) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            advice = "another `coldpress up`, perhaps; --port takes another, --no-server the server at PREFECT_API_URL"
            raise ColdpressError(f"can't listen on {host}, port {port}: {error.strerror} ({advice})") from error


def _start_server(options: Options, address: str, say: Say) -> Child:
    from prefect.settings import PREFECT_HOME

    path = Path(PREFECT_HOME.value()) / "coldpress-server.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    command = _prefect("server", "start", "--host", options.host, "--port", str(options.port))
    child = Child("server", command, signal.SIGTERM, path.open("ab"))
    child.start()
    try:
        _wait_until_healthy(child, address, path)
    except BaseException:
        child.end(signal.SIGTERM)
        raise
    return child


def _wait_until_healthy(child: Child, address: str, log: Path) -> None:
    deadline = time.monotonic() + _SECONDS_TO_START
    while time.monotonic() < deadline:
        if how := child.died():
            raise ColdpressError(f"the Prefect server did not start: {how}; it says why at the end of {log}")
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(f"{address}/api/health", timeout=2).status_code == 200:
                return
        time.sleep(0.2)
    raise ColdpressError(f"the Prefect server did not answer within {_SECONDS_TO_START:.0f} seconds; see {log}")


def _prepare(options: Options) -> None:
    from prefect.client.orchestration import get_client

    from .prefect_server import reach_server

    reach_server()
    with get_client(sync_client=True) as client:
        prepare_server(client, options.pool, options.heartbeat)


def _welcome(address: str, options: Options, say: Say) -> None:
    pool = f" --pool {options.pool}" if options.pool != "coldpress" else ""
    say(f"dashboard: {address}")
    say("in another terminal:")
    say(f"  export PREFECT_API_URL={address}/api")
    if os.environ.get("PREFECT_API_AUTH_STRING"):
        say("  export PREFECT_API_AUTH_STRING=…   # the user:password of this server")
    say(f"  coldpress submit RECIPE{pool}")
    say("Ctrl-C ends it; what runs keeps its work")


@contextlib.contextmanager
def _heeding_signals() -> Iterator[None]:
    def stop(number: int, frame: Any) -> None:
        raise _Stop

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _deaf() -> Iterator[None]:
    """While children are being ended, a second signal changes nothing: it takes a bounded time."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    yield
