"""What stages that go on where they ended share: how often they save their state, and what they say of it."""

from __future__ import annotations

import time

from ..storage.journal import Journal
from .stage import Run


def note_resumed(run: Run, journal: Journal, blocks: int, recomputed: int) -> None:
    """Put into the provenance where a stage goes on that had been begun before, and what the work until then took."""
    if journal.steps:
        before = round(sum(step["seconds"] for step in journal.steps), 3)
        note = {"from_block": len(journal.steps), "of": blocks, "recomputed_blocks": recomputed}
        run.note("resumed", {**note, "seconds_before": before})


class SavingPace:
    """When to save activations: as often as takes SHARE of the time, by what saving took when it was last done."""

    SHARE = 0.02
    FIRST_GUESS = 100e6  # bytes a second

    def __init__(self, nbytes: int) -> None:
        self._cost = nbytes / self.FIRST_GUESS
        self._since = time.monotonic()

    def due(self) -> bool:
        """Whether enough time has gone by since the last saving."""
        return (time.monotonic() - self._since) * self.SHARE >= self._cost

    def __enter__(self) -> None:
        self._since = time.monotonic()

    def __exit__(self, *_: object) -> None:
        now = time.monotonic()
        self._cost, self._since = now - self._since, now
