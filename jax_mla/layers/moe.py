"""Mixture of experts: a float32 router, routed experts, shared experts."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jax_mla.config import DeepSeekConfig
from jax_mla.layers.expert_parallel import (
    Weights,
    apply_local,
    apply_on_mesh,
    count_dropped,
)
from jax_mla.layers.mlp import SwiGLU
from jax_mla.layers.weight import constant, project, weight
from jax_mla.sharding import Placement


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Routing:
    """The A experts that each token goes to, in no particular order, and their weights.

    `scores` are those of all experts, unbiased, for a balance loss; a layer does not read them.
    `num_dropped` of the choices are left out for want of capacity; None if there is no such limit.
    """

    expert_index: Int[Array, "*B A"]
    expert_weight: Float[Array, "*B A"]
    scores: Float[Array, "*B E"] | None = None
    num_dropped: Int[Array, "*L"] | None = None


def route(
    logits: Float[Array, "M E"], bias: Float[Array, " E"] | None, config: DeepSeekConfig
) -> Routing:
    """Chooses A experts a token from router logits; everything in float32.

    scores = softmax or sigmoid of the logits. `greedy` takes the A best. The other two first keep
    the `topk_group` best of `n_group` groups: `group_limited_greedy` (V2) judges a group by its
    best score, `noaux_tc` (V3) by the sum of its two best biased scores. The bias steers only the
    choice: weights are the unbiased scores, normalised if `norm_topk_prob`, times
    `routed_scaling_factor`.

    Source: DeepSeek-V2, arXiv 2405.04434, section 2.2; DeepSeek-V3, arXiv 2412.19437, section 2.1.
    """
    is_sigmoid = config.scoring_func == "sigmoid"
    scores = jax.nn.sigmoid(logits) if is_sigmoid else jax.nn.softmax(logits, axis=-1)
    biased = scores if bias is None else scores + bias[None, :]
    if config.topk_method == "group_limited_greedy":
        biased = _keep_best_groups(biased, config, scores_per_group=1, dropped=0.0)
    elif config.topk_method == "noaux_tc":
        # Dropped experts get -inf, not 0: kept ones may be negative after the bias.
        biased = _keep_best_groups(biased, config, scores_per_group=2, dropped=-jnp.inf)
    _, active, _ = config.moe_sizes
    expert_index = jax.lax.top_k(biased, active)[1]
    expert_weight = jnp.take_along_axis(scores, expert_index, axis=-1)
    if config.norm_topk_prob:
        expert_weight = expert_weight / (expert_weight.sum(axis=-1, keepdims=True) + 1e-20)
    return Routing(expert_index, expert_weight * config.routed_scaling_factor, scores)


def _keep_best_groups(
    scores: Float[Array, "M E"], config: DeepSeekConfig, *, scores_per_group: int, dropped: float
) -> Float[Array, "M E"]:
    num_groups, num_kept = config.n_group or 1, config.topk_group or 1
    if num_kept == num_groups:
        return scores
    grouped = scores.reshape(scores.shape[0], num_groups, -1)
    best = jax.lax.top_k(grouped, min(scores_per_group, grouped.shape[-1]))[0].sum(axis=-1)
    kept = jax.lax.top_k(best, num_kept)[1]
    is_kept = jax.nn.one_hot(kept, num_groups, dtype=jnp.bool_).any(axis=-2)
    return jnp.where(is_kept[..., None], grouped, dropped).reshape(scores.shape)


class Experts(nnx.Module):
    """The weights of E feed-forward layers of one shape; of all layers' experts when pooled."""

    def __init__(self, config: DeepSeekConfig, *, rngs: nnx.Rngs):
        D, (E, _, F) = config.hidden_size, config.moe_sizes
        options = {"stddev": config.initializer_range, "dtype": config.dtype}
        self.gate_proj = weight(rngs, (E, D, F), ("expert", "embed", "mlp"), **options)
        self.up_proj = weight(rngs, (E, D, F), ("expert", "embed", "mlp"), **options)
        self.down_proj = weight(rngs, (E, F, D), ("expert", "mlp", "embed"), **options)

    def weights(self) -> Weights:
        """With an axis of layers, which a pool has already."""
        gate, up, down = self.gate_proj[...], self.up_proj[...], self.down_proj[...]
        return (gate, up, down) if gate.ndim == 4 else (gate[None], up[None], down[None])


class MoE(nnx.Module):
    """DeepSeek's mixture of experts; no token is dropped, unless rules set an expert_capacity.

    y = sum_a expert_weight[a] * expert[expert_index[a]](x) + shared(x)

    Args:
      config: reads hidden_size, moe_intermediate_size, n_routed_experts, n_shared_experts,
        num_experts_per_tok and the router's fields.
      placement: the mesh that weights and inputs will lie on; None on a single device.

    Cost: A + n_shared_experts feed-forward layers of width moe_intermediate_size a token.
    """

    def __init__(
        self, config: DeepSeekConfig, *, rngs: nnx.Rngs, placement: Placement | None = None
    ):
        self.config, self.placement = config, placement
        D, (E, _, F) = config.hidden_size, config.moe_sizes
        options = {"stddev": config.initializer_range, "dtype": config.dtype}
        # Every device routes its own tokens over all experts, so the router is not split by them.
        self.gate = weight(rngs, (D, E), ("embed", None), **options)
        if config.topk_method == "noaux_tc":
            # float32 in every checkpoint: it decides between scores that bfloat16 would make equal
            self.e_score_correction_bias = constant(0.0, (E,), (None,), dtype="float32")
        self.experts = Experts(config, rngs=rngs)
        if config.n_shared_experts:
            self.shared_experts = SwiGLU(D, F * config.n_shared_experts, rngs=rngs, **options)

    def route(self, x: Float[Array, "*B D"]) -> Routing:
        """The experts and weights of every token; the router multiplies in float32."""
        logits = project("...D,DE->...E", x.astype(jnp.float32), self.gate[...])
        has_bias = self.config.topk_method == "noaux_tc"
        # The bias balances load by its own rule (arXiv 2408.15664) and never sees a gradient.
        bias = jax.lax.stop_gradient(self.e_score_correction_bias[...]) if has_bias else None

        def choose(logits, bias):
            flat = route(logits.reshape(-1, logits.shape[-1]), bias, self.config)
            return jax.tree.map(lambda leaf: leaf.reshape(*logits.shape[:-1], -1), flat)

        if self.placement is not None:  # the compiler would gather all tokens for each top_k
            tokens = self.placement.spec(*self.placement.of_tokens(logits))
            choose = jax.shard_map(
                choose,
                mesh=self.placement.mesh,
                in_specs=(tokens, self.placement.spec(None)),
                out_specs=tokens,
            )
        routing = choose(logits, bias)
        if self.placement is None or self.placement.rules.expert_capacity is None:
            return routing
        num_experts = logits.shape[-1]
        num_dropped = count_dropped(routing.expert_index, num_experts, self.placement)
        return dataclasses.replace(routing, num_dropped=num_dropped)

    def __call__(
        self,
        x: Float[Array, "*B D"],
        routing: Routing | None = None,
        *,
        expert_layer: int | Int[Array, ""] = 0,
    ) -> Float[Array, "*B D"]:
        """Applies the layer.

        Args:
          x: under a mesh [B, T, D].
          routing: replaces the router's own choice.
          expert_layer: of a pool of experts, which layer's to take.
        """
        routing = self.route(x) if routing is None else routing
        y = self._routed(x, routing, expert_layer)
        if self.config.n_shared_experts:
            y = y + self.shared_experts(x)
        return y

    def _routed(self, x, routing: Routing, expert_layer):
        index, weight = routing.expert_index, routing.expert_weight
        weights = self.experts.weights()
        if self.placement is not None:
            y = apply_on_mesh(x, index, weight, weights, expert_layer, self.placement)
        else:
            flat, index, weight = (a.reshape(-1, a.shape[-1]) for a in (x, index, weight))
            y = apply_local(flat, index, weight, weights, expert_layer).reshape(x.shape)
        return y.astype(x.dtype)
