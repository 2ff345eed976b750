"""`up` and `submit` up to the point where a worker takes over; what then happens is in `tests/faults`."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import httpx
import pytest
from click.testing import CliRunner, Result
from coldpress.flows.cli import main
from coldpress.flows.deployment import (
    GOES_ON,
    automations,
    prepare_automations,
    prepare_server,
    schedule_crashed,
    scheduling_again,
)
from coldpress.flows.prefect_server import ServerAway
from coldpress.flows.recipe import find_recipe, load_recipe, parse_recipe
from coldpress.flows.submit import submit
from coldpress.storage.errors import ColdpressError
from coldpress.storage.store import Store


@pytest.fixture
def no_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody has told us of a server."""
    for name in ("PREFECT_API_URL", "PREFECT_PROFILES_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path))


@pytest.fixture
def server(prefect_server: None, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A client of the tests' server."""
    from prefect.client.orchestration import get_client

    monkeypatch.setattr("coldpress.flows.submit.server_configured", lambda: True)
    with get_client(sync_client=True) as client:
        yield client


def call(*arguments: str) -> Result:
    return CliRunner().invoke(main, list(arguments))


def test_submitting_without_a_server_says_how_to_start_one(no_server: None, tiny_recipe: Path) -> None:
    ended = call("submit", str(tiny_recipe))
    assert ended.exit_code == 2
    assert "PREFECT_API_URL is not set: `coldpress up` starts a server" in ended.output


def test_a_wrong_recipe_is_refused_before_any_server_is_asked(no_server: None, tiny_recipe: Path) -> None:
    ended = call("submit", str(tiny_recipe), "--set", "stages.gptq.group_size=7")
    assert ended.exit_code == 2
    assert "group_size" in ended.output


def test_a_store_that_only_one_process_sees_is_refused(no_server: None, tiny_recipe: Path) -> None:
    ended = call("submit", str(tiny_recipe), "--store", "memory://here")
    assert ended.exit_code == 2
    assert "only one process sees a memory:// store" in ended.output


def test_a_server_without_our_deployment_is_named_with_what_makes_it(
    server: Any, tiny_recipe: Path, store: Store
) -> None:
    with pytest.raises(ColdpressError, match="no deployment coldpress/nowhere; `coldpress up --pool nowhere` makes it"):
        submit(str(tiny_recipe), store, overrides=(), only=(), pool="nowhere", device="auto")


def test_a_submitted_run_has_the_recipe_as_text_and_names_that_say_what_it_is(
    server: Any, tiny_recipe: Path, store: Store
) -> None:
    prepare_server(server, "coldpress", 30)
    overrides = ["stages.pruned.sparsity=0.6"]
    sent = submit(str(tiny_recipe), store, overrides=overrides, only=(), pool="coldpress", device="cpu")
    flow_run = server.read_flow_run(sent.id)
    assert flow_run.name == f"tiny {sent.run}"
    assert flow_run.parameters["text"] == tiny_recipe.read_text()
    assert flow_run.parameters["store"] == store.url
    assert os.path.isabs(flow_run.parameters["store"])
    assert flow_run.parameters["overrides"] == overrides


def test_an_attempt_that_can_not_reach_the_server_has_crashed_and_will_be_scheduled_again(
    tiny_recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from coldpress.flows import submitted

    for error in (httpx.ConnectError("refused"), ServerAway("the Prefect server does not answer")):

        def away(error: Exception = error) -> None:
            raise error

        monkeypatch.setattr(submitted, "_present_flow_run", away)
        state = submitted.recipe_run.fn(tiny_recipe.read_text(), "store")
        assert state.is_crashed()
        assert str(error) in str(state.message)


def test_only_what_is_crashed_is_scheduled_again_and_what_had_ended_ends_again(
    server: Any, tiny_recipe: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    from coldpress.flows import deployment, submitted
    from prefect.states import AwaitingRetry, Cancelled, Completed, Crashed, Running

    prepare_server(server, "coldpress", 30)
    monkeypatch.setattr(deployment, "SECONDS_UNTIL_SCHEDULED", 0)
    sent = submit(str(tiny_recipe), store, overrides=(), only=(), pool="coldpress", device="cpu")

    def through(*states: Any) -> Any:
        for state in states:
            server.set_flow_run_state(sent.id, state, force=True)
        schedule_crashed(server, {})
        return server.read_flow_run(sent.id)

    assert through(Running(), Crashed()).state.name == "AwaitingRetry"
    assert submitted._end_before(server.read_flow_run(sent.id)) is None
    assert through(Running(), Cancelled(message="by hand")).state.name == "Cancelled"
    again = through(AwaitingRetry(message="by a person"), Running(), Crashed())
    assert again.state.name == "AwaitingRetry"
    assert submitted._end_before(again) is None
    late = through(Running(), Completed(message="all stages finished"), AwaitingRetry(message=GOES_ON), Running())
    ended = submitted._end_before(late)
    assert ended is not None
    assert (ended.name, ended.message) == ("Completed", "all stages finished")


def test_preparing_a_server_again_changes_only_what_differs(server: Any) -> None:
    def present() -> dict[str, tuple[Any, Any]]:
        found = [a for a in server.read_automations() if a.name.startswith("coldpress: a ")]  # not notifications
        return {automation.name: (automation.id, automation.trigger.within) for automation in found}

    prepare_server(server, "coldpress", 30)
    first = present()
    prepare_server(server, "coldpress", 30)
    assert present() == first
    assert len(first) == 3
    prepare_automations(server, 30, scheduling=True)
    assert present().keys() - first.keys() == {"coldpress: a crashed run is scheduled again"}
    prepare_server(server, "coldpress", 30)  # `up` schedules them itself
    assert present() == first
    prepare_server(server, "other", 60)
    changed = {name for name, content in present().items() if content != first[name]}
    assert changed == {"coldpress: a silent run has crashed"}
    prepare_server(server, "coldpress", 30)


def test_automations_act_on_our_runs_only(server: Any) -> None:
    flow = server.create_flow_from_name("coldpress")
    for automation in [*automations(flow, 30), scheduling_again(flow)]:
        assert automation.trigger.match_related.model_dump() == {
            "prefect.resource.id": f"prefect.flow.{flow}",
            "prefect.resource.role": "flow",
        }


def test_relative_paths_begin_where_the_recipe_was_and_not_where_it_runs(
    tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "near.txt").write_text("A text. " * 9000)
    text = tiny_recipe.read_text()
    text = text.replace(text.split('calibration: {source: "')[1].split('"')[0], "near.txt")
    tiny_recipe.write_text(text)
    here = load_recipe(str(tiny_recipe))
    sent = find_recipe(str(tiny_recipe))
    monkeypatch.chdir("/")
    assert parse_recipe(*sent).nodes == here.nodes
    assert here.node("calibration").parameters.source == str(tmp_path / "near.txt")  # type: ignore[attr-defined]


def test_a_port_in_use_is_a_sentence(no_server: None) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        ended = call("up", "--port", str(port))
    assert ended.exit_code == 2
    assert f"can't listen on 127.0.0.1, port {port}: Address already in use" in ended.output


def test_up_without_a_server_of_its_own_needs_another(no_server: None) -> None:
    ended = call("up", "--no-server")
    assert ended.exit_code == 2
    assert "PREFECT_API_URL, which is not set" in ended.output
