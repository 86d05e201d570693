"""How far a result may be from the definition of its op: one table of bounds, and the measure."""

import math

import jax.numpy as jnp
from jax.typing import ArrayLike

# Largest RMS(got - want) / RMS(want), where want is computed in float32 or better from the same
# rounded inputs.
BOUNDS = {
    "float32": 1e-5,
    "float16": 1e-3,
    "bfloat16": 5e-3,
    "float8_e4m3fn": 3e-2,
}
# One row, or one entry, may be off by this many times the bound, relative to its own size plus
# RMS(want): a wrong one would be lost among thousands.
WORST = 10


def errors(got: ArrayLike, want: ArrayLike) -> tuple[float, float]:
    """RMS of the difference relative to the RMS of `want`: overall, and of the worst row.

    A row is along the last axis; its error is relative to its own RMS plus that of all. Both are
    infinite unless NaN and infinities are in the same places.
    """

    def rms(x, axis=None):
        return jnp.sqrt(jnp.mean(x**2, axis))

    got, want = jnp.asarray(got, jnp.float32), jnp.asarray(want, jnp.float32)
    is_finite = jnp.isfinite(want)
    is_alike = jnp.where(is_finite, jnp.isfinite(got), (got == want) | jnp.isnan(got + want))
    if not is_alike.all():
        return math.inf, math.inf
    difference, want = (jnp.where(is_finite, x, 0) for x in (got - want, want))
    whole = jnp.maximum(rms(want), 1e-30)
    rows = rms(difference, -1) / (rms(want, -1) + whole)
    return float(rms(difference) / whole), float(rows.max())
