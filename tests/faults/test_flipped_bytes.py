"""Bytes of every kind of file in a store are flipped, one at a time: each is found, and none is ever used unnoticed."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from coldpress.storage.artifacts import Artifact, ArtifactReader
from coldpress.storage.errors import DamagedBlob
from coldpress.storage.inspect import verify
from coldpress.storage.journal import Journal
from coldpress.storage.leases import Claim
from coldpress.storage.store import Action, Store
from coldpress.tasks.catalogue import stage_named
from coldpress.tasks.stage import Preempted, Run, compute

SAMPLES = 500
KINDS = {"blobs", "artifacts", "actions", "journals", "leases", "refs", "pins", "runs"}
PARAMETERS = {"group_size": 32, "bits": 8}


@pytest.fixture
def filled(
    store: Store, import_model: Callable[..., Artifact], make_tokens: Callable[..., Artifact],
    run_stage: Callable[..., Artifact],
) -> Store:  # fmt: skip
    """A store with every kind of file in it, an unfinished stage and its saved activations among them."""
    model = import_model("llama")
    tokens = make_tokens(model)
    pruned = run_stage("prune/wanda", {"model": model, "calibration": tokens}, sparsity=0.5)
    store.set_ref("tiny/pruned", pruned)
    store.pin(model)
    store.save_run("r1", {"stages": [{"artifact": pruned.id}]})
    assert Claim(store, "ab" * 32, {"inputs": {}}).acquire()
    entry = stage_named("quantize/gptq")
    done: list[int] = []
    run = Run(store, progress=lambda what, at, total: done.append(at), stop_asked=lambda: len(done) >= 2)
    with pytest.raises(Preempted):
        compute(run, entry, entry.parameters(**PARAMETERS), {"model": pruned, "calibration": tokens})
    return store


def contents(store: Store, actions: list[Action], journal: dict[str, object]) -> list[object]:
    """All that jobs could take from the store: whole results, names, what an unfinished stage goes on from."""
    found: list[object] = []
    for action in actions:
        hit = store.lookup(action.stage, action.key)
        if hit is None:
            found.append(None)
            continue
        try:
            with ArtifactReader(store, hit.artifact) as reader:
                manifest = reader.manifest
                tensors = reader.tensors(manifest.tensors)
                files = {name: reader.file(name) for name in manifest.files}
                masks = reader.masks({name: tuple(tensors[name].shape) for name in manifest.masks})
        except DamagedBlob:
            found.append(None)
            continue
        found.append(({n: t.numpy().tobytes() for n, t in {**tensors, **masks}.items()}, files))
    unfinished = Journal(store, journal, {})
    state = unfinished.state()
    return [
        *found,
        *(unfinished.steps[n] if n < len(unfinished.steps) else None for n in range(2)),
        state and {name: tensor.numpy().tobytes() for name, tensor in state.tensors.items()},
        *(store.refs().get(name) for name in ("tiny/pruned",)),
        *(store.runs().get(name) for name in ("r1",)),
    ]


def test_every_flipped_byte_is_found_by_verify_or_never_used(filled: Store) -> None:
    actions = list(filled.actions())
    (head,) = Path(filled.url).glob("journals/*/*/head")
    from coldpress.storage.digests import unseal

    journal = unseal(head.read_bytes(), "")["preimage"]
    whole = contents(Store(filled.url), actions, journal)
    assert len(whole) == 8
    assert None not in whole
    sizes = dict(filled.files.list(""))
    by_kind = {kind: [path for path in sizes if path.startswith(f"{kind}/")] for kind in KINDS}
    assert all(by_kind.values())
    chance = random.Random(0)
    found: Counter[str] = Counter()
    for sample in range(SAMPLES):
        kind = sorted(KINDS)[sample % len(KINDS)]
        path = chance.choice(by_kind[kind])
        position = chance.randrange(sizes[path])
        before = bytes(filled.files.read(path))
        after = bytearray(before)
        after[position] ^= 1 << chance.randrange(8)
        filled.files.replace(path, [bytes(after)])

        taken = contents(Store(filled.url), actions, journal)
        assert all(part is None or part == original for part, original in zip(taken, whole, strict=True)), path
        filled.files.replace(path, [bytes(after)])  # the reader may have set it aside
        assert any(finding.path == path for finding in verify(Store(filled.url))), (path, position)
        found[kind] += 1
        filled.files.replace(path, [before])
    assert sum(found.values()) == SAMPLES
    assert contents(Store(filled.url), actions, journal) == whole
    assert verify(Store(filled.url)) == []
