"""The order of positions over devices in which causal attention is equal work for all of them.

T positions are cut into 2 n stripes, and device d of n holds stripes d and 2 n - 1 - d: a late
stripe, which sees much, with an early one. Tokens are put into this order before the first layer
and back after the last one; rotary positions go with them.

Source: Brandon et al., Striped Attention, arXiv 2311.09431; stripes are paired as in Llama
3's context parallelism, arXiv 2407.21783, section 3.3.2.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array


def stripe_order(num_devices: int) -> np.ndarray:
    """The stripes in the order in which the devices hold them, two each."""
    device = np.arange(num_devices)
    return np.stack([device, 2 * num_devices - 1 - device], axis=1).reshape(-1)


def gather_stripes(x: Array, axes: tuple[str, ...]) -> Array:
    """All devices' parts of x[B, T, ...] in the order of positions. Inside of shard_map."""
    stripes = jax.lax.all_gather(x, axes, axis=1, tiled=True)
    order = np.argsort(stripe_order(jax.lax.axis_size(axes)))
    return stripes.reshape(x.shape[0], order.size, -1, *x.shape[2:])[:, order].reshape(
        stripes.shape
    )


# Stripe s is on device min(s, last - s), so that every device holds one even and one odd stripe:
# two permutations, each of one stripe per device, move them all.
def exchange_to_stripes(x: Array, axes: tuple[str, ...]) -> Array:
    """This device's two stripes, from its contiguous part of the positions. Inside shard_map."""
    even, odd = (
        jax.lax.ppermute(stripe, axes, [(i, holder) for i, holder in enumerate(holders)])
        for stripe, holders in zip(jnp.split(x, 2, axis=1), _holders(axes), strict=True)
    )
    return jnp.concatenate(_swapped(even, odd, axes), axis=1)


def exchange_from_stripes(x: Array, axes: tuple[str, ...]) -> Array:
    """The inverse of `exchange_to_stripes`."""
    first, second = jnp.split(x, 2, axis=1)
    stripes = [
        jax.lax.ppermute(stripe, axes, [(holder, i) for i, holder in enumerate(holders)])
        for stripe, holders in zip(_swapped(first, second, axes), _holders(axes), strict=True)
    ]
    return jnp.concatenate(stripes, axis=1)


def _holders(axes: tuple[str, ...]) -> tuple[list[int], list[int]]:
    """Devices of the even stripes 0, 2, ..., and of the odd ones."""
    last = 2 * jax.lax.axis_size(axes) - 1
    holders = [min(stripe, last - stripe) for stripe in range(last + 1)]
    return holders[::2], holders[1::2]


def _swapped(first: Array, second: Array, axes: tuple[str, ...]) -> tuple[Array, Array]:
    """Exchanged on devices of odd rank, whose first stripe is an odd one."""
    is_even = jax.lax.axis_index(axes) % 2 == 0
    return jnp.where(is_even, first, second), jnp.where(is_even, second, first)
