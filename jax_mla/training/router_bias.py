"""Load balancing without an auxiliary loss: a rule that moves the router's bias."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Int

from jax_mla.config.leaf_types import ROUTER_BIAS, flatten, leaf_type
from jax_mla.params import Params, map_leaves

_NAME = "e_score_correction_bias"


def update_router_bias(params: Params, load: Int[Array, "*L E"], rate: float) -> Params:
    """bias += rate * sign(mean load - load): overloaded experts become less likely, idle ones more.

    Args:
      params: of a model; or of a single `MoE` layer, as `nnx.to_pure_dict(nnx.state(layer))`, with
        the load Int[E] of `expert_load(layer.route(x).expert_index, config)`.
      load: from `NextTokenLoss`, of the batch just seen.
      rate: 0.001 for DeepSeek-V3.

    Raises:
      ValueError: the model has no router bias, or `load` is not of its shape.

    Source: Wang et al., arXiv 2408.15664.
    """
    if _NAME in params:
        return params | {_NAME: _moved(params[_NAME], load, rate)}
    if not has_router_bias(params):
        raise ValueError(f"these parameters have no {_NAME} to update")
    return map_leaves(lambda leaf, x: _moved(x, load, rate) if leaf is ROUTER_BIAS else x, params)


def _moved(bias: Array, load: Array, rate: float) -> Array:
    if load.shape != bias.shape:
        raise ValueError(f"load has shape {load.shape}, the router bias {bias.shape}")
    counts = load.astype(jnp.float32)
    return bias + rate * jnp.sign(counts.mean(axis=-1, keepdims=True) - counts)


def has_router_bias(params: Params) -> bool:
    """Whether there is a bias for `update_router_bias` to move."""
    return any(leaf_type(path) is ROUTER_BIAS for path in flatten(params))
