"""The command line of both scripts: options, and what happens when something goes wrong. Imports torch only when needed."""

from __future__ import annotations

import argparse
import errno
import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import NoReturn

from utils.errors import UserError
from utils.logs import on_screen
from utils.processes import Place, find_place, rank
from utils.startup import Stopped, prepare_streams, stoppable

DEFAULT_CONFIG = "config/baseline_asd.yaml"
TORCHRUN_FLAGS = ("--world-size", "--rank", "--dist-port")


class Parser(argparse.ArgumentParser):
    """Ends in a UserError instead of a usage text, so that every mistake is one line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}: --help lists the options")


def parse_arguments(description: str, argv: Sequence[str] | None, training: bool) -> argparse.Namespace:
    """Parse the options that both scripts have."""
    parser = Parser(description=description, allow_abbrev=False)
    parser.add_argument("--config", default=DEFAULT_CONFIG, metavar="YAML", help=f"settings (default {DEFAULT_CONFIG})")
    resume = "False: start over, an earlier run is moved aside; left out: go on if there is a checkpoint"
    what = resume if training else "left out: latest_model.pt"
    parser.add_argument("--resume", default="", metavar="CHECKPOINT", help=f"a checkpoint's name or path; {what}")
    parser.add_argument("--gpu", default="0", help="number of the CUDA device, or cpu")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a setting of the YAML")
    parser.add_argument("--amp", action="store_true", help="bf16 convolutions (runtime.amp)")
    if not training:
        parser.add_argument("--images", metavar="DIR", help="label the pictures below this folder instead; needs no data set")
        parser.add_argument("--out", metavar="FILE.csv", help="their labels (default labels.csv in the run's log/)")
    for flag in TORCHRUN_FLAGS:
        parser.add_argument(flag, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    for flag in TORCHRUN_FLAGS:
        if getattr(args, flag[2:].replace("-", "_")) is not None:
            raise UserError(f"{flag}: is set by torchrun now: start several processes with torchrun, and leave it out")
    if args.amp:
        args.set.append("runtime.amp=true")
    return args


def command(name: str, main: Callable[[], None], kept: str = "") -> NoReturn:
    """Run a script's main function and leave with its exit code.

    0: done. 2: a mistake that the user can mend, told in one line. 130: Ctrl-C, 143: SIGTERM, in one line. Anything else
    is a defect of this project and keeps its traceback. Of several processes only the first shows more than warnings.

    Args:
        kept: what is said after a stop of what is there.
    """
    prepare_streams()
    with stoppable(), on_screen(logging.WARNING if rank() > 0 else logging.INFO):
        try:
            run(name, main)
        except KeyboardInterrupt as stop:
            if rank() > 0:
                sys.exit(exit_code(stop))  # the first process says it for all
            fail(f"\n{name}: stopped. {kept}".rstrip(), exit_code(stop))
    sys.exit(0)


def run(name: str, main: Callable[[], None]) -> None:
    """Run a script's main function; end the process with one line and its exit code where a user can mend what is wrong."""
    try:
        main()
        sys.stdout.flush()  # here a full disk or a reader that has gone still has its line
    except UserError as error:
        if rank() > 0:
            time.sleep(3)  # a mistake that all processes meet is told by the first; torchrun then ends this one
        fail(f"{name}: error: {who()}{error}", 2)
    except BrokenPipeError:
        sys.stderr.close()  # whoever read our output has gone
        sys.exit(141)
    except RuntimeError as error:
        import torch
        import torch.distributed as dist

        if isinstance(error, torch.OutOfMemoryError):
            fail(f"{name}: error: the device's memory is full: lower loader.batch_size or semi.loader.batch_size", 2)
        if not (dist.is_available() and dist.is_initialized() and is_lost_connection(error)):
            raise
        fail(f"{name}: error: {who()}another process of the run has died: see the lines above; start the run again", 1)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            if not isinstance(error.filename, (str, bytes)):
                raise
            fail(f"{name}: error: {who()}{os.fsdecode(error.filename)}: {error.strerror or error}", 2)
        where = error.filename or "a file of the run"
        fresh = ", without --resume False" if name == "ASD.py" else ""
        fail(f"{name}: error: {where}: the disk is full: free some space and give the same command again{fresh}", 2)


def exit_code(stop: KeyboardInterrupt) -> int:
    """Return 128 and the signal's number, as shells have it."""
    return stop.code if isinstance(stop, Stopped) else 130


def who() -> str:
    """Return `rank 1: ` in a run of several processes, else nothing."""
    try:
        place = find_place()
    except UserError:  # it is being reported
        place = Place()
    return f"rank {place.rank}: " if place.size > 1 else ""


def is_lost_connection(error: RuntimeError) -> bool:
    """Return whether a collective failed because another process is gone."""
    import torch.distributed as dist

    text = str(error).lower()
    return isinstance(error, dist.DistBackendError) or "gloo" in text or "connection" in text


def fail(line: str, code: int) -> NoReturn:
    """Print one line on standard error and exit."""
    print(line, file=sys.stderr)
    sys.exit(code)
