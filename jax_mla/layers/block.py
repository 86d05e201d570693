"""One decoder block, and a stack of blocks of one kind that runs as a scan."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jax_mla.config import DeepSeekConfig
from jax_mla.layers.mla import MLA
from jax_mla.layers.mlp import SwiGLU
from jax_mla.layers.moe import MoE, Routing
from jax_mla.layers.norm import RMSNorm

Kind = Literal["dense", "moe"]


class Block(nnx.Module):
    """A pre-norm decoder block.

    x = x + attention(rms_norm(x)); x = x + mlp(rms_norm(x))

    Args:
      kind: "dense" for a SwiGLU of width intermediate_size, "moe" for a mixture of experts.
    """

    def __init__(self, config: DeepSeekConfig, *, kind: Kind, rngs: nnx.Rngs):
        self.residual_scale = config.residual_scale
        D, eps, dtype = config.hidden_size, config.rms_norm_eps, config.dtype
        self.input_layernorm = RMSNorm(D, eps=eps, dtype=dtype)
        self.self_attn = MLA(config, rngs=rngs)
        self.post_attention_layernorm = RMSNorm(D, eps=eps, dtype=dtype)
        if kind == "moe":
            self.mlp = MoE(config, rngs=rngs)
        else:
            stddev = config.initializer_range
            self.mlp = SwiGLU(D, config.intermediate_size, rngs=rngs, stddev=stddev, dtype=dtype)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        attend: Callable[[MLA, Array], tuple[Array, Any]],
        *,
        first_expert: int | Int[Array, ""] = 0,
    ) -> tuple[Float[Array, "B T D"], Any, Routing | None]:
        """Runs the block; `attend(self_attn, normed)` returns its output and what to pass on."""
        attended, state = attend(self.self_attn, self.input_layernorm(x))
        x = self._add(x, attended)
        normed = self.post_attention_layernorm(x)
        if isinstance(self.mlp, MoE):
            routing = self.mlp.route(normed)
            return (
                self._add(x, self.mlp(normed, routing, first_expert=first_expert)),
                state,
                routing,
            )
        return self._add(x, self.mlp(normed)), state, None

    def _add(self, x, branch):
        return x + branch if self.residual_scale == 1.0 else x + branch * self.residual_scale


def stack(config: DeepSeekConfig, kind: Kind, num_layers: int, *, rngs: nnx.Rngs) -> Block:
    """A Block whose every weight has a leading axis "layers"."""

    def weights_of(key):
        return nnx.split(Block(config, kind=kind, rngs=nnx.Rngs(key)))[1]

    def name_axis(variable):
        axes = ("layers", *variable.get_metadata("logical_axes"))
        return nnx.Param(variable[...], logical_axes=axes)

    graphdef, _ = nnx.split(nnx.eval_shape(lambda: Block(config, kind=kind, rngs=nnx.Rngs(0))))
    stacked = jax.vmap(weights_of)(jax.random.split(rngs.params(), num_layers))
    stacked = jax.tree.map(name_axis, stacked, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
    return nnx.merge(graphdef, stacked)


def scan_stack(
    blocks: Block,
    run: Callable[[Block, Any, Array], tuple[Any, Any]],
    carry: Any,
    *,
    pool_experts: bool = False,
) -> tuple[Any, Any]:
    """carry, y = run(block, carry, layer) over the layers of a stack; traced and compiled once.

    A scan copies each layer's slice of every weight. With `pool_experts` the experts, of which a
    step may need few, stay where they are: each block holds those of all layers, [L * E, ...], and
    `first_expert = layer * E` finds its own. Not for gradients, which would be as large as the pool
    in every layer.
    """
    graphdef, state = nnx.split(blocks)
    num_layers = jax.tree.leaves(state)[0].shape[0]
    pool = None
    if pool_experts and isinstance(blocks.mlp, MoE):
        stacked = state["mlp"].pop("experts")
        pool = jax.tree.map(lambda w: w.reshape(-1, *w.shape[2:]), stacked)

    def body(carry, inputs):
        layer_state, layer = inputs
        if pool is not None:
            layer_state["mlp"]["experts"] = pool
        return run(nnx.merge(graphdef, layer_state), carry, layer)

    return jax.lax.scan(body, carry, (state, jnp.arange(num_layers, dtype=jnp.int32)))
