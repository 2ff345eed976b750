"""Tries to create the same files as its rivals do, and says which ones it got.

Arguments: the store's URL, this process's name, the number of files. Starts when a line comes in.
"""

from __future__ import annotations

import sys

from coldpress.storage.files import open_files


def main() -> None:
    files = open_files(sys.argv[1])
    assert files.atomic_create
    print("ready", flush=True)
    sys.stdin.readline()
    won = [
        str(number) for number in range(int(sys.argv[3])) if files.create(f"leases/{number}", [sys.argv[2].encode()])
    ]
    print(" ".join(won))


if __name__ == "__main__":
    main()
