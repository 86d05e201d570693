"""The few lengths that programs are compiled for."""

from __future__ import annotations

from jax_mla.cache.latent import DEFAULT_PAGE_SIZE
from jax_mla.sharding.placement import Placement


def bucket(size: int) -> int:
    """64, 128, 256, then four even steps an octave: never 25 % more than is needed."""
    if size <= 4 * DEFAULT_PAGE_SIZE:
        return max(DEFAULT_PAGE_SIZE, 1 << (size - 1).bit_length())
    step = 1 << ((size - 1).bit_length() - 3)
    return -(-size // step) * step


def prompt_bucket(size: int, placement: Placement | None) -> int:
    """The bucket, rounded up to what the mesh can split."""
    parts = 1 if placement is None else placement.num_parts("sequence")
    return -(-bucket(size) // parts) * parts
