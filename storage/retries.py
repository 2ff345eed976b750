"""Requests to a remote store that fail: which are made again, how often, and what is said in the end.

What may pass (a lost connection, a time-out, 429, 5xx) is tried `TRIES` times, with waits that double and are partly
random, so that many clients don't come back at the same moment. What won't pass (403, a bucket that isn't there,
an endpoint that was never reached) is at once a StoreError with the object's URL and what to do about it.
"""

from __future__ import annotations

import errno
import http.client
import logging
import math
import os
import random
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from .errors import StoreError

T = TypeVar("T")

TRIES = 10
FIRST_WAIT, LONGEST_WAIT = 0.1, 10.0
TIMEOUT = "COLDPRESS_REMOTE_TIMEOUT_SECONDS"
_TELL_AT = 4  # failures of one request before the log says that it is still being tried
_SLOWEST = 64 * 1024  # bytes a second; a transfer below it counts as hanging

logger = logging.getLogger("coldpress")
_dice = random.Random()  # not the global one, whose state belongs to the stages

_CONDITIONS = {408, 409, 425, 429}
_CODES_THAT_PASS = {"RequestTimeout", "SlowDown", "IncompleteBody", "BadDigest", "XAmzContentSHA256Mismatch"}
_ERRORS_THAT_PASS = {
    "botocore.exceptions.HTTPClientError",
    "botocore.exceptions.IncompleteReadError",
    "botocore.exceptions.FlexibleChecksumError",
    "botocore.parsers.ResponseParserError",
    "aiohttp.client_exceptions.ClientError",
}
_NEVER_REACHED = {
    "botocore.exceptions.EndpointConnectionError",
    "botocore.exceptions.SSLError",
    "botocore.exceptions.ProxyConnectionError",
    "aiohttp.client_exceptions.ClientConnectorError",
}
_MISCONFIGURED = {"botocore.exceptions.BotoCoreError", "botocore.exceptions.ClientError"}
_NUMBERS_THAT_PASS = {
    errno.EAGAIN, errno.EBUSY, errno.ECONNABORTED, errno.ECONNREFUSED, errno.ECONNRESET, errno.EHOSTUNREACH,
    errno.ENETUNREACH, errno.EPIPE, errno.ETIMEDOUT,
}  # fmt: skip

_CREDENTIALS = (
    "check the credentials (AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY; for other stores their own) "
    "and that they may list, read, write and delete there"
)
_ENDPOINT = "check the endpoint (AWS_ENDPOINT_URL) and the network"
_REGION = "the bucket seems to be in another region; set AWS_DEFAULT_REGION to it"
_ADVICE = {
    "NoSuchBucket": "there is no such bucket; create it, or correct the store's URL (--store or COLDPRESS_STORE)",
    "403": _CREDENTIALS,
    "401": _CREDENTIALS,
    "ExpiredToken": _CREDENTIALS,
    "NoCredentialsError": _CREDENTIALS,
    "PartialCredentialsError": _CREDENTIALS,
    "EndpointConnectionError": _ENDPOINT,
    "SSLError": _ENDPOINT,
    "ProxyConnectionError": _ENDPOINT,
    "ClientConnectorError": _ENDPOINT,
    "ValueError": _ENDPOINT,
    "301": _REGION,
    "AuthorizationHeaderMalformed": _REGION,
}


class NotSupported(StoreError):
    """The store's server or driver doesn't know this kind of request."""


def timeout_seconds() -> float:
    """How long a request may go without an answer: $COLDPRESS_REMOTE_TIMEOUT_SECONDS, 60 by default."""
    text = os.environ.get(TIMEOUT, "60")
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise StoreError(f"{TIMEOUT} is {text!r}; write a number of seconds")
    return seconds


def limit_seconds(size: int = 0) -> float:
    """How long a request with so many bytes may take as a whole."""
    return timeout_seconds() + size / _SLOWEST


class Requests:
    """The requests to one remote store, made again when they fail in a way that may pass."""

    def __init__(self) -> None:
        self._answered = False

    def make(self, request: Callable[[], T], what: str) -> T:
        """The request's result. `what` names it in errors: "read s3://bucket/key".

        Raises FileNotFoundError and FileExistsError as they come; NotSupported; StoreError for everything else.
        """
        began = time.monotonic()
        for failures in range(1, TRIES + 1):
            try:
                result = request()
            except Exception as error:
                if not self._may_pass(error, what):
                    raise
                if failures == TRIES:
                    took = time.monotonic() - began
                    raise StoreError(
                        f"could not {what}: {_reason(error)}; gave up after {TRIES} tries in {took:.0f} s. When the "
                        "store answers again, run the same command: finished work is kept"
                    ) from error
                if failures == _TELL_AT:
                    logger.warning("could not %s %d times (%s); still trying", what, failures, _reason(error))
                time.sleep(min(FIRST_WAIT * 2 ** (failures - 1), LONGEST_WAIT) * _dice.uniform(0.5, 1))
            else:
                self._answered = True
                return result
        raise AssertionError("unreachable")

    def _may_pass(self, error: Exception, what: str) -> bool:
        """Whether to try again; False to hand the error on as it is. Raises StoreError where a person must act."""
        code, status = answer(error)
        self._answered = self._answered or bool(status)
        names = set(_names(error))
        if status == 501 or isinstance(error, NotImplementedError):
            raise NotSupported(f"could not {what}: the store doesn't support it ({_reason(error)})") from error
        if isinstance(error, FileNotFoundError | FileExistsError) and code != "NoSuchBucket":
            return False
        if names & _NEVER_REACHED and not self._answered:
            raise _final(error, what)
        if status >= 500 or status in _CONDITIONS or code in _CODES_THAT_PASS:
            return True
        if not status and (
            names & _ERRORS_THAT_PASS
            or isinstance(error, ConnectionError | TimeoutError | http.client.HTTPException)
            or getattr(error, "errno", None) in _NUMBERS_THAT_PASS
        ):
            return True
        if status or names & _MISCONFIGURED or isinstance(error, OSError) or "Invalid endpoint" in str(error):
            raise _final(error, what)
        return False


def answer(error: BaseException | None) -> tuple[str, int]:
    """The code and HTTP status that a server answered with: ("NoSuchBucket", 404); ("", 0) when there was none."""
    for each in _chain(error):
        response = getattr(each, "response", None)
        if isinstance(response, dict):
            code = str(response.get("Error", {}).get("Code", ""))
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
            return code, int(status) or (int(code) if code.isdecimal() else 0)
        for name in ("status", "code"):
            value = getattr(each, name, None)
            if isinstance(value, int) and 400 <= value < 600:
                return str(value), value
    return "", 0


def _final(error: Exception, what: str) -> StoreError:
    code, status = answer(error)
    hints = (_ADVICE.get(key) for key in (code, str(status), type(error).__name__))
    advice = next((hint for hint in hints if hint), "")
    return StoreError(f"could not {what}: {_reason(error)}{advice and f'; {advice}'}")


def _reason(error: Exception) -> str:
    """What went wrong, in a few words, with the server's code for it."""
    code, status = answer(error)
    text = (getattr(error, "strerror", None) or str(error) or type(error).__name__).strip().rstrip(".")
    tags = " ".join(dict.fromkeys(str(tag) for tag in (status, code) if tag))
    return f"{text} ({tags})" if tags else text


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _names(error: Exception) -> Iterator[str]:
    """The full names of the error's classes: the drivers' own are known by name, so that none need be installed."""
    for each in type(error).__mro__:
        yield f"{each.__module__}.{each.__qualname__}"
