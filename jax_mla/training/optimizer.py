"""The optax optimizer of a recipe: which weights it decays, which it leaves alone."""

from __future__ import annotations

import functools
from collections.abc import Hashable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from jax_mla.params import Params, map_leaves
from jax_mla.training.recipe import Recipe

_MOONLIGHT_RMS = 0.2  # of a Muon update, as large as AdamW's usually is: arXiv 2502.16982


@functools.lru_cache
def make_optimizer(recipe: Recipe) -> optax.GradientTransformation:
    """Clips, then AdamW or Muon at the recipe's learning rate, by kind of weight.

    Norms and biases are not decayed. The router's correction bias gets no update and no state: it
    follows the load of the experts, see `update_router_bias`.
    """
    decayed, plain = (
        optax.adamw(recipe.rate, recipe.b1, recipe.b2, recipe.eps, weight_decay=decay)
        for decay in (recipe.weight_decay, 0.0)
    )
    by_kind: dict[Hashable, Any] = {
        "matrix": decayed,
        "table": decayed,
        "vector": plain,
        "fixed": optax.set_to_zero(),
    }
    if recipe.optimizer == "muon":
        by_kind["matrix"] = optax.contrib.muon(
            recipe.rate,
            weight_decay=recipe.weight_decay,
            consistent_rms=_MOONLIGHT_RMS,
            muon_weight_dimension_numbers=_dimension_numbers,
        )
    by_kind_of_weight = optax.partition(by_kind, kinds)
    if recipe.clip_norm is None:
        return by_kind_of_weight
    return optax.chain(_clip_by_global_norm(recipe.clip_norm), by_kind_of_weight)


def _clip_by_global_norm(limit: float) -> optax.GradientTransformation:
    """Like optax's, but sums the norm in float32; in bfloat16 the sum would be too small."""

    def update(updates, state, params=None):
        return clipped(updates, jnp.sqrt(square_sum(updates)), limit), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def clipped(gradients: Params, norm: Float[Array, ""], limit: float) -> Params:
    """Gradients of this global norm, made smaller where it is above the limit."""
    return jax.tree.map(
        lambda g: jnp.where(norm < limit, g, g / norm.astype(g.dtype) * limit), gradients
    )


def square_sum(gradients: Params) -> Float[Array, ""]:
    """The square of the global norm, in float32."""
    wide = jax.tree.map(lambda g: g.astype(jnp.float32), gradients)
    return optax.tree.norm(wide, squared=True)


def kinds(params: Params) -> Any:
    """The `Kind` of every weight, see `LeafType`."""
    return map_leaves(lambda leaf, _: leaf.kind, params)


def trainable_mask(params: Params) -> Any:
    """True for every weight that gradients train, False for the router's correction bias.

    That bias has no gradient, but weight decay would pull it to 0. With an optimizer of your own
    that decays everything, `optax.masked(optax.adamw(rate), trainable_mask)` leaves it alone, and
    `update_router_bias` moves it; `make_optimizer` does so by itself.
    """
    return map_leaves(lambda leaf, _: leaf.kind != "fixed", params)


def _dimension_numbers(params: Any) -> Any:
    numbers = optax.contrib.MuonDimensionNumbers
    return map_leaves(lambda leaf, _: numbers(*leaf.contracted_and_kept), params)
