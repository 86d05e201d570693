"""How a layer declares a weight and multiplies by it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx


def weight(
    rngs: nnx.Rngs,
    shape: tuple[int, ...],
    logical_axes: tuple[str | None, ...],
    *,
    stddev: float,
    dtype: str,
) -> nnx.Param:
    """A normally distributed parameter that knows the logical name of each of its axes.

    `logical_axes` is a metadata key of our own: Flax's `out_sharding` would demand a mesh here.
    """
    value = stddev * jax.random.normal(rngs.params(), shape, jnp.float32)
    return nnx.Param(value.astype(dtype), logical_axes=logical_axes)


def constant(
    value: float, shape: tuple[int, ...], logical_axes: tuple[str | None, ...], *, dtype: str
) -> nnx.Param:
    """A parameter that starts at one value: norm scales at 1, biases at 0."""
    return nnx.Param(jnp.full(shape, value, dtype), logical_axes=logical_axes)


def project(equation: str, x: jax.Array, w: jax.Array, bias: jax.Array | None = None) -> jax.Array:
    """einsum in x's dtype; float32 stays float32, where a GPU would take TF32 by default."""
    y = jnp.einsum(equation, x, w.astype(x.dtype), precision=jax.lax.Precision.HIGHEST)
    if bias is not None:
        y = y + bias.astype(y.dtype).reshape((1,) * (y.ndim - bias.ndim) + bias.shape)
    return y
