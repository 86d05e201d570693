"""What sizes and mesh axes may be, for modules with and without jax."""

from __future__ import annotations

import numbers


def check_positive(**sizes: int) -> None:
    """Every size is an integer of at least 1; keyword names are the arguments' names."""
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, numbers.Integral) or size < 1:
            raise ValueError(f"{name} must be an integer of at least 1, got {size!r}")
