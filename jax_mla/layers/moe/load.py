"""How evenly the tokens of a batch are spread over the experts of a layer."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jax_mla.config.model import DeepSeekConfig
from jax_mla.layers.moe.router import Routing


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerLoad:
    """What training reads of a layer's routing, small enough to keep for every layer.

    Attributes:
      load: tokens of each expert.
      balance: `sequence_balance` summed over the rows of the batch.
      num_dropped: (token, expert) pairs dropped by the capacity of the dispatch; None without one.
    """

    load: Int[Array, "*L E"]
    balance: Float[Array, "*L"]
    num_dropped: Int[Array, "*L"] | None


def layer_load(routing: Routing, config: DeepSeekConfig) -> LayerLoad:
    """The load of one layer, from its routing of [B, T] tokens."""
    load = expert_load(routing.expert_index, config)
    return LayerLoad(load, sequence_balance(routing).sum(), routing.num_dropped)


def expert_load(expert_index: Int[Array, "*L B T A"], config: DeepSeekConfig) -> Int[Array, "*L E"]:
    """Tokens of a batch per expert, of one layer or of each layer; padding (-1) is not counted."""
    if expert_index.ndim == 3:
        num_experts, _, _ = config.moe_sizes
        # bincount counts a negative number as 0, and leaves out what is past its length.
        chosen = jnp.where(expert_index < 0, num_experts, expert_index)
        return jnp.bincount(chosen.reshape(-1), length=num_experts)
    return jax.vmap(lambda of_layer: expert_load(of_layer, config))(expert_index)


def sequence_balance(routing: Routing) -> Float[Array, " B"]:
    """sum_e f[e] * P[e] per row: 1 where its tokens are spread evenly over the experts.

    f[e] = E / (A * T) * the tokens of the row that were sent to expert e, P[e] = the mean over the
    row of score[e] / sum(scores). All tokens of a row count as one sequence of length T; padding,
    whose expert_index is -1, does not count, and a row of nothing else has 0. Only P has a
    gradient.

    Args:
      routing: of [B, T] tokens, with scores.

    Source: DeepSeek-V3, arXiv 2412.19437, equations 17 to 20.
    """
    scores, (num_rows, _, active) = routing.scores, routing.expert_index.shape
    assert scores is not None
    num_experts = scores.shape[-1]
    is_valid = routing.expert_index[..., :1] >= 0
    num_tokens = jnp.maximum(is_valid.sum(axis=1), 1).astype(jnp.float32)
    flat = jnp.where(is_valid, routing.expert_index, num_experts).reshape(num_rows, -1)
    count = jax.vmap(lambda index: jnp.bincount(index, length=num_experts))(flat)
    f = count.astype(jnp.float32) * (num_experts / (active * num_tokens))
    share = scores / scores.sum(axis=-1, keepdims=True)
    p = jnp.where(is_valid, share, 0).sum(axis=1) / num_tokens
    return (f * p).sum(axis=-1)
