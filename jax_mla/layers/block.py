"""One decoder block, and a stack of blocks of one kind that runs as a scan."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jax_mla.cache.latent import Cache
from jax_mla.checks.sizes import check_one_of
from jax_mla.config.model import DeepSeekConfig
from jax_mla.layers.linear import RngsLike, as_rngs
from jax_mla.layers.mla.module import MLA
from jax_mla.layers.mlp import SwiGLU
from jax_mla.layers.moe.load import layer_load
from jax_mla.layers.moe.module import MoE
from jax_mla.layers.moe.router import Routing
from jax_mla.layers.norm import RMSNorm
from jax_mla.phases import Full, Phase
from jax_mla.sharding.placement import Placement, constrain_tokens

Kind = Literal["dense", "moe"]

# What a pass keeps of every layer: nothing, the load of its experts, or its input and routing.
Trace = Literal["none", "load", "all"]

Remat = Literal["none", "full", "dots"]
# What the backward pass finds saved of a block, besides its input; the rest is computed again.
_SAVED = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


@dataclasses.dataclass(frozen=True)
class BlockOutput:
    """Hidden states, the cache with what was appended to it, and the routing of a MoE block."""

    x: Float[Array, "B T D"]
    cache: Any
    routing: Routing | None


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
        rngs: RngsLike,
        placement: Placement | None = None,
    ) -> None:
        self.residual_scale, self.placement = config.residual_scale, placement
        rngs = as_rngs(rngs)
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
        phase: Phase,
        cache: Cache | None = None,
        layer: int | Int[Array, ""] = 0,
        *,
        expert_layer: int | Int[Array, ""] = 0,
    ) -> BlockOutput:
        """Runs the block.

        Args:
          phase: the kind of pass.
          cache: of all layers, for a pass that has one; its lengths stay, see `cache.advance`.
          layer: this block's layer in the cache.
          expert_layer: this block's layer in a pool of experts, see `layer_scan`.
        """
        x = constrain_tokens(x, self.placement)
        attended, cache = self.self_attn.attend(self.input_layernorm(x), phase, cache, layer)
        x = self._add(x, attended)
        normed = self.post_attention_layernorm(x)
        if isinstance(self.mlp, MoE):
            routing = self.mlp.route(normed, phase.valid)
            y = self.mlp(normed, routing, expert_layer=expert_layer)
            return BlockOutput(self._add(x, y), cache, routing)
        return BlockOutput(self._add(x, self.mlp(normed)), cache, None)

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
        return type(variable)(variable[...], logical_axes=axes)

    graphdef, _ = nnx.split(nnx.eval_shape(lambda: block(0)))
    stacked = jax.vmap(weights_of)(jax.random.split(rngs.params(), num_layers))
    stacked = jax.tree.map(name_axis, stacked, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
    return nnx.merge(graphdef, stacked)


def layer_scan(
    blocks: Block, phase: Phase, first_layer: int, *, trace: Trace, remat: Remat
) -> tuple[Callable[..., Any], tuple[Any, Array]]:
    """The body and the inputs of a `jax.lax.scan` over a stack: its layers are compiled once.

    The carry is (x, cache); what is stacked is what `trace` names, None otherwise.

    A scan copies each layer's slice of every weight. In a pass with a cache the experts, of which
    it may need few, stay where they are: each block holds those of all layers, [L, E, ...], and
    `expert_layer` finds its own. Not for gradients, which would be as large as the pool in every
    layer.

    Args:
      first_layer: the stack's first layer in the cache.
      trace: "load" stacks each MoE block's LayerLoad, "all" its input and routing.
      remat: trades memory of the backward pass for computing again: "none", "dots" keeps the
        outputs of projections, "full" only each block's input.

    Raises:
      ValueError: remat has no such name.
    """
    graphdef, state = nnx.split(blocks)
    num_layers = jax.tree.leaves(state)[0].shape[0]
    is_pooled = isinstance(blocks.mlp, MoE) and not isinstance(phase, Full)
    pool = state["mlp"].pop("experts") if is_pooled else None

    def body(carry, inputs):
        (x, cache), (layer_state, i) = carry, inputs
        if pool is not None:
            layer_state["mlp"]["experts"] = pool
        block = nnx.merge(graphdef, layer_state)
        expert_layer = i if is_pooled else 0
        out = block(x, phase, cache, first_layer + i, expert_layer=expert_layer)
        if trace == "all":
            traced = x, out.routing
        elif trace == "load" and out.routing is not None:
            traced = layer_load(out.routing, block.self_attn.config)
        else:
            traced = None
        return (out.x, out.cache), traced

    if remat != "none":
        check_one_of("remat", remat, ("none", *_SAVED))
        body = jax.checkpoint(body, prevent_cse=False, policy=_SAVED[remat])
    return body, (state, jnp.arange(num_layers, dtype=jnp.int32))
