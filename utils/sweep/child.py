"""Become another program that ends with its parent: python child.py PARENT PROGRAM ARGUMENT ...

The kernel sends SIGTERM when the parent is gone, in whatever way (Linux only). Nothing else would: after `kill -9` of a sweep
its runs would go on training unnoticed. This is a program of its own because it has to be set in the child, and Python
code between fork and exec is not safe.
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
