"""Telling people: a webhook, or mail, when a submitted run fails, or is interrupted again and again.

What the webhook is sent has a `text`, which Slack, Mattermost and the like show. The addresses are secrets, and kept as
such: in blocks that the server encrypts. A stock Prefect server does all of it, without coldpress.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

from ..storage.errors import ColdpressError
from .deployment import FLOW, ensure_automation, events, trigger

if TYPE_CHECKING:
    from uuid import UUID

    from prefect.client.orchestration import SyncPrefectClient
    from prefect.events import AutomationCore

WEBHOOK_BLOCK, MAIL_BLOCK = "coldpress-notifications", "coldpress-mail"
_SECONDS = 24 * 3600  # in which interruptions are counted
_RUN = "coldpress run {{ flow_run.name }}"
_PAGE = "{{ (flow_run|ui_url) or '' }}"  # the server knows it when it has PREFECT_UI_URL or PREFECT_API_URL
_MAIL = """\
{run} {what}.

It is {{{{ flow_run.state.name }}}}: {{{{ flow_run.state.message }}}}

{page}

attempts: {{{{ flow_run.run_count }}}}
tags: {{{{ flow_run.tags|join(", ") }}}}

All finished work is kept. `coldpress logs {{{{ flow_run.id }}}}` has what it said; `coldpress submit` of the same
recipe goes on from what it has finished.
"""


def notify_by_webhook(client: SyncPrefectClient, url: str, interruptions: int) -> None:
    """Have the server call `url`; asked again it changes what differs. Raises ColdpressError."""
    from prefect.blocks.webhook import Webhook
    from prefect.events.actions import CallWebhook
    from pydantic import SecretStr

    if not url.startswith(("http://", "https://")):
        raise ColdpressError("--webhook takes an address that begins with https:// (or http://)")
    block = cast("UUID", Webhook(method="POST", url=SecretStr(url)).save(WEBHOOK_BLOCK, overwrite=True))

    def call(what: str) -> CallWebhook:
        text = f"{_RUN} {what} {_PAGE}"
        return CallWebhook(block_document_id=block, payload=json.dumps({"text": text}))

    _ensure(client, call, "", interruptions)


def notify_by_mail(client: SyncPrefectClient, url: str, interruptions: int) -> None:
    """Have the server send mail; `url` names the mail server, and who gets it. As `notify_by_webhook`."""
    from apprise import Apprise
    from prefect.blocks.notifications import SlackWebhook
    from prefect.events.actions import SendNotification
    from pydantic import SecretStr

    if not url.startswith(("mailto://", "mailtos://")) or Apprise.instantiate(url) is None:
        raise ColdpressError(
            "--mail takes an address like 'mailtos://user:password@smtp.example.org?to=team@example.org'"
        )
    url += "" if "format=" in url else "&format=text" if "?" in url else "?format=text"  # HTML would lose its lines
    # Prefect has no block for mail; this one hands what is no address of Slack's to Apprise, which sends mail.
    block = cast("UUID", SlackWebhook(url=SecretStr(url)).save(MAIL_BLOCK, overwrite=True))

    def send(what: str) -> SendNotification:
        subject, body = f"{_RUN} {what}", _MAIL.format(run=_RUN, page=_PAGE, what=what)
        return SendNotification(block_document_id=block, subject=subject, body=body)

    _ensure(client, send, " by mail", interruptions)


def _ensure(client: SyncPrefectClient, act: Callable[[str], Any], how: str, interruptions: int) -> None:
    flow_id = client.create_flow_from_name(FLOW)
    for automation in notifications(flow_id, act, how, interruptions):
        ensure_automation(client, automation)


def notifications(
    flow_id: UUID, act: Callable[[str], Any], how: str = "", interruptions: int = 3
) -> list[AutomationCore]:
    """When people are told. act: the action for what has happened to a run, a few words.

    They listen to nothing that the automations of `deployment.py` act on at once.
    """
    from prefect.events import AutomationCore

    return [
        AutomationCore(
            name=f"coldpress: tell of a failed run{how}",
            description="Made by `coldpress prepare`.",
            trigger=trigger(flow_id, expect=events("Failed")),
            actions=[act("has failed")],
        ),
        AutomationCore(
            name=f"coldpress: tell of a run that is interrupted again and again{how}",
            description="By pre-emption or crash, within a day. Made by `coldpress prepare`.",
            trigger=trigger(flow_id, expect=events("AwaitingRetry"), threshold=interruptions, within=_SECONDS),
            actions=[act(f"was interrupted {interruptions} times within a day")],
        ),
    ]
