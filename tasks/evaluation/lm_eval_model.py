"""lm-eval's own `transformers` backend, whose answers go into the stage's journal as it gives them.

lm-eval sorts requests by length and answers them batch by batch, so what is journaled at the end of a batch is a
beginning of that order: asked for the rest alone, it forms the same batches again, and gives the same answers.
"""

from __future__ import annotations

import collections
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM

from ...storage.digests import canonical_json, sha256
from ..stage import Run, StageError

COMMIT_EVERY = 5.0  # seconds
REPORT_EVERY = 1.0  # seconds
WHAT = {
    "loglikelihood": "log-likelihoods",
    "generate_until": "generated answers",
    "loglikelihood_rolling": "windows of text",
}


class JournaledModel(HFLM):
    """A model as lm-eval asks it. What an earlier attempt has answered is not asked again.

    Answers are known by what was asked, in the order in which they were given, so that equal requests, which may fall
    into different batches, keep theirs. Sampled texts are not journaled: they depend on all that were drawn before.
    """

    def __init__(self, run: Run, model: Any, tokenizer: Any, batch_size: int) -> None:
        super().__init__(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size)
        assert run.journal is not None
        self._run = run
        self._journal = run.journal
        self._known: dict[str, collections.deque[Any]] = collections.defaultdict(collections.deque)
        for step in self._journal.steps:
            for key, answer in step["answers"]:
                self._known[key].append(answer)
        self._pending: list[tuple[str, Any]] = []
        self._committed = self._reported = time.monotonic()
        self._kind, self._done, self._total = "", 0, 0
        self.taken_over, self.asked = 0, 0
        self.set_cache_hook(_Listener(self._heard))

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """(log-likelihood in nats, whether it is what greedy decoding gives) for each (context, continuation)."""
        ask = super().loglikelihood
        found = self._answer("loglikelihood", requests, lambda rest: ask(rest, disable_tqdm=True))
        return [(likelihood, greedy) for likelihood, greedy in found]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        """The text generated for each (context, settings)."""
        ask = super().generate_until
        return self._answer("generate_until", requests, lambda rest: ask(rest, disable_tqdm=True))

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
        """The log-likelihood in nats of each whole text; its windows are what is journaled."""
        windows = sum(-(-len(self.tok_encode(request.args[0])) // self.max_length) for request in requests)
        self._begin("loglikelihood_rolling", windows)
        found: list[float] = super().loglikelihood_rolling(requests, disable_tqdm=True)
        self._commit()
        return found

    def _loglikelihood_tokens(
        self, requests: Sequence[Any], disable_tqdm: bool = True, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        ask = super()._loglikelihood_tokens
        if self._kind != "loglikelihood_rolling":
            return ask(requests, disable_tqdm=True, override_bs=override_bs)
        key = _key("windows", [[list(context), list(rest)] for _, context, rest in requests])
        if self._known[key]:
            answers = self._known[key].popleft()
            self.taken_over += len(answers)
        else:
            answers = ask(requests, disable_tqdm=True, override_bs=override_bs)
            self._pending.append((key, [list(_finite(answer)) for answer in answers]))
            self.asked += len(answers)
        self._done += len(answers)
        return [(likelihood, greedy) for likelihood, greedy in answers]

    def _model_call(self, *arguments: Any, **keywords: Any) -> torch.Tensor:
        self._between_batches()
        return super()._model_call(*arguments, **keywords)

    def _model_generate(self, *arguments: Any, **keywords: Any) -> torch.Tensor:
        self._between_batches()
        return super()._model_generate(*arguments, **keywords)

    def _answer(self, kind: str, requests: list[Any], ask: Callable[[list[Any]], list[Any]]) -> list[Any]:
        """Answers to all requests, in their order: from the journal, or asked for now."""
        self._begin(kind, len(requests))
        answers: list[Any] = []
        left: list[int] = []
        for place, request in enumerate(requests):
            known = self._known[_key(kind, request.args)]
            answers.append(known.popleft() if known else None)
            if answers[-1] is None:
                left.append(place)
        self._done = len(requests) - len(left)
        self.taken_over += self._done
        self.asked += len(left)
        if left:
            for place, answer in zip(left, ask([requests[place] for place in left]), strict=True):
                answers[place] = answer
            self._commit()
        return answers

    def _begin(self, kind: str, total: int) -> None:
        self._kind, self._done, self._total = kind, 0, total
        self._run.progress(WHAT[kind], 0, total)

    def _heard(self, kind: str, arguments: Any, answer: Any) -> None:
        """lm-eval has an answer. Those of whole texts were heard of window by window."""
        if kind == "loglikelihood_rolling":
            return
        self._done += 1
        if kind == "loglikelihood":
            answer = list(_finite(answer))
        if not (kind == "generate_until" and _samples(arguments[1])):
            self._pending.append((_key(kind, arguments), answer))

    def _between_batches(self) -> None:
        """Here all answers of a batch are known, and none of the next."""
        now = time.monotonic()
        if now - self._reported >= REPORT_EVERY:
            self._reported = now
            self._run.progress(WHAT[self._kind], self._done, self._total)
        if self._run.stop_asked() or now - self._committed >= COMMIT_EVERY:
            self._commit()
        self._run.stop_if_asked()

    def _commit(self) -> None:
        now = time.monotonic()
        if self._pending:
            seconds = round(now - self._committed, 3)
            self._journal.commit({"answers": [list(pair) for pair in self._pending], "seconds": seconds})
            self._pending = []
        self._committed = now
        self._run.progress(WHAT[self._kind], self._done, self._total)


class _Listener:
    """What lm-eval tells of each answer, instead of its own cache."""

    def __init__(self, heard: Callable[[str, Any, Any], None]) -> None:
        self.add_partial = heard


def _key(kind: str, asked: Any) -> str:
    """What a request is known by in the journal."""
    return sha256(canonical_json([kind, asked]))[:24]


def _samples(settings: dict[str, Any]) -> bool:
    """Whether texts are drawn rather than the most likely."""
    wanted = settings.get("do_sample")
    return bool(settings.get("temperature") or 0.0) if wanted is None else bool(wanted)


def _finite(answer: tuple[float, bool]) -> tuple[float, bool]:
    if not math.isfinite(answer[0]):
        raise StageError(
            "a log-likelihood is not a finite number: the model's weights or activations overflow in this dtype"
        )
    return answer
