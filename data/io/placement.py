"""Where the images of a run are kept (`data.placement`): on the device, in host memory, or in mapped tables on disk."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from data.sets import Mapped
from utils.errors import UserError

logger = logging.getLogger(__name__)
SHARE = 0.5  # of the free memory may be images: the rest is for the network, its activations and temporary copies
CGROUP = Path("/sys/fs/cgroup")
MEMINFO = Path("/proc/meminfo")


def choose_placement(wanted: str, train: np.ndarray, tests: Sequence[np.ndarray], device: torch.device, processes: int) -> str:
    """Return `device`, `host` or `disk`, and log where the images are.

    `auto` takes the first placement in which all images fill at most half of the free memory; `disk` is possible only for
    images in a mapped table. All processes of the run share the host memory.

    Args:
        wanted: `data.placement`.
        train, tests: (n, H, W, 3) uint8, the training set and the test sets.
        processes: of the run on this computer.
    Raises:
        UserError: `device` is wanted and the images do not fit there.
    """
    size = train.nbytes + sum(images.nbytes for images in tests)
    host = available_memory() / processes
    free = host if device.type == "cpu" else float(torch.cuda.mem_get_info(device)[0])
    if wanted == "device" and size > free:
        need = f"the images need {gigabytes(size)}, but {device} has {gigabytes(free)} free"
        raise UserError(f"data.placement: device: {need}: set auto, host or disk")
    mapped = isinstance(train, Mapped)
    if wanted == "auto":
        placement = "device" if size <= SHARE * free else "disk" if mapped and size > SHARE * host else "host"
    else:
        placement = "host" if wanted == "disk" and not mapped else wanted
    places = {
        "device": f"on {device}",
        "host": "in host memory, fetched by index",
        "disk": "in mapped tables on disk, fetched by index",
    }
    memory = f"{gigabytes(host)} of host memory" + ("" if device.type == "cpu" else f", {gigabytes(free)} on {device}")
    logger.info(
        f"{len(train)} training and {sum(map(len, tests))} test images of {train.shape[2]} x {train.shape[1]} pixels, "
        f"{gigabytes(size)}, {places[placement]} (data.placement: {wanted}; free: {memory})"
    )
    return placement


def gigabytes(size: float) -> str:
    """Return a number of bytes as text, e.g. `5.87 GB`."""
    return f"{size / 1e9:.2f} GB"


def available_memory() -> float:
    """Return how many bytes of host memory are free: the system's, or its container's if fewer."""
    found = [limit for limit in (meminfo_available(), container_available()) if limit is not None]
    return min(found, default=float("inf"))


def meminfo_available() -> float | None:
    """Return how many bytes Linux reports as available without swapping."""
    try:
        lines = MEMINFO.read_text().splitlines()
        return next(1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        return None


def container_available() -> float | None:
    """Return how many bytes the limit of the container (cgroup 2) leaves; the page cache counts as free."""
    try:
        limit = int((CGROUP / "memory.max").read_text())  # "max", no limit, raises ValueError
        used = int((CGROUP / "memory.current").read_text())
        stat = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    return float(max(0, limit - used + int(stat.get("inactive_file", 0))))
