"""Arrays as callers pass them in: values that the host can read, and conversions by name.

An array is a jax.Array, traced or not, or a numpy array; lists and numbers count as numpy arrays.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import DTypeLike
from jaxtyping import Array, Int, Shaped

from jax_mla.checks.sizes import check_one_of
from jax_mla.config.model import DTYPES


def check_dtype(dtype: DTypeLike) -> str:
    """The name of a dtype that parameters and caches may have."""
    try:
        name = jnp.dtype(dtype).name
    except TypeError:
        name = str(dtype)
    check_one_of("dtype", name, DTYPES)
    return name


def concrete(x: Any) -> np.ndarray | None:
    """The values of x where this process can read them by itself, otherwise None.

    It cannot while x is traced, nor where parts of x are on other hosts only; an array replicated
    over several hosts can be read. `pallas_kernels.checks.host_values` follows the same rule.
    """
    if isinstance(x, Tracer):
        return None
    if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
        return None
    return np.asarray(x)


def as_array(name: str, x: Any) -> Shaped[Array | np.ndarray, ...]:
    """x where it is an array, traced or not; lists and numbers as an array on the host."""
    if isinstance(x, jax.Array | np.ndarray):
        return x
    try:
        return np.asarray(x)
    except ValueError:  # lists of unequal lengths
        raise ValueError(f"{name} must be an array, got {x!r:.60}") from None


def as_int32(name: str, x: Any) -> Int[Array, ...]:
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
