"""Command lines: the options of ASD.py and test.py, and how errors end any command. Imports torch only when needed."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from utils.errors import UserError, without_controls
from utils.files import FULL
from utils.logs import on_screen
from utils.paths import PROJECT
from utils.runtime.processes import Process, find_process, rank
from utils.startup import Stopped, prepare_streams, stoppable

DEFAULT_CONFIG = "config/baseline_asd.yaml"
NO_MEMORY = "this computer is out of memory: use a smaller network, batch size or data set, or see data.placement"
TORCHRUN_FLAGS = ("--world-size", "--rank", "--dist-port")


class Parser(argparse.ArgumentParser):
    """Raises `UserError` instead of printing the usage, so that every mistake is reported in one line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}: --help lists the options")


def parse_arguments(description: str, argv: Sequence[str] | None, training: bool) -> argparse.Namespace:
    """Parse the options of ASD.py (`training`) or test.py."""
    parser = Parser(description=description, allow_abbrev=False)
    parser.add_argument("--config", default=DEFAULT_CONFIG, metavar="YAML", help=f"settings (default {DEFAULT_CONFIG})")
    default = "the latest one, if any; False: start over, moving an earlier run aside" if training else "latest_model.pt"
    help = f"name or path of a checkpoint (default: {default})"
    parser.add_argument("--resume", default="", metavar="CHECKPOINT", help=help)
    parser.add_argument(
        "--gpu", default="0", help="CUDA device number, several for ASD.py (0,1: one process each), or cpu (default 0)"
    )
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a setting of the YAML")
    parser.add_argument("--amp", action="store_true", help="convolutions and linear layers in bf16 (runtime.amp)")
    if not training:
        parser.add_argument("--images", metavar="DIR", help="label the image files below this folder instead")
        parser.add_argument("--out", metavar="FILE.csv", help="file for these labels (default: log/labels.csv of the run)")
    for flag in TORCHRUN_FLAGS:
        parser.add_argument(flag, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    for flag in TORCHRUN_FLAGS:
        if getattr(args, flag[2:].replace("-", "_")) is not None:
            raise UserError(f"{flag}: is not an option: start several processes with torchrun, which sets it")
    if args.config == DEFAULT_CONFIG and not Path(DEFAULT_CONFIG).exists():  # started from another folder
        args.config = str(PROJECT / DEFAULT_CONFIG)
    if args.amp:
        args.set.append("runtime.amp=true")
    return args


def command(name: str, main: Callable[[], None], kept: str = "") -> NoReturn:
    """Run a script's main function and leave with its exit code.

    0: success. 2: a user error, reported in one line. 130: Ctrl-C, 143: SIGTERM, also in one line. Anything else is a
    bug of this project and keeps its traceback. Ranks above 0 show warnings and errors only.

    Args:
        kept: printed when a signal stops the command: what is saved, and how to resume.
    """
    prepare_streams()
    with stoppable(), on_screen(logging.WARNING if rank() > 0 else logging.INFO):
        try:
            run(name, main)
        except KeyboardInterrupt as stop:
            if rank() > 0:
                sys.exit(exit_code(stop))  # rank 0 reports it
            fail(f"\n{name}: stopped. {kept}".rstrip(), exit_code(stop))
    if rank() > 0:  # done, while rank 0 may still be writing; torch's threads sometimes abort a process that ends normally
        sys.stderr.flush()
        os._exit(0)
    sys.exit(0)


def run(name: str, main: Callable[[], None]) -> None:
    """Run a script's main function; end the process with one line and an exit code if a user can fix the error."""
    try:
        main()
        sys.stdout.flush()  # so that a full disk or a closed pipe is handled below
    except UserError as error:
        if rank() > 0:
            time.sleep(3)  # an error on all ranks is reported by rank 0, and torchrun then ends this one
        fail(f"{name}: error: {who()}{without_controls(str(error))}", 2)
    except BrokenPipeError:
        sys.stderr.close()  # the reader of the output has exited
        sys.exit(141)
    except MemoryError:
        fail(f"{name}: error: {who()}{NO_MEMORY}", 2)
    except RuntimeError as error:
        import torch
        import torch.distributed as dist

        if isinstance(error, torch.OutOfMemoryError):
            sizes = "loader.batch_size, semi.loader.batch_size, undefended.batch_size or the batch size of the defense"
            fail(f"{name}: error: the device is out of memory: lower {sizes}, whichever was in use", 2)
        if "no kernel image" in str(error):
            fail(
                f"{name}: error: {who()}the installed torch has no code for this device: install a build for it, or --gpu cpu",
                2,
            )
        if "can't allocate memory" in str(error):  # torch, on the CPU
            fail(f"{name}: error: {who()}{NO_MEMORY}", 2)
        if not (dist.is_available() and dist.is_initialized() and is_lost_connection(error)):
            raise
        fail(f"{name}: error: {who()}another process of the run has died: see the lines above, then start the run again", 1)
    except OSError as error:
        if error.errno not in FULL:
            if not isinstance(error.filename, (str, bytes)):
                raise
            fail(f"{name}: error: {who()}{os.fsdecode(error.filename)}: {error.strerror or error}", 2)
        where = error.filename or "a file of the run"
        fresh = ", without --resume False" if name == "ASD.py" else ""
        fail(f"{name}: error: {where}: the disk is full: free some space, then run the same command again{fresh}", 2)


def exit_code(stop: KeyboardInterrupt) -> int:
    """Return 128 + the number of the signal, as shells do."""
    return stop.code if isinstance(stop, Stopped) else 130


def who() -> str:
    """Return e.g. `rank 1: ` in a run of several processes, else an empty string."""
    try:
        process = find_process()
    except UserError:  # being reported already
        process = Process()
    return f"rank {process.rank}: " if process.world_size > 1 else ""


def is_lost_connection(error: RuntimeError) -> bool:
    """Return whether a collective operation failed because another process has died."""
    import torch.distributed as dist

    text = str(error).lower()
    return isinstance(error, dist.DistBackendError) or "gloo" in text or "connection" in text


def fail(line: str, code: int) -> NoReturn:
    """Print one line on standard error and exit."""
    print(line, file=sys.stderr)
    distributed = sys.modules.get("torch.distributed")
    if distributed and distributed.is_initialized():  # torch's threads sometimes abort a process that ends normally
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
