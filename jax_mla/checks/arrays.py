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
from jaxtyping import Array, Int, Key, Shaped

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


def check_hidden(x: Any, width: int, num_axes: int | None = None) -> None:
    """x holds hidden states of this width; num_axes None takes any number of axes."""
    shape, dtype = np.shape(x), jnp.result_type(x)
    is_right = shape[-1:] == (width,) and num_axes in (None, len(shape))
    if not is_right or not jnp.issubdtype(dtype, jnp.floating):
        axes = "... D" if num_axes is None else "B T D"
        raise ValueError(
            f"x must be Float[{axes}] with D = {width}, got shape {shape} of dtype {dtype}"
        )


def as_key(key: Any) -> Key[Array, "*B"]:
    """A jax.random key, of either kind or traced, as it is; a seed as its key.

    Raises:
      ValueError: it is neither. Seeds have the 32 bits that JAX takes without wrapping.
    """
    if isinstance(key, jax.Array):
        if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
            return key
        if key.dtype == jnp.uint32 and key.ndim > 0:
            return jax.random.wrap_key_data(key)
    return jax.random.key(as_seed(key))


def as_seed(seed: Any) -> int:
    """A seed as a number of Python."""
    is_seed = isinstance(seed, int | np.integer) and not isinstance(seed, bool)
    if not is_seed or not 0 <= seed < 2**32:
        raise ValueError(
            f"key must be a jax.random key or a seed from 0 to 2**32 - 1, got {seed!r:.60}"
        )
    return int(seed)


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
