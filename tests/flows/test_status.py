"""What the server is asked about runs, and told of them: status, cancel, logs, priorities, schedules, notifications."""

from __future__ import annotations

import datetime
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from coldpress.flows.cli import main
from coldpress.flows.deployment import prepare_server
from coldpress.flows.notify import notifications, notify_by_mail, notify_by_webhook
from coldpress.flows.result import PREEMPTED
from coldpress.flows.run import run_tags
from coldpress.flows.status import RunStatus, StageStatus, cancel, devices, logs, statuses
from coldpress.flows.submit import submit
from coldpress.storage.errors import ColdpressError
from coldpress.storage.store import Store


@pytest.fixture
def client(prefect_server: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A client of the tests' server, which has our deployment and no worker."""
    from prefect.client.orchestration import get_client

    for module in ("submit", "prefect_server"):
        monkeypatch.setattr(f"coldpress.flows.{module}.server_configured", lambda: True)
    with get_client(sync_client=True) as asking:
        prepare_server(asking, "coldpress", 30)
        yield asking


@pytest.fixture
def send(client: Any, tiny_recipe: Path, store: Store) -> Callable[..., Any]:
    """`send(priority="high")`: the tiny recipe, submitted."""

    def send(**settings: Any) -> Any:
        usual = {"overrides": (), "only": (), "pool": "coldpress", "device": "cpu"}
        return submit(str(tiny_recipe), store, **{**usual, **settings})

    return send


def call(*arguments: str) -> Result:
    return CliRunner().invoke(main, list(arguments))


def test_without_a_server_they_say_how_to_start_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("PREFECT_API_URL", "PREFECT_PROFILES_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path))
    for command in (("status",), ("cancel", "run"), ("logs", "run"), ("prepare",)):
        ended = call(*command)
        assert ended.exit_code == 2
        assert "PREFECT_API_URL is not set" in ended.output


def test_a_waiting_run_shows_its_recipe_its_user_and_its_pool(client: Any, send: Callable[..., Any]) -> None:
    sent = send()
    (found,) = statuses(client, sent.run)
    assert (found.run, found.id, found.recipe, found.pool) == (sent.run, str(sent.id), "tiny", "coldpress")
    assert (found.state, found.attempts, found.stages) == ("Scheduled", 0, [])
    assert f"user:{found.user}" in run_tags("tiny", "cpu")
    assert sent.run in [entry.run for entry in statuses(client)]


def test_status_tells_how_often_a_run_was_interrupted(client: Any, send: Callable[..., Any]) -> None:
    from prefect.states import AwaitingRetry, Crashed, Running

    sent = send()
    for state in (Running(), Crashed(name=PREEMPTED), AwaitingRetry(), Running(), Crashed(), AwaitingRetry()):
        client.set_flow_run_state(sent.id, state, force=True)
    (found,) = statuses(client, sent.run)
    assert (found.attempts, found.preempted, found.crashed) == (2, 1, 1)


def test_status_shows_what_each_stage_does_or_waits_for(client: Any) -> None:
    import prefect
    from prefect.artifacts import create_progress_artifact

    seen: list[RunStatus] = []

    @prefect.task(task_run_name="gptq", persist_result=False)
    def work(flow_run: str) -> None:
        create_progress_artifact(16.0, key="tiny-gptq-progress", description="gptq: waiting for device 0")
        deadline = time.monotonic() + 20
        while not seen or not seen[-1].stages:  # task runs reach the server as events
            assert time.monotonic() < deadline
            seen.extend(statuses(client, flow_run))

    @prefect.flow(name="tiny", flow_run_name="20991231T000000-status")
    def tiny() -> None:
        work(str(prefect.runtime.flow_run.id))

    with prefect.tags(*run_tags("tiny", "cpu")):
        tiny()
    assert seen[-1].run == "20991231T000000-status"
    assert seen[-1].pool is None
    (stage,) = seen[-1].stages
    assert stage == StageStatus("gptq", "Running", 16.0, "waiting for device 0", moved=stage.moved)
    assert stage.moved


def test_a_run_that_waits_is_cancelled_at_once_and_one_that_runs_is_asked(
    client: Any, send: Callable[..., Any]
) -> None:
    from prefect.states import Running

    waiting, running = send(), send()
    assert cancel(client, waiting.run) == waiting.run
    assert client.read_flow_run(waiting.id).state.name == "Cancelled"
    with pytest.raises(ColdpressError, match="has ended already: Cancelled"):
        cancel(client, waiting.run)
    client.set_flow_run_state(running.id, Running(), force=True)
    cancel(client, str(running.id))
    assert client.read_flow_run(running.id).state.name == "Cancelling"


def test_a_run_that_was_not_submitted_or_is_not_there_can_not_be_cancelled(client: Any) -> None:
    import prefect

    @prefect.flow(name="tiny", flow_run_name="20991230T000000-direct")
    def tiny() -> None:
        with pytest.raises(ColdpressError, match="was not submitted: end it with Ctrl-C"):
            cancel(client, "20991230T000000")

    with prefect.tags(*run_tags("tiny", "cpu")):
        tiny()
    with pytest.raises(ColdpressError, match="no run 'nonesuch' among the last 200"):
        cancel(client, "nonesuch")


def test_logs_are_a_runs_own_oldest_first(client: Any, send: Callable[..., Any]) -> None:
    from prefect.client.schemas.actions import LogCreate

    sent, other = send(), send()
    noon = datetime.datetime(2026, 11, 22, 12, tzinfo=datetime.UTC)
    lines = [(sent, 2, "last"), (sent, 1, "first"), (other, 1, "another's")]
    client.request(
        "POST",
        "/logs/",
        json=[
            LogCreate(
                name="x", level=20, message=text, timestamp=noon.replace(second=second), flow_run_id=run.id
            ).model_dump(mode="json")
            for run, second, text in lines
        ],
    )
    assert list(logs(client, sent.run)) == ["2026-11-22 12:00:01 first", "2026-11-22 12:00:02 last"]


def test_the_command_prints_runs_devices_and_the_size_of_the_store(
    client: Any, send: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from coldpress.flows.device_limits import DeviceLimits, limit_name

    limits = DeviceLimits(["7"])
    lease = limits.acquire("7", lambda: None)
    assert lease is not None
    place = limit_name("7").removeprefix("coldpress-device ").removesuffix(" 7")
    assert {"host": place, "device": "7", "taken": True} in devices(client)
    limits.release(lease)
    sent = send()
    monkeypatch.chdir(tmp_path)  # where there is no store yet
    ended = call("status", sent.run)
    assert ended.exit_code == 0, ended.output
    (line,) = [line for line in ended.output.splitlines() if line.startswith(sent.run)]
    assert line.split()[1:5:2] == ["tiny", "coldpress"]
    assert [place, "7", "free"] in [line.split() for line in ended.output.splitlines()]
    tables = [line for line in ended.output.splitlines() if not line.startswith("store ")]
    assert max(map(len, tables)) <= 100
    document = json.loads(call("status", sent.run, "--json").stdout)
    assert document["runs"][0]["run"] == sent.run
    assert document["store"]["bytes"] == 0


def test_priorities_are_queues_that_workers_empty_in_order(client: Any, send: Callable[..., Any]) -> None:
    queues = client.request(
        "POST", "/work_pools/{work_pool_name}/queues/filter", path_params={"work_pool_name": "coldpress"}, json={}
    ).json()
    order = [queue["name"] for queue in sorted(queues, key=lambda queue: queue["priority"])]
    assert order == ["high", "default", "low"]
    for priority, queue in (("high", "high"), ("normal", "default"), ("low", "low")):
        assert client.read_flow_run(send(priority=priority).id).work_queue_name == queue


def test_a_schedule_is_a_deployment_of_its_own_which_up_leaves_alone(client: Any, send: Callable[..., Any]) -> None:
    sent = send(cron="0 3 * * *", deadline=60.0)
    assert sent.run == "coldpress/coldpress tiny"
    prepare_server(client, "coldpress", 30)
    made = client.read_deployment_by_name(sent.run)
    assert made.schedules[0].schedule.cron == "0 3 * * *"
    assert made.parameters["deadline"] == 60.0
    assert "run" not in made.parameters
    assert "recipe:tiny" in made.tags
    with pytest.raises(ColdpressError, match="'often' is no schedule; write it like '0 3"):
        send(cron="often")


@pytest.mark.parametrize("text", ["2", "h", "0s", "2 hours"])
def test_a_deadline_has_a_unit(tiny_recipe: Path, text: str) -> None:
    ended = call("run", str(tiny_recipe), "--deadline", text)
    assert ended.exit_code == 2
    assert "write it as 90s, 30m, 2h or 1d" in ended.output


def test_the_webhook_is_a_secret_and_is_called_for_our_runs_only(client: Any) -> None:
    from prefect.blocks.webhook import Webhook

    notify_by_webhook(client, "https://hooks.example.org/token", 2)
    notify_by_webhook(client, "https://hooks.example.org/other", 3)
    found = [a for a in client.read_automations() if a.name.startswith("coldpress: tell")]
    assert len(found) == 2
    assert "hooks.example.org" not in json.dumps([a.model_dump(mode="json") for a in found])
    assert {a.trigger.threshold for a in found} == {1, 3}
    assert "other" in Webhook.load("coldpress-notifications").url.get_secret_value()  # type: ignore[union-attr]
    flow = client.create_flow_from_name("coldpress")
    for automation in found:
        json.loads(automation.actions[0].payload)
    for automation in notifications(flow, lambda what: found[0].actions[0]):
        assert f"prefect.flow.{flow}" in automation.trigger.match_related["prefect.resource.id"]  # type: ignore[union-attr]
    with pytest.raises(ColdpressError, match="an address that begins with https"):
        notify_by_webhook(client, "hooks.example.org", 2)


@pytest.mark.parametrize("url", ["team@example.org", "https://example.org", "mailtos://"])
def test_mail_needs_a_server(client: Any, url: str) -> None:
    with pytest.raises(
        ColdpressError, match=r"like 'mailtos://user:password@smtp\.example\.org\?to=team@example\.org'"
    ):
        notify_by_mail(client, url, 3)
