"""Which process of a run this one is, as torchrun's environment variables say. Standard library only."""

from __future__ import annotations

import os
from dataclasses import dataclass

from utils.errors import UserError

COUNTS = ("WORLD_SIZE", "RANK", "LOCAL_RANK")
RENDEZVOUS = ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "RANK")  # what a process needs to find the others


@dataclass(frozen=True)
class Place:
    """One of `size` processes; `local` is its number on this computer."""

    rank: int = 0
    size: int = 1
    local: int = 0


def launched() -> bool:
    """Return whether a launcher such as torchrun started this process, alone or as one of several."""
    return all(os.environ.get(name) for name in RENDEZVOUS)


def find_place() -> Place:
    """Return this process' place among the processes that a launcher started.

    Clusters, containers and shells leave some of the variables behind. Without all of `RENDEZVOUS` there is nobody to
    meet, and the process is alone, whatever the others say.

    Raises:
        UserError: the variables are complete, and one of them makes no sense.
    """
    if not launched():
        return Place()
    counts = []
    for name in COUNTS:
        text = (os.environ.get(name) or "0").strip()
        if not (text.isascii() and text.isdigit()):
            raise UserError(f"{name}: {text!r}: expected a whole number: unset it, or start the processes with torchrun")
        counts.append(int(text))
    size, rank, local = counts
    if not rank < size:
        raise UserError(f"RANK: {rank}: expected less than WORLD_SIZE ({size}): unset both, or start with torchrun")
    return Place(rank, size, local)


def leftovers() -> list[str]:
    """Return the variables, as `NAME=value`, that speak of several processes although no launcher started this one."""
    if launched():
        return []
    alone = {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"}
    return [f"{name}={os.environ[name]}" for name in COUNTS if (os.environ.get(name) or alone[name]) != alone[name]]


def rank() -> int:
    """Return this process' number; 0 where the variables make no sense, which `find_place` refuses."""
    try:
        return find_place().rank
    except UserError:
        return 0
