"""Become another program that ends with its parent: python child.py PARENT PROGRAM ARGUMENT ...

The kernel sends SIGTERM when the parent dies for any reason (Linux only). Without this, the runs of a sweep that was killed by
`kill -9` would continue unnoticed. It is a separate program because the signal must be requested in the child, and running
Python code between fork and exec is unsafe.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def main() -> None:
    """Ask for the signal, then become the program; a parent that is gone already sends none."""
    parent, *program = sys.argv[1:]
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != int(parent):
            sys.exit(128 + signal.SIGTERM)
    os.execv(program[0], program)


if __name__ == "__main__":
    main()
