"""Numbers and arrays as callers pass them in: read as they are, or refused by name."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import DTypeLike

from jax_mla.config.model import DTYPES


def check_dtype(dtype: DTypeLike) -> str:
    """The name of a dtype that parameters and caches may have."""
    try:
        name = jnp.dtype(dtype).name
    except TypeError:
        name = str(dtype)
    if name not in DTYPES:
        raise ValueError(f"dtype {name} is not one of {', '.join(DTYPES)}")
    return name


def concrete(x) -> np.ndarray | None:
    """The values of x, or None while they are being traced or live on other hosts only."""
    if isinstance(x, Tracer):
        return None
    if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
        return None
    return np.asarray(x)


def as_array(name: str, x) -> jax.Array | np.ndarray:
    """x where it is an array, traced or not; lists and numbers as an array on the host."""
    if isinstance(x, jax.Array | np.ndarray):
        return x
    try:
        return np.asarray(x)
    except ValueError:  # lists of unequal lengths
        raise ValueError(f"{name} must be an array, got {x!r:.60}") from None


def as_int32(name: str, x) -> jax.Array:
    """x as an array of int32: lists are read, and no number is rounded or wrapped around.

    Converted on the host where x is there: on a device each shape would compile a program.
    """
    x = as_array(name, x)
    if not jnp.issubdtype(x.dtype, jnp.integer):
        raise ValueError(f"{name} must be integers, got dtype {x.dtype}")
    if x.dtype.itemsize >= 4 and x.dtype != np.int32 and (values := concrete(x)) is not None:
        largest = np.iinfo(np.int32).max
        outside = values[(values > largest) | (values < -largest - 1)]
        if outside.size:
            raise ValueError(f"{name} must fit into 32 bits, got {outside[0]}")
    return jnp.asarray(x.astype(np.int32) if isinstance(x, np.ndarray) else x, jnp.int32)
