"""The rank of this process, from torchrun's environment variables. Standard library only."""

from __future__ import annotations

import os
from dataclasses import dataclass

from utils.errors import UserError

COUNTS = ("WORLD_SIZE", "RANK", "LOCAL_RANK")
RENDEZVOUS = ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "RANK")  # required to connect to the other processes


@dataclass(frozen=True)
class Process:
    """The rank of one of `world_size` processes, and its local rank on this computer."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0


def launched() -> bool:
    """Return whether a launcher such as torchrun started this process, alone or as one of several."""
    return all(os.environ.get(name) for name in RENDEZVOUS)


def find_process() -> Process:
    """Return the rank of this process among those that a launcher started.

    Clusters, containers and shells may leave some of the variables set. Unless all of `RENDEZVOUS` are set, the process
    runs alone.

    Raises:
        UserError: all variables are set, but one is invalid.
    """
    if not launched():
        return Process()
    counts = []
    for name in COUNTS:
        text = (os.environ.get(name) or "0").strip()
        if not (text.isascii() and text.isdigit()):
            raise UserError(f"{name}: {text!r}: must be a whole number: unset it, or start the processes with torchrun")
        counts.append(int(text))
    size, rank, local = counts
    if not rank < size:
        raise UserError(f"RANK: {rank}: must be less than WORLD_SIZE ({size}): unset both, or use torchrun")
    return Process(rank, size, local)


def leftovers() -> list[str]:
    """Return the variables, as `NAME=value`, that mean several processes although no launcher started this one."""
    if launched():
        return []
    alone = {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"}
    return [f"{name}={os.environ[name]}" for name in COUNTS if (os.environ.get(name) or alone[name]) != alone[name]]


def rank() -> int:
    """Return the rank of this process; 0 if the variables are invalid, which `find_process` reports."""
    try:
        return find_process().rank
    except UserError:
        return 0
