"""A limit on device time: metered while stages have a device, over all attempts at a recipe, and kept in the store.

    spent/<account>/<run>-<attempt>     what one attempt has used, rewritten every half minute and at its end

Each attempt writes a record of its own, so those that run side by side lose nothing of each other's; `kill -9` costs
the seconds since the last one. When a run has finished all stages its account is closed, and the next one begins at
nothing.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator

from ..storage.digests import digest_of, seal, unseal
from ..storage.errors import StoreError
from ..storage.store import Store
from ..tasks.stage import Preempted
from .recipe import Recipe

logger = logging.getLogger("coldpress")

SECONDS_BETWEEN_RECORDS = 30.0
SECONDS_BETWEEN_LOOKS = 0.5


def account_of(recipe: Recipe) -> str:
    """Where attempts at a recipe are counted together: equal for equal stages, whatever file they come from."""
    nodes = [
        [node.name, node.stage.name, node.parameters.model_dump(mode="json"), dict(node.inputs)]
        for node in recipe.nodes
    ]
    return digest_of([recipe.name, nodes])


class Budget:
    """The device time that a run may still use, for its threads.

    allowed: seconds, of all attempts together. `attempt` names this one. Two stages at once use two seconds a second.
    clock: seconds that never go back.
    """

    def __init__(
        self,
        store: Store,
        account: str,
        attempt: str,
        allowed: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._folder = f"spent/{account}"
        self._path = f"{self._folder}/{attempt}"
        self.allowed = allowed
        self._clock = clock
        self._lock = threading.Lock()
        self._others = self._spent_by_others()
        self._spent = 0.0
        self._recorded = 0.0
        self._holders = 0
        self._at = clock()
        self._over: Callable[[], None] = lambda: None
        self._told = False

    @property
    def used(self) -> float:
        """Seconds, of all attempts."""
        with self._lock:
            self._advance()
            return self._others + self._spent

    @contextlib.contextmanager
    def metered(self) -> Iterator[None]:
        """A stage has a device. Raises Preempted when nothing is left to use it with."""
        if self._is_over():
            raise Preempted(used_up(self.used, self.allowed))
        self._count(1)
        try:
            yield
        finally:
            self._count(-1)

    @contextlib.contextmanager
    def watched(self, over: Callable[[], None]) -> Iterator[None]:
        """Call `over`, once, when it is used up, and keep the record up to date."""
        self._over = over
        ended = threading.Event()
        thread = threading.Thread(target=self._watch, args=(ended,), name="budget", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            self._record()

    def close(self) -> None:
        """Forget what was used: all is done."""
        for path, _ in list(self._store.files.list(self._folder)):
            with contextlib.suppress(FileNotFoundError):  # another run of it ends too
                self._store.files.delete(path)

    def _watch(self, ended: threading.Event) -> None:
        recorded = self._clock()
        while not ended.wait(SECONDS_BETWEEN_LOOKS):
            if self._holders:  # with nothing left, what needs no device still goes on
                self._is_over()
            if self._clock() - recorded >= SECONDS_BETWEEN_RECORDS:
                recorded = self._clock()
                self._record()
                self._hear_of_others()

    def _is_over(self) -> bool:
        is_over = self.used >= self.allowed
        with self._lock:
            tell = is_over and not self._told
            self._told = self._told or is_over
        if tell:
            self._over()
        return is_over

    def _count(self, change: int) -> None:
        with self._lock:
            self._advance()
            self._holders += change

    def _advance(self) -> None:
        now = self._clock()
        self._spent += (now - self._at) * self._holders
        self._at = now

    def _hear_of_others(self) -> None:
        """What others use meanwhile, on other machines, comes off too."""
        try:
            others = self._spent_by_others()
        except StoreError as error:
            logger.warning("device time that others used could not be read: %s", error)
            return
        with self._lock:
            self._others = others

    def _spent_by_others(self) -> float:
        seconds = 0.0
        for path, _ in self._store.files.list(self._folder):
            if path != self._path:
                with contextlib.suppress(FileNotFoundError):  # another run of it has just ended
                    seconds += float(unseal(self._store.files.read(path), path)["seconds"])
        return seconds

    def _record(self) -> None:
        with self._lock:
            self._advance()
            spent = self._spent
        if spent == self._recorded:
            return
        try:
            self._store.files.replace(self._path, [seal({"seconds": round(spent, 3)})])
            self._recorded = spent
        except StoreError as error:
            logger.warning("used device time could not be recorded: %s", error)


def used_up(used: float, allowed: float) -> str:
    """What a person is told then, in seconds of device time."""
    return (
        f"the budget is used up: {in_words(used)} of device time, and {in_words(allowed)} are allowed; finished work "
        "is kept, and a larger --budget goes on from there"
    )


def in_words(seconds: float) -> str:
    """ "90 s", "45.5 min", "12 h"."""
    if seconds < 120:
        return f"{seconds:.3g} s"
    if seconds < 7200:
        return f"{seconds / 60:.4g} min"
    return f"{seconds / 3600:.5g} h"
