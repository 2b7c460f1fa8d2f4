"""Random numbers as a function of (seed, purpose, epoch): nothing to save, so resuming is exact.

Each draw makes a new generator from its key. The same key gives the same numbers on every device, regardless of what was
drawn before.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch


def key_seed(seed: int, *key: object) -> int:
    """Return a 63-bit seed that depends on `seed` and on every part of `key`."""
    text = "/".join(str(part) for part in (seed, *key))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(seed: int, *key: object) -> torch.Generator:
    """Return torch's CPU generator for a key, e.g. `generator(seed, "mixmatch", epoch)`."""
    return torch.Generator().manual_seed(key_seed(seed, *key))


def numpy_generator(seed: int, *key: object) -> np.random.Generator:
    """Return numpy's generator for a key (for distributions that torch cannot draw from a given generator)."""
    return np.random.Generator(np.random.PCG64(key_seed(seed, *key)))
