"""Devices of a machine as Prefect's global concurrency limits, one for each, of which a stage holds the only slot.

A slot is leased for a minute and the lease renewed while the stage computes: whatever dies, by `kill -9` too, the slot
is free again when the lease has run out and the server has looked for such (each 15 s). The server must keep leases
where a restart doesn't lose them; `coldpress up` sees to it.

Prefect's own `concurrency()` waits up to 30 s between tries and can't be told to stop, hence these calls of its client.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import httpx

from ..storage.errors import ColdpressError

if TYPE_CHECKING:
    from uuid import UUID

logger = logging.getLogger("coldpress")

LEASE_SECONDS = 60.0  # Prefect's least
SECONDS_BETWEEN_RENEWALS = 15.0
_PREFIX = "coldpress-device"
_LOCKED, _GONE = 423, 410


def limit_name(device: str, host: str | None = None) -> str:
    """What the limit of a device is called on the server."""
    return f"{_PREFIX} {host or socket.gethostname()} {device}"


def device_of(limit: str) -> tuple[str, str] | None:
    """The inverse of `limit_name`: (host, device); None if it isn't one of ours."""
    prefix, _, rest = limit.partition(" ")
    host, _, device = rest.rpartition(" ")
    return (host, device) if prefix == _PREFIX and host else None


def device_note(device: str) -> dict[str, str]:
    """What the progress artifact of a stage says of the device that it has: {"host": …, "device": …, "since": …}."""
    return {"host": socket.gethostname(), "device": device, "since": datetime.now(UTC).isoformat(timespec="seconds")}


@dataclass
class DeviceLease:
    """A device taken. Renewed by a thread of its own until `over` is set."""

    id: UUID
    device: str
    over: threading.Event = field(default_factory=threading.Event)


class DeviceLimits:
    """This machine's devices on the server at PREFECT_API_URL; makes limits that aren't there."""

    def __init__(self, devices: Sequence[str]) -> None:
        from prefect.client.orchestration import get_client
        from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate
        from prefect.exceptions import ObjectAlreadyExists

        self._get_client = get_client
        with get_client(sync_client=True) as client:
            for device in devices:
                with contextlib.suppress(ObjectAlreadyExists):
                    client.create_global_concurrency_limit(
                        GlobalConcurrencyLimitCreate(name=limit_name(device), limit=1)
                    )

    def acquire(self, device: str, lost: Callable[[], None]) -> DeviceLease | None:
        """Take a device, or None if another stage has it, or the server can't be asked just now.

        `lost` is called should the server give it away.

        Raises ColdpressError when the server doesn't know the device any more.
        """
        from prefect.client.schemas.responses import ConcurrencyLimitWithLeaseResponse

        name = limit_name(device)
        with self._get_client(sync_client=True) as client:
            try:
                answer = client.increment_concurrency_slots_with_lease([name], 1, "concurrency", LEASE_SECONDS)
            except httpx.HTTPStatusError as error:
                if error.response.status_code == _LOCKED:
                    return None
                if error.response.is_client_error:
                    raise
                logger.warning("device %s could not be taken: %s", device, error)
                return None
            except httpx.TransportError as error:
                logger.warning("device %s could not be taken: %s", device, error)
                return None
        found = ConcurrencyLimitWithLeaseResponse.model_validate(answer.json())
        if not found.limits:
            raise ColdpressError(f"the server's concurrency limit '{name}' was deleted; run it again, it is made anew")
        lease = DeviceLease(found.lease_id, device)
        threading.Thread(target=self._renew, args=(lease, lost), name=f"lease of {device}", daemon=True).start()
        return lease

    def release(self, lease: DeviceLease) -> None:
        """Give a device back. When the server can't be told, it finds out when the lease runs out."""
        lease.over.set()
        try:
            with self._get_client(sync_client=True) as client:
                client.release_concurrency_slots_with_lease(lease.id)
        except httpx.HTTPError as error:
            logger.warning("device %s is free only in %g s: %s", lease.device, LEASE_SECONDS, error)

    def _renew(self, lease: DeviceLease, lost: Callable[[], None]) -> None:
        with self._get_client(sync_client=True) as client:
            while not lease.over.wait(SECONDS_BETWEEN_RENEWALS):
                try:
                    client.renew_concurrency_lease(lease.id, LEASE_SECONDS)
                except httpx.HTTPStatusError as error:
                    if error.response.status_code == _GONE and not lease.over.is_set():
                        lost()
                        return
                    logger.warning("the lease of device %s could not be renewed: %s", lease.device, error)
                except httpx.HTTPError as error:  # the server is away; while it is, nobody else gets the device
                    logger.warning("the lease of device %s could not be renewed: %s", lease.device, error)
