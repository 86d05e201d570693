"""The whole model: embedding, a stack of dense blocks, a stack of MoE blocks, norm, head."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jax_mla.cache.latent import Cache
from jax_mla.cache.shards import own_lengths
from jax_mla.config.model import DeepSeekConfig
from jax_mla.layers.block import Block, Remat, scan_stack, stack
from jax_mla.layers.linear import weight
from jax_mla.layers.mla.forms import Form
from jax_mla.layers.mla.stripes import from_stripes, to_stripes
from jax_mla.layers.moe.router import Routing
from jax_mla.layers.norm import RMSNorm
from jax_mla.layers.rope import rope_tables
from jax_mla.sharding.placement import Placement
from pallas_kernels import mla_decode_plan


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ForwardTrace:
    """What a forward pass computed on its way, layer by layer.

    Attributes:
      hidden_states: the embedding, the output of every block but the last, the last after the norm.
      expert_index: the experts of every MoE layer, None without one; in no particular order.
      expert_weight: their weights.
      num_dropped: of these (token, expert) pairs, those left out of each MoE layer for want of the
        rules' expert_capacity; None without one.
    """

    logits: Float[Array, "B T V"]
    hidden_states: Float[Array, "layers_and_one B T D"]
    expert_index: Int[Array, "L B T A"] | None
    expert_weight: Float[Array, "L B T A"] | None
    num_dropped: Int[Array, " L"] | None = None


class DeepSeek(nnx.Module):
    """A DeepSeek-family language model.

    Args:
      config: the architecture; its dtype is that of the weights.
      placement: the mesh that the weights will lie on; None on a single device.
      layers: the first and the end of the layers of a part of the model, see `jax_mla.pipeline`;
        None is all of them. Layer 0 comes with the embedding, the last one with norm and head; of
        the methods, a part has `hidden_states`, and the last part also `head`.

    Source: DeepSeek-V3, arXiv 2412.19437, figure 2.
    """

    def __init__(
        self,
        config: DeepSeekConfig,
        *,
        rngs: nnx.Rngs,
        placement: Placement | None = None,
        layers: tuple[int, int] | None = None,
    ):
        first, end = (0, config.num_hidden_layers) if layers is None else layers
        num_dense = max(min(end, config.num_dense_layers) - first, 0)
        num_moe = end - first - num_dense
        self.config, self.placement = config, placement
        self.is_first, self.is_last = first == 0, end == config.num_hidden_layers
        V, D = config.vocab_size, config.hidden_size
        options = {"stddev": config.initializer_range, "dtype": config.dtype}
        built = {"rngs": rngs, "placement": placement}
        if self.is_first or (self.is_last and config.tie_word_embeddings):
            self.embed_tokens = weight(rngs, (V, D), ("vocab", "embed"), **options)
        if num_dense:
            self.dense_layers = stack(config, "dense", num_dense, **built)
        if num_moe:
            self.moe_layers = stack(config, "moe", num_moe, **built)
        if self.is_last:
            self.norm = RMSNorm(D, eps=config.rms_norm_eps, dtype=config.dtype)
        if self.is_last and not config.tie_word_embeddings:
            self.lm_head = weight(rngs, (D, V), ("embed", "vocab"), **options)

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        *,
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        form: Form | None = None,
    ) -> Float[Array, "B T V"]:
        """Logits of every next token, float32."""
        x, _ = self._forward(tokens, positions, segment_ids, form)
        return self.head(x)

    def hidden_states(
        self,
        tokens: Int[Array, "B T"],
        *,
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        form: Form | None = None,
        remat: Remat = "none",
        deterministic: bool = False,
        observe: Callable[[Routing], Any] | None = None,
        x: Float[Array, "B T D"] | None = None,
    ) -> tuple[Float[Array, "B T D"], Any]:
        """What `head` takes, and what `observe` returned for every MoE layer, stacked, or None.

        Args:
          remat: what of each block is computed again in the backward pass, see `scan_stack`.
          deterministic: of attention's gradients, see `pallas_kernels.flash_attention`.
          x: what this function gave for the layers before these; None embeds the tokens.
        """

        def watch(_, routing):
            return None if observe is None or routing is None else observe(routing)

        options = {"remat": remat, "deterministic": deterministic, "x": x}
        x, observed = self._forward(tokens, positions, segment_ids, form, watch, **options)
        return x, next((of_stack for of_stack in observed if of_stack is not None), None)

    def trace(
        self,
        tokens: Int[Array, "B T"],
        *,
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        form: Form | None = None,
    ) -> ForwardTrace:
        """The same pass, with all that it computed on its way."""

        def watch(x, routing):
            x = from_stripes(x, self.placement)
            if routing is not None:
                chosen = routing.expert_index, routing.expert_weight
                index, weights = (from_stripes(a, self.placement) for a in chosen)
                routing = Routing(index, weights, num_dropped=routing.num_dropped)
            return x, routing

        x, layers = self._forward(tokens, positions, segment_ids, form, watch)
        before = jnp.concatenate([inputs for inputs, _ in layers])  # what each block was given
        routing = next((r for _, r in layers if r is not None), None)
        chosen = (
            (None, None, None)
            if routing is None
            else (routing.expert_index, routing.expert_weight, routing.num_dropped)
        )
        return ForwardTrace(self.head(x), jnp.concatenate([before, x[None]]), *chosen)

    def prefill(
        self,
        tokens: Int[Array, "B T"],
        cache: Cache,
        *,
        num_new: Int[Array, " B"],
        has_context: bool = True,
        form: Form | None = None,
    ) -> tuple[Float[Array, "B T D"], Cache]:
        """Hidden states of right-padded tokens on top of a cache, and the cache with them."""
        tables = self._tables(to_stripes(_cached_positions(tokens, cache), self.placement))
        options = {"num_new": num_new, "has_context": has_context, "form": form}
        x, cache = self._run_cached(
            to_stripes(tokens, self.placement),
            cache,
            lambda mla, x, c, i: mla.prefill(x, c, i, tables, **options),
        )
        return from_stripes(x, self.placement), cache

    def decode(
        self, tokens: Int[Array, "B T"], cache: Cache
    ) -> tuple[Float[Array, "B T D"], Cache]:
        """Hidden states of T tokens on top of a cache, and the cache with them."""
        tables = self._tables(_cached_positions(tokens, cache))
        num_new = tokens.shape[1]
        plan = self._plan(cache.lengths + num_new, num_new, cache.pages.shape[2])
        return self._run_cached(
            tokens, cache, lambda mla, x, c, i: mla.decode(x, c, i, tables, plan=plan)
        )

    def head(self, x: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """Float32 logits of normed hidden states."""
        if self.config.logits_divisor != 1.0:
            x = x / self.config.logits_divisor
        tied = self.config.tie_word_embeddings
        equation, w = (
            ("...D,VD->...V", self.embed_tokens) if tied else ("...D,DV->...V", self.lm_head)
        )
        w = w[...].astype(x.dtype)
        highest = jax.lax.Precision.HIGHEST
        return jnp.einsum(equation, x, w, precision=highest, preferred_element_type=jnp.float32)

    def _plan(self, lengths, num_new: int, page_size: int):
        """Once a step, for all layers; under a mesh every device plans for the tokens it holds."""
        place = self.placement
        heads = self.config.num_attention_heads // (place.num_shards("heads") if place else 1)
        plan = functools.partial(mla_decode_plan, num_rows=num_new * heads, page_size=page_size)
        if place is None:
            return plan(lengths)
        context_axes = place.axes("context")

        def plan_own(lengths):
            if context_axes:
                share = jax.lax.axis_size(context_axes), jax.lax.axis_index(context_axes)
                lengths = own_lengths(lengths, page_size, *share)
            return plan(lengths)

        return jax.shard_map(
            plan_own,
            mesh=place.mesh,
            in_specs=place.spec("batch"),
            out_specs=place.spec(("context", "batch")),
            check_vma=False,
        )(lengths)

    def _embed(self, tokens):
        x = self.embed_tokens[...][tokens]
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

    def _forward(
        self,
        tokens,
        positions,
        segment_ids,
        form,
        watch=lambda x, routing: None,
        *,
        remat: Remat = "none",
        deterministic: bool = False,
        x=None,
    ) -> tuple[Array, list[Any]]:
        if positions is None:
            positions = _positions(tokens, segment_ids)
        striped = functools.partial(to_stripes, placement=self.placement)
        tables = self._tables(striped(positions))
        segment_ids = None if segment_ids is None else striped(segment_ids)
        valid = None if segment_ids is None else segment_ids >= 0

        def attend(mla, x):
            options = {"form": form, "deterministic": deterministic}
            return mla(x, tables, segment_ids=segment_ids, **options), None

        def run(block, x, layer):
            y, _, routing = block(x, attend, valid=valid)
            return y, watch(x, routing)

        x, traces = self._embed(striped(tokens)) if x is None else striped(x), []
        for blocks, _ in self._stacks():
            x, traced = scan_stack(blocks, run, x, remat=remat)
            traces.append(traced)
        x = from_stripes(x, self.placement)
        return self.norm(x) if self.is_last else x, traces

    def _run_cached(self, tokens, cache, attend) -> tuple[Array, Any]:
        # The cache is carried, not scanned over: each layer writes its rows in place.
        carry = self._embed(tokens), cache
        for blocks, first_layer in self._stacks():

            def run(block, carry, i, first_layer=first_layer):
                x, cache = carry
                x, cache, _ = block(
                    x,
                    lambda mla, normed: attend(mla, normed, cache, first_layer + i),
                    expert_layer=i,
                )
                return (x, cache), None

            carry, _ = scan_stack(blocks, run, carry, pool_experts=True)
        x, cache = carry
        return self.norm(x), cache

    def _tables(self, positions):
        c = self.config
        return rope_tables(positions, c.qk_rope_head_dim, c.rope_theta, c.rope_scaling)


def _cached_positions(tokens, cache):
    """Of tokens behind the cached ones."""
    return cache.lengths[:, None] + jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]


def _positions(tokens, segment_ids):
    """0, 1, 2, ... from the first token of each segment."""
    count = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32)[None], tokens.shape)
    if segment_ids is None:
        return count
    is_first = jnp.concatenate(
        [jnp.ones_like(segment_ids[:, :1], bool), segment_ids[:, 1:] != segment_ids[:, :-1]], axis=1
    )
    return count - jax.lax.cummax(jnp.where(is_first, count, 0), axis=1)
