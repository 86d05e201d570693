"""Checks of sizes and choices, for modules with and without jax."""

from __future__ import annotations

import numbers
from collections.abc import Iterable
from typing import Any


def check_positive(**sizes: Any) -> None:
    """Every size is an integer of at least 1; keyword names are the arguments' names."""
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, numbers.Integral) or size < 1:
            raise ValueError(f"{name} must be an integer of at least 1, got {size!r}")


def check_one_of(name: str, value: Any, choices: Iterable[Any]) -> None:
    """The value is one of the choices."""
    choices = list(choices)
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(str, choices))}, got {value!r}")
