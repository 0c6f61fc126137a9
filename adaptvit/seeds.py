"""Streams of random numbers that have nothing in common: whatever draws has a stream of its own, known by its name."""

import hashlib
import random

import numpy as np
import torch


def stream(name: str, *numbers: int) -> int:
    """The seed of a stream, in [0, 2^63): by hashing, so that neighbouring numbers give unrelated seeds.

    Args:
        name: what draws.
        numbers: the run's seed, and whatever else it draws anew for: the epoch, the process.
    """
    path = "/".join([name, *map(str, numbers)])
    return int.from_bytes(hashlib.sha256(path.encode()).digest()[:8], "big") >> 1


def begin_stream(name: str, *numbers: int) -> None:
    """Seed Python's, numpy's and torch's global states, on every device, with a stream; a loader's processes follow."""
    seed = stream(name, *numbers)
    random.seed(seed)
    np.random.seed([seed >> 32, seed & 0xFFFFFFFF])
    torch.manual_seed(seed)
