"""One decoder block, and a stack of blocks of one kind that runs as a scan."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jax_mla.config.model import DeepSeekConfig
from jax_mla.layers.mla.module import MLA
from jax_mla.layers.mlp import SwiGLU
from jax_mla.layers.moe.module import MoE
from jax_mla.layers.moe.router import Routing
from jax_mla.layers.norm import RMSNorm
from jax_mla.sharding.placement import Placement, constrain_tokens

Kind = Literal["dense", "moe"]

Remat = Literal["none", "full", "dots"]
# What the backward pass finds saved of a block, besides its input; the rest is computed again.
_SAVED = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


class Block(nnx.Module):
    """A pre-norm decoder block.

    x = x + attention(rms_norm(x)); x = x + mlp(rms_norm(x))

    Args:
      kind: "dense" for a SwiGLU of width intermediate_size, "moe" for a mixture of experts.
    """

    def __init__(
        self,
        config: DeepSeekConfig,
        *,
        kind: Kind,
        rngs: nnx.Rngs,
        placement: Placement | None = None,
    ):
        self.residual_scale, self.placement = config.residual_scale, placement
        D, eps, dtype = config.hidden_size, config.rms_norm_eps, config.dtype
        self.input_layernorm = RMSNorm(D, eps=eps, dtype=dtype)
        self.self_attn = MLA(config, rngs=rngs, placement=placement)
        self.post_attention_layernorm = RMSNorm(D, eps=eps, dtype=dtype)
        if kind == "moe":
            self.mlp = MoE(config, rngs=rngs, placement=placement)
        else:
            stddev = config.initializer_range
            self.mlp = SwiGLU(D, config.intermediate_size, rngs=rngs, stddev=stddev, dtype=dtype)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        attend: Callable[[MLA, Array], tuple[Array, Any]],
        *,
        valid: Bool[Array, "B T"] | None = None,
        expert_layer: int | Int[Array, ""] = 0,
    ) -> tuple[Float[Array, "B T D"], Any, Routing | None]:
        """Runs the block; `attend(self_attn, normed)` returns its output and what to pass on.

        Args:
          valid: False for padding, which goes to no routed expert; None if there is none.
        """
        x = constrain_tokens(x, self.placement)
        attended, state = attend(self.self_attn, self.input_layernorm(x))
        x = self._add(x, attended)
        normed = self.post_attention_layernorm(x)
        if isinstance(self.mlp, MoE):
            routing = self.mlp.route(normed, valid)
            y = self.mlp(normed, routing, expert_layer=expert_layer)
            return self._add(x, y), state, routing
        return self._add(x, self.mlp(normed)), state, None

    def _add(self, x, branch):
        return x + branch if self.residual_scale == 1.0 else x + branch * self.residual_scale


def stack(
    config: DeepSeekConfig,
    kind: Kind,
    num_layers: int,
    *,
    rngs: nnx.Rngs,
    placement: Placement | None = None,
) -> Block:
    """A Block whose every weight has a leading axis "layers"."""

    def block(key):
        return Block(config, kind=kind, rngs=nnx.Rngs(key), placement=placement)

    def weights_of(key):
        return nnx.split(block(key))[1]

    def name_axis(variable):
        axes = ("layers", *variable.get_metadata("logical_axes"))
        return nnx.Param(variable[...], logical_axes=axes)

    graphdef, _ = nnx.split(nnx.eval_shape(lambda: block(0)))
    stacked = jax.vmap(weights_of)(jax.random.split(rngs.params(), num_layers))
    stacked = jax.tree.map(name_axis, stacked, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
    return nnx.merge(graphdef, stacked)


def scan_stack(
    blocks: Block,
    run: Callable[[Block, Any, Array], tuple[Any, Any]],
    carry: Any,
    *,
    pool_experts: bool = False,
    remat: Remat = "none",
) -> tuple[Any, Any]:
    """carry, y = run(block, carry, layer) over the layers of a stack; traced and compiled once.

    A scan copies each layer's slice of every weight. With `pool_experts` the experts, of which a
    step may need few, stay where they are: each block holds those of all layers, [L, E, ...], and
    `expert_layer` finds its own. Not for gradients, which would be as large as the pool in every
    layer. `remat` trades memory of the backward pass for computing again: "none", "dots"
    keeps the outputs of projections, "full" only each block's input.
    """
    graphdef, state = nnx.split(blocks)
    num_layers = jax.tree.leaves(state)[0].shape[0]
    pool = None
    if pool_experts and isinstance(blocks.mlp, MoE):
        pool = state["mlp"].pop("experts")

    def body(carry, inputs):
        layer_state, layer = inputs
        if pool is not None:
            layer_state["mlp"]["experts"] = pool
        return run(nnx.merge(graphdef, layer_state), carry, layer)

    if remat != "none":
        if remat not in _SAVED:
            raise ValueError(f"remat {remat!r} is not one of none, {', '.join(_SAVED)}")
        body = jax.checkpoint(body, prevent_cse=False, policy=_SAVED[remat])
    return jax.lax.scan(body, carry, (state, jnp.arange(num_layers, dtype=jnp.int32)))
