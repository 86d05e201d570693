"""The whole model: embedding, a stack of dense blocks, a stack of MoE blocks, norm, head."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jax_mla.cache.latent import Cache
from jax_mla.config.model import DeepSeekConfig
from jax_mla.layers.block import Block, Remat, Trace, layer_scan, stack
from jax_mla.layers.linear import Linear, RngsLike, as_rngs
from jax_mla.layers.mla.on_mesh import decode_plan, from_stripes, to_stripes
from jax_mla.layers.moe.load import LayerLoad
from jax_mla.layers.norm import RMSNorm
from jax_mla.layers.rope import positions_of, rope_tables
from jax_mla.phases import Decode, Form, Full, Phase, Prefill, Tables, appended
from jax_mla.sharding.placement import Placement


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ForwardTrace:
    """What a forward pass computed on its way, layer by layer.

    Attributes:
      hidden_states: the embedding, the output of every block but the last, the last after the norm.
      expert_index: the experts of every MoE layer, None without one; in no particular order.
      expert_weight: their weights.
      num_dropped: of these (token, expert) pairs, those that each MoE layer dropped by the capacity
        of the rules' dispatch; None without one.
    """

    logits: Float[Array, "B T V"]
    hidden_states: Float[Array, "layers_and_one B T D"]
    expert_index: Int[Array, "L B T A"] | None
    expert_weight: Float[Array, "L B T A"] | None
    num_dropped: Int[Array, " L"] | None = None


@dataclasses.dataclass(frozen=True)
class PassOutput:
    """Hidden states, normed if the last layer is among those run; the cache; and what was traced.

    `traces` has an entry per stack of layers, see `layer_scan`.
    """

    x: Float[Array, "B T D"]
    cache: Any
    traces: list[Any]

    @property
    def load(self) -> LayerLoad | None:
        """The load of every MoE layer, of a pass with trace="load"; None without MoE layers."""
        return next((load for load in self.traces if load is not None), None)


class DeepSeek(nnx.Module):
    """A DeepSeek-family language model.

    Args:
      config: the architecture; its dtype is the dtype of the weights.
      placement: the mesh that the weights will lie on; None on a single device.
      layers: half-open range [first, end) to build, for a pipeline stage; None builds all. Layer 0
        comes with the embedding, the last one with norm and head. A stage supports only `run`; the
        last one also `head`.

    Source: DeepSeek-V3, arXiv 2412.19437, figure 2.
    """

    def __init__(
        self,
        config: DeepSeekConfig,
        *,
        rngs: RngsLike,
        placement: Placement | None = None,
        layers: tuple[int, int] | None = None,
    ) -> None:
        rngs = as_rngs(rngs)
        first, end = (0, config.num_hidden_layers) if layers is None else layers
        num_dense = max(min(end, config.num_dense_layers) - first, 0)
        num_moe = end - first - num_dense
        self.config, self.placement = config, placement
        self.is_first, self.is_last = first == 0, end == config.num_hidden_layers
        V, D = config.vocab_size, config.hidden_size
        linear = functools.partial(
            Linear, rngs=rngs, stddev=config.initializer_range, dtype=config.dtype
        )
        built = {"rngs": rngs, "placement": placement}
        if self.is_first or (self.is_last and config.tie_word_embeddings):
            self.embed_tokens = linear("...D,VD->...V", (V, D), ("vocab", "embed"))
        if num_dense:
            self.dense_layers = stack(config, "dense", num_dense, **built)
        if num_moe:
            self.moe_layers = stack(config, "moe", num_moe, **built)
        if self.is_last:
            self.norm = RMSNorm(D, eps=config.rms_norm_eps, dtype=config.dtype)
        if self.is_last and not config.tie_word_embeddings:
            self.lm_head = linear("...D,DV->...V", (D, V), ("embed", "vocab"))

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        *,
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        form: Form | None = None,
    ) -> Float[Array, "B T V"]:
        """Logits of every next token, float32."""
        return self.head(self.run(tokens, self.full(tokens, positions, segment_ids, form)).x)

    def full(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        form: Form | None = None,
        *,
        deterministic: bool = False,
    ) -> Full:
        """A pass over whole sequences; arguments as in `jax_mla.forward`."""
        positions = positions_of(tokens, segment_ids) if positions is None else positions
        tables = self._tables(to_stripes(positions, self.placement))
        ids = None if segment_ids is None else to_stripes(segment_ids, self.placement)
        return Full(tables, ids, form, deterministic, None if ids is None else ids >= 0)

    def prefilling(
        self,
        tokens: Int[Array, "B T"],
        cache: Cache,
        num_new: Int[Array, " B"],
        *,
        has_context: bool = True,
        form: Form | None = None,
    ) -> Prefill:
        """A pass that appends right-padded tokens to a cache; arguments as in `Prefill`."""
        positions = to_stripes(_positions_in(cache, tokens), self.placement)
        is_new = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None] < num_new[:, None]
        valid = to_stripes(is_new, self.placement)
        return Prefill(self._tables(positions), num_new, has_context, form, valid)

    def decoding(
        self, tokens: Int[Array, "B T"], cache: Cache, *, valid: Bool[Array, "B T"] | None = None
    ) -> Decode:
        """A pass that appends T tokens of every sequence to a cache; arguments as in `Decode`."""
        num_new, page_size = tokens.shape[1], cache.pages.shape[2]
        lengths = cache.lengths + appended(tokens, valid)
        plan = decode_plan(lengths, num_new, page_size, self.config, self.placement)
        return Decode(self._tables(_positions_in(cache, tokens)), plan, valid)

    def run(
        self,
        x: Int[Array, "B T"] | Float[Array, "B T D"],
        phase: Phase,
        cache: Cache | None = None,
        *,
        trace: Trace = "none",
        remat: Remat = "none",
    ) -> PassOutput:
        """Runs the layers, and the last norm where this is the whole model or its end.

        Args:
          x: tokens, or the hidden states that the layers before these returned.
          phase: from `full`, `prefilling` or `decoding` of the same tokens.
          cache: appended to, but its lengths stay: see `cache.pages.advance`.
          trace, remat: see `layer_scan`.
        """
        is_striped = not isinstance(phase, Decode)
        x = to_stripes(x, self.placement) if is_striped else x
        x = self._embed(x) if x.ndim == 2 else x
        # The cache is carried, not scanned over: each layer writes its rows in place.
        carry, traces = (x, cache), []
        for blocks, first_layer in self._stacks():
            body, inputs = layer_scan(blocks, phase, first_layer, trace=trace, remat=remat)
            carry, traced = jax.lax.scan(body, carry, inputs)
            traces.append(traced)
        x, cache = carry
        x = from_stripes(x, self.placement) if is_striped else x
        return PassOutput(self.norm(x) if self.is_last else x, cache, traces)

    def trace(
        self,
        tokens: Int[Array, "B T"],
        *,
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        form: Form | None = None,
    ) -> ForwardTrace:
        """The same pass as a call, with all that it computed on its way."""
        out = self.run(tokens, self.full(tokens, positions, segment_ids, form), trace="all")
        in_order = jax.vmap(functools.partial(from_stripes, placement=self.placement))
        before = jnp.concatenate([in_order(inputs) for inputs, _ in out.traces])
        hidden_states = jnp.concatenate([before, out.x[None]])
        routing = next((routing for _, routing in out.traces if routing is not None), None)
        if routing is None:
            return ForwardTrace(self.head(out.x), hidden_states, None, None)
        index, weight = in_order(routing.expert_index), in_order(routing.expert_weight)
        return ForwardTrace(self.head(out.x), hidden_states, index, weight, routing.num_dropped)

    def head(self, x: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """Float32 logits of normed hidden states."""
        if self.config.logits_divisor != 1.0:
            x = x / self.config.logits_divisor
        head = self.embed_tokens if self.config.tie_word_embeddings else self.lm_head
        return head(x, "float32")

    def _embed(self, tokens):
        x = self.embed_tokens.rows(tokens)
        return (
            x if self.config.scale_emb == 1.0 else x * jnp.asarray(self.config.scale_emb, x.dtype)
        )

    def _stacks(self) -> list[tuple[Block, int]]:
        """The stacks in order, each with the number of its first layer."""
        stacks = []
        if hasattr(self, "dense_layers"):
            stacks.append((self.dense_layers, 0))
        if hasattr(self, "moe_layers"):
            stacks.append((self.moe_layers, self.config.num_dense_layers))
        return stacks

    def _tables(self, positions: Int[Array, "B T"]) -> Tables:
        c = self.config
        return rope_tables(positions, c.qk_rope_head_dim, c.rope_theta, c.rope_scaling)


def _positions_in(cache: Cache, tokens: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Positions of tokens appended to a cache."""
    return cache.lengths[:, None] + jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
