"""Mixture of experts: a float32 router, routed experts, shared experts."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jax_mla.checks.arrays import check_hidden
from jax_mla.config.model import DeepSeekConfig
from jax_mla.layers.linear import Linear, RngsLike, as_rngs, constant
from jax_mla.layers.mlp import SwiGLU
from jax_mla.layers.moe.experts import Experts, apply_local
from jax_mla.layers.moe.on_mesh import apply_on_mesh, count_dropped, route_on_mesh
from jax_mla.layers.moe.router import Routing, route
from jax_mla.sharding.placement import Placement


class RouterBias(nnx.Variable):
    """What moves by a rule of its own, not by gradients, so that it is no nnx.Param."""


class MoE(nnx.Module):
    """DeepSeek's mixture of experts; drops no token, unless the rules' dispatch has a capacity.

    y = sum_a expert_weight[a] * expert[expert_index[a]](x) + shared(x)

    Its e_score_correction_bias, of topk_method "noaux_tc", is no nnx.Param: an optimizer of those
    leaves it alone, and `training.update_router_bias` moves it.

    Args:
      config: reads hidden_size, moe_intermediate_size, n_routed_experts, n_shared_experts,
        num_experts_per_tok and the router's fields.
      placement: the mesh of weights and inputs; None on a single device.

    Cost: per token, A + n_shared_experts feed-forward layers of width moe_intermediate_size.
    """

    def __init__(
        self, config: DeepSeekConfig, *, rngs: RngsLike, placement: Placement | None = None
    ) -> None:
        self.config, self.placement, rngs = config, placement, as_rngs(rngs)
        D, (E, _, F) = config.hidden_size, config.moe_sizes
        options = {"stddev": config.initializer_range, "dtype": config.dtype}
        # Every device routes its own tokens over all experts, so the router is not sharded by them.
        self.gate = Linear("...D,DE->...E", (D, E), ("embed", None), rngs=rngs, **options)
        if config.topk_method == "noaux_tc":
            # float32 in every checkpoint: it decides between scores that bfloat16 would make equal
            self.e_score_correction_bias = constant(
                0.0, (E,), (None,), dtype="float32", kind=RouterBias
            )
        self.experts = Experts(config, rngs=rngs)
        if config.n_shared_experts:
            self.shared_experts = SwiGLU(D, F * config.n_shared_experts, rngs=rngs, **options)

    def route(self, x: Float[Array, "*B D"], valid: Bool[Array, "*B"] | None = None) -> Routing:
        """The experts and weights of every token; the router multiplies in float32.

        Args:
          valid: False for padding, which goes to no expert and takes up no capacity; None
            if there is none.
        """
        check_hidden(x, self.config.hidden_size)
        logits = self.gate(x.astype(jnp.float32))
        has_bias = self.config.topk_method == "noaux_tc"
        # The bias balances load by its own rule (arXiv 2408.15664) and never sees a gradient.
        bias = jax.lax.stop_gradient(self.e_score_correction_bias[...]) if has_bias else None

        choose = functools.partial(route, config=self.config)
        if self.placement is not None:
            choose = route_on_mesh(choose, logits, self.placement)
        routing = choose(logits, bias).of_valid(valid)
        if self.placement is None or self.placement.rules.dispatch.capacity is None:
            return routing
        num_experts = logits.shape[-1]
        num_dropped = count_dropped(routing.expert_index, num_experts, self.placement)
        return dataclasses.replace(routing, num_dropped=num_dropped)

    def __call__(
        self,
        x: Float[Array, "*B D"],
        routing: Routing | None = None,
        *,
        valid: Bool[Array, "*B"] | None = None,
        expert_layer: int | Int[Array, ""] = 0,
    ) -> Float[Array, "*B D"]:
        """Applies the layer.

        Args:
          x: under a mesh [B, T, D].
          routing: replaces the router's own choice.
          valid: False for padding, which goes through the shared experts only.
          expert_layer: the layer to take of a pool of experts.
        """
        check_hidden(x, self.config.hidden_size)
        routing = self.route(x, valid) if routing is None else routing.of_valid(valid)
        y = self._routed(x, routing, expert_layer)
        if self.config.n_shared_experts:
            y = y + self.shared_experts(x)
        return y

    def _routed(self, x: Array, routing: Routing, expert_layer: int | Array) -> Array:
        index, weight = routing.expert_index, routing.expert_weight
        weights = self.experts.pools()
        if self.placement is not None:
            y = apply_on_mesh(x, index, weight, weights, expert_layer, self.placement)
        else:
            flat, index, weight = (a.reshape(-1, a.shape[-1]) for a in (x, index, weight))
            y = apply_local(flat, index, weight, weights, expert_layer).reshape(x.shape)
        return y.astype(x.dtype)
