"""The weights of routed experts, and how one device applies them."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jax_mla.config.model import DeepSeekConfig
from jax_mla.layers.linear import weight
from pallas_kernels import grouped_matmul


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


# gate_proj, up_proj and down_proj of all experts of one layer or of a pool of layers.
Weights = tuple[Float[Array, "L E D F"], Float[Array, "L E D F"], Float[Array, "L E F D"]]


def apply_local(
    x: Float[Array, "M D"],
    expert_index: Int[Array, "M A"],
    expert_weight: Float[Array, "M A"],
    weights: Weights,
    layer: int | Int[Array, ""],
    embed_axes: tuple[str, ...] = (),
) -> Float[Array, "M D"]:
    """sum_a expert_weight[m, a] * expert[expert_index[m, a]](x[m]), float32.

    An index outside of 0 to E - 1 adds nothing. Weights are split by D over mesh axes `embed_axes`.
    """
    active = expert_index.shape[1]
    source = jnp.arange(expert_index.size) // active
    rows = apply_experts(x, source, expert_index.reshape(-1), weights, layer, embed_axes)
    return combine(rows.reshape(-1, active, x.shape[1]), expert_weight)


def apply_experts(x, source, expert, weights: Weights, layer, embed_axes: tuple[str, ...]) -> Array:
    """Row m is expert[m] applied to x[source[m]], and 0 where the expert is not one of these."""
    if embed_axes:  # of a pool, only this layer is gathered
        weights = jax.tree.map(lambda w: jax.lax.dynamic_slice_in_dim(w, layer, 1), weights)
        layer = 0
    num_layers, num_experts = weights[0].shape[:2]
    expert = jnp.where((expert >= 0) & (expert < num_experts), expert, num_experts)
    order = jnp.argsort(expert)
    group_sizes = jnp.bincount(expert, length=num_experts)

    # The backward pass gathers once more; where it computes the layer again, only once for both.
    @functools.partial(jax.checkpoint, static_argnums=2, prevent_cse=False)
    def multiply(rows, w, axis):
        if embed_axes:
            w = jax.lax.all_gather(w, embed_axes, axis=axis, tiled=True)
        w = w.reshape(num_layers * num_experts, *w.shape[2:]).astype(rows.dtype)
        return grouped_matmul(rows, w, group_sizes, first_group=layer * num_experts)

    rows, (gate, up, down) = x[source[order]], weights
    rows = multiply(jax.nn.silu(multiply(rows, gate, 2)) * multiply(rows, up, 2), down, 3)
    return rows[jnp.argsort(order)]


@jax.checkpoint  # keeps the outputs in their own dtype for the backward pass, not in float32
def combine(by_token: Float[Array, "M A D"], weights: Float[Array, "M A"]) -> Float[Array, "M D"]:
    """Each token's expert outputs, weighted and added in float32."""
    highest = jax.lax.Precision.HIGHEST
    return jnp.einsum("MAD,MA->MD", by_token.astype(jnp.float32), weights, precision=highest)
