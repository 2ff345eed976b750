"""Puts and gets blobs at random in a cache that other processes use too, and says so when all were whole.

Arguments: the cache's folder, its limit in bytes, a seed.
"""

from __future__ import annotations

import random
import sys

from coldpress.storage.cache import BlobCache
from coldpress.storage.digests import sha256


def main() -> None:
    cache = BlobCache(sys.argv[1], int(sys.argv[2]))
    dice = random.Random(int(sys.argv[3]))
    found = 0
    for _ in range(1500):
        data = dice.randrange(40).to_bytes(4, "big") * 250
        got = cache.get(sha256(data))
        assert got is None or got == data
        found += got is not None
        if got is None:
            cache.put(sha256(data), [data])
    assert 0 < found < 1500
    print("all whole")


if __name__ == "__main__":
    main()
