"""Publishes artifacts, actions and refs without end, and says each number when it is done: made to be killed.

Arguments: the store, and a number that makes this writer's content its own.
"""

from __future__ import annotations

import itertools
import random
import sys

from coldpress.storage.artifacts import ArtifactWriter
from coldpress.storage.digests import digest_of
from coldpress.storage.store import Action, Store


def main() -> None:
    store = Store(sys.argv[1])
    dice = random.Random(sys.argv[2])
    for number in itertools.count():
        with ArtifactWriter(store, "checkpoint") as writer:
            writer.add_file("config.json", b"{}")
            writer.add_file("model.safetensors", dice.randbytes(400_000))
            artifact = writer.publish()
        preimage = {"writer": sys.argv[2], "number": number}
        store.record(Action("write", digest_of(preimage), artifact, preimage, {}))
        store.set_ref("latest", artifact)
        print(number, flush=True)


if __name__ == "__main__":
    main()
