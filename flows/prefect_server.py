"""Prefect's server: whether one is configured, whether it answers, and Prefect's settings for a quiet client.

Importing this module does not import Prefect.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import tomllib
from collections.abc import Iterator
from pathlib import Path

from ..storage.errors import ColdpressError


class ServerAway(ColdpressError):
    """Prefect's server does not answer."""


def server_configured() -> bool:
    """Whether PREFECT_API_URL is set, in the environment or in Prefect's active profile. Does not import Prefect."""
    if os.environ.get("PREFECT_API_URL"):
        return True
    home = Path(os.environ.get("PREFECT_HOME") or Path.home() / ".prefect")
    path = Path(os.environ.get("PREFECT_PROFILES_PATH") or home / "profiles.toml")
    try:
        profiles = tomllib.loads(path.read_text())
    except FileNotFoundError:
        return False
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise ColdpressError(f"Prefect's {path} can't be read: {error}") from error
    name = os.environ.get("PREFECT_PROFILE") or profiles.get("active")
    settings = profiles.get("profiles", {}).get(name, {})
    return bool(settings.get("PREFECT_API_URL"))


def configure_prefect() -> None:
    """Quiet, and nothing phones home. Must come before Prefect is imported."""
    os.environ.setdefault("DO_NOT_TRACK", "1")
    os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
    os.environ.setdefault("PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW", "ignore")
    # Prefect's own lines stay off the terminal; they still reach the server.
    os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")
    os.environ.setdefault("PREFECT_LOGGING_INTERNAL_LEVEL", "CRITICAL")
    if not server_configured():
        os.environ.setdefault("PREFECT_SERVER_ALLOW_EPHEMERAL_MODE", "true")
        os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "120")
        os.environ.setdefault("PREFECT_SERVER_LOGGING_LEVEL", "CRITICAL")


def reach_server() -> None:
    """Raises ServerAway when Prefect's server doesn't answer, ColdpressError when it refuses or none can be started."""
    from prefect.client.orchestration import get_client

    try:
        with _deaf_to_interrupts(), answers_as_sentences(), get_client(sync_client=True) as client:
            client.hello()
    except RuntimeError as error:
        raise ColdpressError(f"Prefect's temporary server did not start: {error}") from error


@contextlib.contextmanager
def _deaf_to_interrupts() -> Iterator[None]:
    """Processes begun in here never see Ctrl-C, which a terminal sends to them too; this one sees it afterwards.

    Prefect's temporary server is to be there until the run has told it how it ended.
    """
    if not hasattr(signal, "pthread_sigmask") or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def answers_as_sentences() -> Iterator[None]:
    """What the server refuses, fails at or leaves unanswered within is raised as ColdpressError."""
    import httpx
    from prefect.settings import PREFECT_API_URL

    url = PREFECT_API_URL.value()
    try:
        yield
    except httpx.HTTPStatusError as error:
        if error.response.status_code in (401, 403):
            refusal = f"the Prefect server at {url} refuses: it wants PREFECT_API_AUTH_STRING to be"
            raise ColdpressError(f"{refusal} set to the user:password that it was started with") from error
        if error.response.status_code == 503:
            raise ServerAway(f"the Prefect server at {url} is too busy to answer; try again") from error
        raise ColdpressError(f"the Prefect server at {url} answers with an error: {error}") from error
    except httpx.HTTPError as error:
        if not url:
            raise ColdpressError(f"Prefect's temporary server did not start: {error}") from error
        advice = "start it there (`coldpress up`), or unset PREFECT_API_URL and `coldpress run` works without one"
        raise ServerAway(f"the Prefect server at {url} does not answer; {advice}") from error
