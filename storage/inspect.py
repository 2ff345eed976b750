"""Looking into a store: what is damaged, what takes how much room."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from .digests import sha256, unseal
from .errors import DamagedBlob, StoreError
from .store import Store, artifact_path, blob_path


@dataclass(frozen=True)
class Finding:
    """Something wrong: the file, what is wrong with it, and who needs it.

    needed_by: names of results, or for one without a name the stage that made it.
    """

    path: str
    problem: str
    needed_by: tuple[str, ...]


@dataclass(frozen=True)
class Usage:
    """Bytes: `logical` counts every artifact by itself, `stored` what is really on disk."""

    artifacts: int
    blobs: int
    logical: int
    stored: int
    unreferenced: int


def verify(store: Store, progress: Callable[[int, int], None] = lambda done, total: None) -> list[Finding]:
    """Hash every blob and manifest, check every record. `progress` gets blobs done and their number.

    Damaged blobs are moved to `damaged/`, as any reader does, so that the next run recomputes the stages that made
    them; nothing else is changed.
    """
    names = _users(store)
    findings: list[Finding] = []
    needs: dict[str, list[str]] = {}
    sizes: dict[str, int] = {}
    known = set()
    for artifact_id in list(store.artifact_ids()):
        users = tuple(names.get(artifact_id, [f"artifact {artifact_id[:12]}"]))
        try:
            manifest = store.manifest(artifact_id)
        except DamagedBlob as error:
            findings.append(Finding(artifact_path(artifact_id), str(error), users))
            continue
        known.add(artifact_id)
        for blob, size in manifest.blobs.items():
            needs.setdefault(blob, []).extend(users)
            sizes[blob] = size

    present = dict(store.files.list("blobs"))
    for blob in sizes:
        if blob_path(blob) not in present:
            findings.append(Finding(blob_path(blob), "missing", tuple(needs[blob])))

    def check(path: str) -> str | None:
        blob = "".join(path.split("/")[-2:])
        try:
            store.read_blob(blob, again=True)
        except DamagedBlob:
            return "its bytes don't hash to its name; moved to damaged/"
        return None

    with ThreadPoolExecutor(2) as pool:
        for done, (path, problem) in enumerate(zip(present, pool.map(check, present), strict=True), start=1):
            progress(done, len(present))
            if problem:
                findings.append(Finding(path, problem, tuple(needs.get("".join(path.split("/")[-2:]), ()))))

    for folder in ("actions", "refs", "pins", "runs", "journals", "leases", "spent"):
        findings.extend(_check_records(store, folder, known))
    return findings


def _check_records(store: Store, folder: str, known: set[str]) -> Iterator[Finding]:
    for path, _ in store.files.list(folder):
        try:
            data = store.files.read(path)
            if "/tensors-" in path:
                if not path.endswith(f"/tensors-{sha256(data)}"):
                    yield Finding(path, "its bytes don't hash to its name; a resumed stage does without it", ())
                continue
            record = unseal(data, path)
        except FileNotFoundError:  # a running job has finished with it
            continue
        except DamagedBlob as error:
            yield Finding(path, str(error), ())
            continue
        if folder in ("actions", "refs", "pins") and record["artifact"][1] not in known:
            yield Finding(path, f"its artifact {record['artifact'][1][:12]} is missing or damaged", ())


def _users(store: Store) -> dict[str, list[str]]:
    """{artifact id: names of results}, or the stages that made it for want of a name."""
    users: dict[str, list[str]] = {}
    for name, artifact in store.refs().items():
        users.setdefault(artifact.id, []).append(name)
    made: dict[str, list[str]] = {}
    for action in store.actions():
        of = "/".join(action.provenance[name] for name in ("recipe", "node") if name in action.provenance)
        made.setdefault(action.artifact.id, []).append(f"{action.stage} of {of}" if of else action.stage)
    return {**made, **users}


def stored_bytes(store: Store) -> int:
    """What the content of all results takes, without looking into any."""
    return sum(size for _, size in store.files.list("blobs"))


def usage(store: Store) -> Usage:
    """How much room the store takes, and how much it would take without sharing."""
    logical = 0
    used: set[str] = set()
    count = 0
    for artifact_id in store.artifact_ids():
        try:
            manifest = store.manifest(artifact_id)
        except DamagedBlob as error:
            raise StoreError(f"{error}; `coldpress verify` lists all damage") from error
        count += 1
        logical += manifest.stored_bytes()
        used.update(manifest.blobs)
    sizes = {"".join(path.split("/")[-2:]): size for path, size in store.files.list("blobs")}
    return Usage(
        artifacts=count,
        blobs=len(sizes),
        logical=logical,
        stored=sum(sizes.values()),
        unreferenced=sum(size for blob, size in sizes.items() if blob not in used),
    )
