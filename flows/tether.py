"""`python -m coldpress.flows.tether SIGNAL PARENT COMMAND…`: becomes COMMAND, which gets SIGNAL when PARENT dies.

So nothing that `coldpress up` started outlives it, not even after `kill -9`. Only Linux can do that; elsewhere the
command just runs.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main(number: int, parent: int, command: list[str]) -> None:
    """Replace this process by the command."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, number)
        if os.getppid() != parent:  # it died before we asked
            sys.exit(1)
    os.execvp(command[0], command)


if __name__ == "__main__":
    main(signal.Signals[sys.argv[1]], int(sys.argv[2]), sys.argv[3:])
