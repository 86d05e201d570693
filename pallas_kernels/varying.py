"""The mesh axes over which a value varies inside `jax.shard_map`; no effect outside of it."""

from typing import Any

import jax


def align(*arrays) -> tuple[Any, ...]:
    """Casts every array to vary over all mesh axes over which any of them varies.

    JAX's operators do this by themselves; functions with their own derivative and the carry of a
    loop do not. The transpose of the cast sums over the added axes, as the gradient of a replicated
    input must be. None stays None.
    """
    axes: frozenset[str] = frozenset().union(*(_axes(x) for x in arrays if x is not None))
    return tuple(
        x if x is None or not (missing := axes - _axes(x)) else _cast(x, tuple(sorted(missing)))
        for x in arrays
    )


def _axes(x) -> frozenset[str]:
    return jax.typeof(x).manual_axis_type.varying


def _cast(x, axes: tuple[str, ...]) -> jax.Array:
    return jax.lax.pcast(x, axes, to="varying")
