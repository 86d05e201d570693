"""Random keys: one per request, and from it one per token that the request writes."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Key

from jax_mla.checks.arrays import as_key, as_seed


def request_keys(key: Any, batch: int) -> Key[Array, " B"]:
    """One key per row from what a caller passes as `key`.

    Args:
      key: a jax.random key or a seed, from which row i takes fold_in(key, i); or one of them per
        row, used unchanged: an array of keys, or a list of seeds. None is seed 0.

    Raises:
      ValueError: it is none of these. Seeds have the 32 bits that JAX takes without wrapping.
    """
    if isinstance(key, list | tuple | np.ndarray) and np.ndim(key) == 1:
        if len(key) != batch:
            raise ValueError(f"key must be one seed, or {batch} for {batch} rows, got {len(key)}")
        return jax.vmap(jax.random.key)(np.asarray([as_seed(one) for one in key], np.uint32))
    key = as_key(0 if key is None else key)
    if key.shape == ():
        return _by_row(key, batch)
    if key.shape != (batch,):
        raise ValueError(f"key must be one key, or {batch} for {batch} rows, got shape {key.shape}")
    return key


def token_keys(
    keys: Key[Array, " B"], position: int | Int[Array, ""] | Int[Array, " B"]
) -> Key[Array, " B"]:
    """The keys that `sample` takes for the tokens at these positions of the continuations."""
    position = jnp.broadcast_to(position, keys.shape)
    return jax.vmap(jax.random.fold_in)(keys, position)


@functools.partial(jax.jit, static_argnames="batch")
def _by_row(key, batch):
    return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(batch))
