"""What the dashboard says of a stage's result."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from coldpress.flows.provenance import Dashboard, loss_curve, provenance_markdown
from coldpress.storage.artifacts import Artifact
from coldpress.storage.store import Store
from coldpress.tasks.catalogue import stage_named


@pytest.mark.parametrize(
    ("losses", "width", "curve"),
    [
        ([3.0, 2.0, 1.0], 40, "3.000 █▅▁ 1.000 in 3 steps"),
        ([8.0, 6.0, 1.0, 3.0, 0.0, 0.0], 3, "8.000 █▃▁ 0.000 in 6 steps"),
        ([2.0, 2.0], 40, "2.000 ▁▁ 2.000 in 2 steps"),
        ([5.0], 40, "5.000 ▁ 5.000 in 1 steps"),
    ],
)
def test_a_loss_curve_is_drawn_in_bars(losses: list[float], width: int, curve: str) -> None:
    assert loss_curve(losses, width) == curve


def test_every_step_is_in_one_bar() -> None:
    assert len(loss_curve([float(step) for step in range(97)]).split()[1]) == 40


def test_a_trained_stage_shows_its_losses(
    import_model: Callable[..., Artifact],
    make_tokens: Callable[..., Artifact],
    run_stage: Callable[..., Artifact],
    store: Store,
) -> None:
    model = import_model("llama")
    inputs: dict[str, Any] = {"model": model, "data": make_tokens(model)}
    run_stage("adapt/lora", inputs, steps=3, batch_size=2, rank=2)
    (action,) = (action for action in store.actions() if action.stage == "adapt/lora")
    node: Any = SimpleNamespace(name="term", stage=stage_named("adapt/lora"))
    losses = action.provenance["training"]["losses"]
    assert f"| loss | {loss_curve(losses)} |" in provenance_markdown(node, action, "computed")
    (source,) = (action for action in store.actions() if action.stage == "source/model")
    assert "| loss |" not in provenance_markdown(node, source, "computed")


def test_a_server_that_is_away_is_asked_once_and_then_left_alone_for_a_while(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now = [0.0]
    monkeypatch.setattr("coldpress.flows.provenance.time.monotonic", lambda: now[0])
    asked = []

    def away() -> None:
        asked.append(now[0])
        now[0] += 8
        raise httpx.ConnectError("Connection refused")

    dashboard = Dashboard()
    for _ in range(100):
        dashboard.show("the progress of pruned", away)
        now[0] += 1
    assert asked == [0.0, 88.0]  # for ten times the 8 seconds that it took
    assert "the progress of pruned is not on the dashboard: Connection refused; for 80 s nothing" in caplog.text


def test_a_server_that_refuses_one_thing_is_asked_for_the_next() -> None:
    shown = []

    def busy() -> None:
        raise httpx.HTTPStatusError("busy", request=httpx.Request("POST", "http://x"), response=httpx.Response(503))

    dashboard = Dashboard()
    dashboard.show("the progress of pruned", busy)
    dashboard.show("the progress of pruned", lambda: shown.append(1))
    assert shown == [1]
