"""The first step of a command: signal handlers and standard streams. Imports little, because it runs before slow imports.

Ctrl-C, and SIGTERM from schedulers and `docker stop`, end a command with one line and exit code 130 or 143. Without a handler,
process 1 of a container would not receive them: the kernel drops signals that this process does not handle.
"""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any, NoReturn

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(KeyboardInterrupt):
    """Raised when a signal stops the command; `code` is the exit code."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.code = 128 + number


def begin(name: str) -> None:
    """Prepare the process: handle signals, replace closed streams, refuse a system without `fcntl`.

    Scripts call it before slow imports. Until `stoppable` takes over, a signal ends the process at once: there is nothing
    to clean up yet, and an exception during the import of a compiled module may turn into another one.
    """

    def leave(number: int, frame: FrameType | None) -> NoReturn:
        if os.environ.get("RANK", "0") == "0" or "MASTER_ADDR" not in os.environ:  # rank 0
            with contextlib.suppress(OSError):
                os.write(2, f"\n{name}: stopped.\n".encode())
        os._exit(128 + number)

    handle(leave)
    prepare_streams()
    try:
        import fcntl  # noqa: F401 - the lock of a run
    except ImportError:
        print(f"{name}: error: {sys.platform}: this system is not supported: use Linux, or WSL on Windows", file=sys.stderr)
        sys.exit(2)


def prepare_streams() -> None:
    """Make sure that printing cannot fail.

    A closed standard stream becomes the null device. Otherwise the next file opened would get its descriptor, and the output
    of libraries would go into that file. Characters that the encoding of a stream lacks are printed as escapes.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed when the process started
            null = os.open(os.devnull, os.O_RDWR)  # gets the lowest free descriptor: that of the closed stream
            os.set_inheritable(null, True)
            setattr(sys, name, open(null, mode, closefd=False))  # noqa: SIM115 - open until the process ends
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """Raise `Stopped` in the block on a signal; a second signal ends the process at once.

    `finally` blocks run after the first signal. Temporary files that they do not remove are removed by the next run.
    """
    stopping = False

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        nonlocal stopping
        if stopping:
            os._exit(128 + number)
        stopping = True
        raise Stopped(number)

    before = handle(stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def handle(handler: Any) -> dict[signal.Signals, Any]:
    """Install a handler for both signals and return the earlier ones; ignored signals (`nohup`, `&`) stay ignored."""
    active = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    return {number: signal.signal(number, handler) for number in active}
