"""`coldpress submit`: a checked recipe becomes a flow run of the deployment, and perhaps is followed to its end."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ..storage.errors import ColdpressError
from ..storage.store import Store
from .deployment import FLOW, NORMAL, Submitted, schedule
from .plan import prepare
from .prefect_server import answers_as_sentences, configure_prefect, reach_server, server_configured
from .recipe import find_recipe, parse_recipe
from .run import new_run_id, record_plan, run_tags, spread_tag
from .status import workers_of

if TYPE_CHECKING:
    from uuid import UUID

    from prefect.client.schemas.objects import FlowRun

_SECONDS_OF_SILENCE = 120.0  # so long the server may be away while a run is followed
_SECONDS_TO_RESCHEDULE = 60.0


def submit(
    name: str,
    store: Store,
    *,
    overrides: Sequence[str],
    only: Sequence[str],
    pool: str,
    device: str,
    priority: str = NORMAL,
    deadline: float | None = None,
    budget: float | None = None,
    cron: str | None = None,
    spread: int = 1,
) -> Submitted:
    """Check a recipe as `run` does and send it to the server, its text and all. Raises ColdpressError.

    cron: make a schedule for it instead of a run; the id is then the deployment's. deadline, budget: in seconds.
    spread: as so many flow runs, each of the whole recipe, on whatever workers take them. The store's leases see to it
    that each stage is computed by one of them; any of them can finish alone.
    """
    path, text, folder = find_recipe(name)
    recipe = parse_recipe(path, text, folder, overrides)
    recipe = recipe.only(only) if only else recipe
    plan = prepare(recipe, store)
    if store.url.startswith("memory://"):
        raise ColdpressError("only one process sees a memory:// store; a worker needs a folder or a URL")
    if not server_configured():
        raise ColdpressError(
            "PREFECT_API_URL is not set: `coldpress up` starts a server and a worker and says what to set"
        )
    configure_prefect()
    reach_server()
    from prefect.client.orchestration import get_client
    from prefect.exceptions import ObjectNotFound
    from prefect.utilities.urls import url_for

    run = new_run_id()
    parameters: dict[str, Any] = {
        "text": text,
        "store": store.url,
        "recipe": path,
        "folder": folder,
        "overrides": list(overrides),
        "only": list(only),
        "device": device,
        "run": run,
    }
    limits = {"deadline": deadline, "budget": budget}
    parameters |= {name: limit for name, limit in limits.items() if limit is not None}
    tags = run_tags(recipe.name, device)
    with answers_as_sentences(), get_client(sync_client=True) as client:
        try:
            deployment = client.read_deployment_by_name(f"{FLOW}/{pool}")
        except ObjectNotFound as error:
            option = f" --pool {pool}" if pool != FLOW else ""
            raise ColdpressError(
                f"the Prefect server has no deployment {FLOW}/{pool}; `coldpress up{option}` makes it "
                f"(with --no-server on a server that runs already)"
            ) from error
        queue = None if priority == NORMAL else priority
        if cron is not None:
            del parameters["run"]  # each has its own
            return schedule(client, deployment, recipe.name, cron, parameters, tags, queue)
        if spread > 1:
            tags.append(spread_tag(run))
        sent = []
        for part in (run, *(f"{run}-{number}" for number in range(2, spread + 1))):
            record_plan(recipe, store, plan, part)  # by which the worker sees that it has come to the same store
            flow_run = client.create_flow_run_from_deployment(
                deployment.id,
                parameters=parameters | {"run": part},
                name=f"{recipe.name} {part}",
                tags=tags,
                work_queue_name=queue,
                idempotency_key=part,  # the client asks again when an answer was lost
            )
            sent.append(flow_run)
        idle = workers_of(client, pool) == 0
    return Submitted(run, sent[0].id, url_for(sent[0]), idle)


def follow(submitted: Submitted, say: Callable[[str], None]) -> str:
    """Wait until a run is done, naming each change of its state; returns the last one's name."""
    shown: Any = None
    crashed_at: float | None = None
    for flow_run in _looks(submitted.id):
        state = flow_run.state
        if state is None:
            continue
        if (state.id, state.name) != shown:
            shown = (state.id, state.name)
            attempt = f", attempt {flow_run.run_count}" if flow_run.run_count > 1 else ""
            say(f"{time.strftime('%H:%M:%S')} {state.name}{attempt}{': ' + state.message if state.message else ''}")
        if not state.is_crashed():
            crashed_at = None
        elif crashed_at is None:
            crashed_at = time.monotonic()
        if state.is_completed() or state.is_failed() or state.is_cancelled():
            break
        if crashed_at is not None and time.monotonic() - crashed_at > _SECONDS_TO_RESCHEDULE:
            raise ColdpressError(
                "the run crashed and was not scheduled again: `coldpress up` does that while it runs, or without it "
                "the automation that `coldpress prepare` makes"
            )
    return str(state.name) if state else "Unknown"


def _looks(id: UUID) -> Iterator[FlowRun]:
    """The flow run once a second."""
    import httpx
    from prefect.client.orchestration import get_client

    answered = time.monotonic()
    with get_client(sync_client=True) as client:
        while True:
            try:
                flow_run = client.read_flow_run(id)
            except httpx.HTTPError as error:
                if time.monotonic() - answered > _SECONDS_OF_SILENCE:
                    silence = f"{_SECONDS_OF_SILENCE:.0f} seconds"
                    raise ColdpressError(f"the Prefect server has not answered for {silence}") from error
            else:
                answered = time.monotonic()
                yield flow_run
            time.sleep(1)


def record_of(store: Store, run: str) -> dict[str, Any] | None:
    """What the run left in the store: the document of `run --json`, if it can be read here."""
    record = store.runs().get(run)
    return record and {key: record[key] for key in ("run", "recipe", "store", "stages", "variants", "metrics")}
