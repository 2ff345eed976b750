"""What a person reads of stages and runs on the dashboard: provenance, and the report.

The dashboard is for looking: that its server is away, or restarted, is logged and fails nothing.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from statistics import fmean
from typing import TYPE_CHECKING

from ..storage.store import Action
from .recipe import Node
from .result import RunResult

if TYPE_CHECKING:
    from prefect.settings import Settings

logger = logging.getLogger("coldpress")

_BARS = "▁▂▃▄▅▆▇█"


class Dashboard:
    """Where a run shows what it does. A server that can't be reached is left alone for a while: stages don't wait."""

    _LEFT_ALONE_SECONDS = 60.0
    _LEFT_ALONE_TIMES = 10.0  # as long as it has kept a stage waiting

    def __init__(self) -> None:
        self._ask_again = 0.0

    def show(self, what: str, call: Callable[[], None]) -> None:
        """Make a call that puts something there; a warning when it can't be."""
        import httpx
        from prefect.exceptions import ObjectNotFound

        began = time.monotonic()
        if began < self._ask_again:
            return
        try:
            with self._impatient():
                call()
        except (httpx.HTTPError, ObjectNotFound) as error:
            text = f"{what} is not on the dashboard: {error or type(error).__name__}"
            if isinstance(error, httpx.TransportError):
                now = time.monotonic()
                pause = max(self._LEFT_ALONE_SECONDS, self._LEFT_ALONE_TIMES * (now - began))
                self._ask_again = now + pause
                text += f"; for {pause:.0f} s nothing will be"
            logger.warning(text)

    def _impatient(self) -> contextlib.AbstractContextManager[object]:
        """Within it a request is made again once at most."""
        from prefect.context import SettingsContext, get_settings_context

        return SettingsContext(profile=get_settings_context().profile, settings=self._settings)

    @functools.cached_property
    def _settings(self) -> Settings:
        # Made once a run: Prefect takes a tenth of a second for it, which stages would wait for at each block.
        from prefect.context import get_settings_context
        from prefect.settings import PREFECT_CLIENT_MAX_RETRIES

        return get_settings_context().settings.copy_with_update(updates={PREFECT_CLIENT_MAX_RETRIES: 1})


def provenance_markdown(node: Node, action: Action, state: str) -> str:
    """What the dashboard shows of a stage's result."""
    provenance = action.provenance
    rows = [
        ("stage", f"{node.stage.name} (version {node.stage.version})"),
        ("state", state),
        ("artifact", f"`{action.artifact.kind}` `{action.artifact.id}`"),
        ("key", f"`{action.key}`"),
        ("parameters", f"`{json.dumps(action.preimage['parameters'])}`"),
        *((f"input {role}", f"`{artifact}`") for role, artifact in action.preimage["inputs"].items()),
        *([("attempt", provenance["attempt"])] if provenance.get("attempt", 1) > 1 else []),
        *([("resumed", resumed_from(action))] if "resumed" in provenance else []),
        *([("loss", loss_curve(losses))] if (losses := provenance.get("training", {}).get("losses")) else []),
        ("computing took", f"{provenance.get('seconds', 0):.1f} s"),
        ("peak memory", f"{provenance.get('peak_memory_bytes', 0) / 1e6:.0f} MB"),
        ("device", f"{provenance.get('device')} on {provenance.get('host')}, {provenance.get('started')}"),
        ("versions", ", ".join(f"{name} {version}" for name, version in provenance.get("versions", {}).items())),
        ("commit", provenance.get("commit") or "-"),
        *(("warning", warning) for warning in provenance.get("warnings", [])),
    ]
    lines = [f"| {name} | {str(value).replace('|', '/')} |" for name, value in rows]
    return "\n".join([f"### {node.name}", "", "| | |", "| --- | --- |", *lines])


def loss_curve(losses: Sequence[float], width: int = 40) -> str:
    """ "6.611 █▆▄▃▂▁ 3.216 in 60 steps": at most `width` bars, each the mean of as many steps as the others."""
    count = min(width, len(losses))
    cuts = [len(losses) * number // count for number in range(count + 1)]
    means = [fmean(losses[first:end]) for first, end in pairwise(cuts)]
    low, spread = min(means), max(means) - min(means) or 1.0
    bars = "".join(_BARS[round((mean - low) / spread * (len(_BARS) - 1))] for mean in means)
    return f"{losses[0]:.3f} {bars} {losses[-1]:.3f} in {len(losses)} steps"


def resumed_from(action: Action) -> str:
    """ "from block 12 of 30, activations recomputed through 3", "from step 40 of 200", or "from answer 40 of 200"."""
    resumed = action.provenance["resumed"]
    if "from_step" in resumed:
        phase = f" of phase {resumed['phase']}" if "phase" in resumed else ""
        return f"from step {resumed['from_step']} of {resumed['of']}{phase}"
    if "from_answer" in resumed:
        return f"from answer {resumed['from_answer']} of {resumed['of']}"
    text = f"from block {resumed['from_block']} of {resumed['of']}"
    if resumed["recomputed_blocks"]:
        text += f", activations recomputed through {resumed['recomputed_blocks']}"
    return text


def show_report(result: RunResult, dashboard: Dashboard) -> None:
    """Make the comparison table, and what to beware of in reading it, an artifact of the present flow run."""
    if not result.variants:
        return
    from prefect.artifacts import create_markdown_artifact

    from ..tasks.reporting.page import markdown

    ending = f"run `{result.run}`, attempt {result.attempt}, store `{result.store}`"

    def show() -> None:
        create_markdown_artifact(
            markdown=f"{markdown(result.to_json())}\n{ending}",
            key=artifact_key(f"{result.recipe}-report"),
            description=f"report of {result.recipe}",
        )

    dashboard.show("the report", show)


def artifact_key(text: str) -> str:
    """The text as a Prefect artifact key: small letters, digits and dashes."""
    kept = "".join(letter if letter.isalnum() and letter.isascii() else "-" for letter in text.lower())
    return "-".join(part for part in kept.split("-") if part)
