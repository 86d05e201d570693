"""The weights of routed experts, and how one device applies them."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jax_mla.config.model import DeepSeekConfig
from jax_mla.layers.linear import ExpertPool, GroupedLinear


class Experts(nnx.Module):
    """The weights of E feed-forward layers of one shape; of all layers' experts when pooled."""

    def __init__(self, config: DeepSeekConfig, *, rngs: nnx.Rngs) -> None:
        D, (E, _, F) = config.hidden_size, config.moe_sizes
        linear = functools.partial(
            GroupedLinear, rngs=rngs, stddev=config.initializer_range, dtype=config.dtype
        )
        self.gate_proj = linear((E, D, F), ("expert", "embed", "mlp"))
        self.up_proj = linear((E, D, F), ("expert", "embed", "mlp"))
        self.down_proj = linear((E, F, D), ("expert", "mlp", "embed"))

    def pools(self) -> Pools:
        """What multiplies by gate_proj, up_proj and down_proj."""
        return self.gate_proj.pool(), self.up_proj.pool(), self.down_proj.pool()


# gate_proj, up_proj and down_proj.
Pools = tuple[ExpertPool, ExpertPool, ExpertPool]


def apply_local(
    x: Float[Array, "M D"],
    expert_index: Int[Array, "M A"],
    expert_weight: Float[Array, "M A"],
    pools: Pools,
    layer: int | Int[Array, ""],
    embed_axes: tuple[str, ...] = (),
) -> Float[Array, "M D"]:
    """sum_a expert_weight[m, a] * expert[expert_index[m, a]](x[m]), float32.

    An index outside of 0 to E - 1 adds nothing. `embed_axes` are the mesh axes that shard D.
    """
    active = expert_index.shape[1]
    source = jnp.arange(expert_index.size) // active
    rows = apply_experts(x, source, expert_index.reshape(-1), pools, layer, embed_axes)
    return combine(rows.reshape(-1, active, x.shape[1]), expert_weight)


def apply_experts(
    x: Float[Array, "rows D"],
    source: Int[Array, " M"],
    expert: Int[Array, " M"],
    pools: Pools,
    layer: int | Int[Array, ""],
    embed_axes: tuple[str, ...],
) -> Float[Array, "M D"]:
    """Row m is expert[m] applied to x[source[m]]; 0 where the expert is none of these."""
    if embed_axes:  # of a pool, only this layer is gathered
        gate, up, down = (pool.layer(layer) for pool in pools)
        layer = 0
    else:
        gate, up, down = pools
    num_experts = gate.num_experts
    expert = jnp.where((expert >= 0) & (expert < num_experts), expert, num_experts)
    order = jnp.argsort(expert)
    group_sizes = jnp.bincount(expert, length=num_experts)

    def multiply(rows, pool, axis):
        # The backward pass gathers once more; where it computes the layer again, only once for
        # both. With static_argnums JAX would keep this closure, and with it the tracers in it.
        @functools.partial(jax.checkpoint, prevent_cse=False)
        def product(rows, pool):
            whole = pool.gather(embed_axes, axis) if embed_axes else pool
            return whole.matmul(rows, group_sizes, layer)

        return product(rows, pool)

    rows = x[source[order]]
    rows = multiply(jax.nn.silu(multiply(rows, gate, 2)) * multiply(rows, up, 2), down, 3)
    return rows[jnp.argsort(order)]


@jax.checkpoint  # keeps the outputs in their own dtype for the backward pass, not in float32
def combine(by_token: Float[Array, "M A D"], weights: Float[Array, "M A"]) -> Float[Array, "M D"]:
    """Each token's expert outputs, weighted and added in float32."""
    highest = jax.lax.Precision.HIGHEST
    return jnp.einsum("MAD,MA->MD", by_token.astype(jnp.float32), weights, precision=highest)
