"""Which experts a token goes to."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jax_mla.config.model import DeepSeekConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Routing:
    """The A experts that each token goes to, in no particular order, and their weights.

    `expert_index` is -1 for padding, which goes to no expert.
    `scores` are those of all experts, unbiased, for a balance loss; a layer does not read them.
    `num_dropped` of the choices are dropped by the capacity of the dispatch; None without one.
    """

    expert_index: Int[Array, "*B A"]
    expert_weight: Float[Array, "*B A"]
    scores: Float[Array, "*B E"] | None = None
    num_dropped: Int[Array, "*L"] | None = None

    def of_valid(self, valid: Bool[Array, "*B"] | None) -> Routing:
        """The same choices, but no expert for tokens that are not valid; None: all are."""
        if valid is None:
            return self
        index = jnp.where(valid[..., None], self.expert_index, -1)
        return dataclasses.replace(self, expert_index=index)


def route(
    logits: Float[Array, "*B E"], bias: Float[Array, " E"] | None, config: DeepSeekConfig
) -> Routing:
    """Chooses A experts per token from router logits; everything in float32.

    scores = softmax or sigmoid of the logits. `greedy` takes the A best. The other two first keep
    the `topk_group` best of `n_group` groups: `group_limited_greedy` (V2) judges a group by its
    best score, `noaux_tc` (V3) by the sum of its two best biased scores. The bias steers only the
    choice: weights are the unbiased scores, normalised if `norm_topk_prob`, times
    `routed_scaling_factor`.

    Source: DeepSeek-V2, arXiv 2405.04434, section 2.2; DeepSeek-V3, arXiv 2412.19437, section 2.1.
    """
    shape, logits = logits.shape, logits.reshape(-1, logits.shape[-1])
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
    flat = Routing(expert_index, expert_weight * config.routed_scaling_factor, scores)
    return jax.tree.map(lambda leaf: leaf.reshape(*shape[:-1], -1), flat)


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
