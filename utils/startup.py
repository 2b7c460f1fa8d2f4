"""The first thing that a command does, before the imports that take seconds; so this module imports next to nothing.

Ctrl-C and SIGTERM, which schedulers and `docker stop` send, end a command with one line and exit code 130 or 143. A
handler of its own also makes process 1 of a container hear them: the kernel drops what such a process does not handle.
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
    """A signal asks the command to stop; `code` is its exit code."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.code = 128 + number


def begin(name: str) -> None:
    """Prepare the process: end with one line on a signal, mend the streams, refuse a system without `fcntl`.

    To be called by a script before its heavy imports. Until `stoppable` takes over nothing has begun, so a signal ends
    the process at once: an exception raised within the import of a compiled module may come out as another one.
    """

    def leave(number: int, frame: FrameType | None) -> NoReturn:
        if os.environ.get("RANK", "0") == "0" or "MASTER_ADDR" not in os.environ:  # of several processes the first
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
    """Give the process standard streams that printing cannot fail on.

    A closed stream becomes the null device: else the next file that is opened takes its number, and what libraries print
    goes into that file. What a stream's encoding does not have is printed with escapes.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed when the process started
            null = os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is the closed stream's
            os.set_inheritable(null, True)
            setattr(sys, name, open(null, mode, closefd=False))  # noqa: SIM115 - open for the life of the process
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """Raise `Stopped` where the block is when a signal comes; a second signal ends the process at once.

    A command's own blocks of `finally` run after the first signal. What they cannot finish, the next run clears away.
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
    """Install a handler of both signals and return the earlier ones; a signal that is ignored (`nohup`, `&`) stays so."""
    heard = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    return {number: signal.signal(number, handler) for number in heard}
