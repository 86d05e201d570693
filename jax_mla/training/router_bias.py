"""Load balancing without an auxiliary loss: a rule that moves the router's bias."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Int

from jax_mla.config.leaf_types import ROUTER_BIAS, flatten, leaf_type
from jax_mla.params import Params, map_leaves


def update_router_bias(params: Params, load: Int[Array, "L E"], rate: float) -> Params:
    """bias += rate * sign(mean load - load): overloaded experts become less likely, idle ones more.

    Args:
      load: from `NextTokenLoss`, of the batch just seen.
      rate: 0.001 for DeepSeek-V3.

    Raises:
      ValueError: the model has no router bias, or `load` is not of its shape.

    Source: Wang et al., arXiv 2408.15664.
    """
    if not has_router_bias(params):
        raise ValueError("these parameters have no e_score_correction_bias to update")
    counts = load.astype(jnp.float32)
    off = counts.mean(axis=-1, keepdims=True) - counts

    def move(leaf, x):
        if leaf is not ROUTER_BIAS:
            return x
        if load.shape != x.shape:
            raise ValueError(f"load has shape {load.shape}, the router bias {x.shape}")
        return x + rate * jnp.sign(off)

    return map_leaves(move, params)


def has_router_bias(params: Params) -> bool:
    """Whether there is a bias for `update_router_bias` to move."""
    return any(leaf_type(path) is ROUTER_BIAS for path in flatten(params))
