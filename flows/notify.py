"""Telling people: a webhook that the server calls when a submitted run fails, or is interrupted again and again.

What it is sent has a `text`, which Slack, Mattermost and the like show. The address is a secret, and kept as one: in a
block that the server encrypts.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, cast

from ..storage.errors import ColdpressError
from .deployment import FLOW, ensure_automation, events, trigger

if TYPE_CHECKING:
    from uuid import UUID

    from prefect.client.orchestration import SyncPrefectClient
    from prefect.events import AutomationCore
    from prefect.events.actions import CallWebhook

BLOCK = "coldpress-notifications"
_SECONDS = 24 * 3600  # in which interruptions are counted


def notify(client: SyncPrefectClient, url: str, interruptions: int) -> None:
    """Have the server call `url`; asked again it changes what differs. Raises ColdpressError."""
    from prefect.blocks.webhook import Webhook
    from pydantic import SecretStr

    if not url.startswith(("http://", "https://")):
        raise ColdpressError("--webhook takes an address that begins with https:// (or http://)")
    block = cast("UUID", Webhook(method="POST", url=SecretStr(url)).save(BLOCK, overwrite=True))
    flow_id = client.create_flow_from_name(FLOW)
    for automation in notifications(flow_id, block, interruptions):
        ensure_automation(client, automation)


def notifications(flow_id: UUID, block: UUID, interruptions: int) -> list[AutomationCore]:
    """They listen to nothing that the automations of `deployment.py` act on at once."""
    from prefect.events import AutomationCore

    return [
        AutomationCore(
            name="coldpress: tell of a failed run",
            description="Calls the webhook given to `coldpress prepare --webhook`.",
            trigger=trigger(flow_id, expect=events("Failed")),
            actions=[_call(block, "failed")],
        ),
        AutomationCore(
            name="coldpress: tell of a run that is interrupted again and again",
            description="By pre-emption or crash, within a day.",
            trigger=trigger(flow_id, expect=events("AwaitingRetry"), threshold=interruptions, within=_SECONDS),
            actions=[_call(block, f"was interrupted {interruptions} times within a day; it goes on")],
        ),
    ]


def _call(block: UUID, what: str) -> CallWebhook:
    from prefect.events.actions import CallWebhook

    text = f"coldpress run {{{{ flow_run.name }}}} {what} {{{{ flow_run|ui_url }}}}"
    return CallWebhook(block_document_id=block, payload=json.dumps({"text": text}))
