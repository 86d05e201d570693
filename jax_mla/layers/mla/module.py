"""Multi-head latent attention: a module of weights over plain functions of arrays."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from jax_mla.cache.check import check_cache
from jax_mla.cache.latent import Cache
from jax_mla.cache.pages import advance, capacity
from jax_mla.checks.arrays import check_hidden
from jax_mla.config.model import DeepSeekConfig
from jax_mla.layers.linear import Linear, RngsLike, as_rngs
from jax_mla.layers.mla.attend import NewTokens, attend_new, decode, prefill, value_up
from jax_mla.layers.mla.forms import resolve_form
from jax_mla.layers.mla.on_mesh import cached_on_mesh, full_on_mesh, to_stripes
from jax_mla.layers.norm import LATENT_NORM_EPS, RMSNorm
from jax_mla.layers.rope import positions_of, rope_tables, rotate
from jax_mla.phases import Decode, Form, Full, Phase, Prefill, Tables, appended
from jax_mla.sharding.placement import Placement
from pallas_kernels import MLADecodePlan


class MLA(nnx.Module):
    """Multi-head latent attention.

    latent = rms_norm(x @ W_DKV), keys = (latent @ W_UK, rotate(x @ W_KR)), values = latent @ W_UV;
    softmax(scale * q @ keys.T) @ values @ W_O. What is cached is (latent, rotate(x @ W_KR)), C + R
    numbers a token for all heads together.

    Args:
      config: reads the head sizes, ranks, rope and attention_bias. With q_lora_rank=None queries
        come from x directly.
      placement: the mesh that weights and inputs will lie on; None on a single device. Where its
        rules split positions, whole sequences and prompts are in the order of `layers/stripes`.

    Source: DeepSeek-V2, arXiv 2405.04434, section 2.1. Weight names are the checkpoints' own;
    kv_b_proj is kept as its two halves, k_b_proj (W_UK) and v_b_proj (W_UV).
    """

    def __init__(
        self, config: DeepSeekConfig, *, rngs: RngsLike, placement: Placement | None = None
    ) -> None:
        self.config, self.placement = config, placement
        D, N, Q, C = (
            config.hidden_size,
            config.num_attention_heads,
            config.q_lora_rank,
            config.kv_lora_rank,
        )
        P, R, H, X = (
            config.qk_nope_head_dim,
            config.qk_rope_head_dim,
            config.v_head_dim,
            config.cache_row_dim,
        )
        linear = functools.partial(
            Linear, rngs=as_rngs(rngs), stddev=config.initializer_range, dtype=config.dtype
        )

        def bias(axis: str) -> str | None:
            return axis if config.attention_bias else None

        head, up = ("heads", "head_dim"), ("heads", "head_dim", "latent")
        if Q is None:
            self.q_proj = linear("BTD,DNK->BTNK", (D, N, P + R), ("embed", *head))
        else:
            self.q_a_proj = linear(
                "BTD,DQ->BTQ", (D, Q), ("embed", "q_latent"), bias_axis=bias("q_latent")
            )
            self.q_a_layernorm = RMSNorm(Q, eps=LATENT_NORM_EPS, dtype=config.dtype)
            self.q_b_proj = linear("BTQ,QNK->BTNK", (Q, N, P + R), ("latent", *head))
        self.kv_a_proj_with_mqa = linear(
            "BTD,DX->BTX", (D, X), ("embed", "kv_latent"), bias_axis=bias("kv_latent")
        )
        self.kv_a_layernorm = RMSNorm(C, eps=LATENT_NORM_EPS, dtype=config.dtype)
        self.k_b_proj = linear("BSC,NPC->BSNP", (N, P, C), up)
        self.v_b_proj = linear("BSC,NHC->BSNH", (N, H, C), up)
        self.o_proj = linear("BTNH,NHD->BTD", (N, H, D), (*head, "embed"), bias_axis=bias("norm"))

    def __call__(
        self,
        x: Float[Array, "B T D"],
        tables: Tables | None = None,
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        form: Form | None = None,
        deterministic: bool = False,
    ) -> Float[Array, "B T D"]:
        """Causal attention of a whole sequence to itself.

        Args:
          tables: cos and sin of the positions, from `rope_tables`; None counts from 0.
          segment_ids: tokens attend only to tokens with their own id (packed sequences).
          form: None lets `choose_form` decide.
          deterministic: of gradients, see `pallas_kernels.flash_attention`.
        """
        check_hidden(x, self.config.hidden_size, num_axes=3)
        tables = self._tables(x) if tables is None else tables
        out, _ = self.attend(x, Full(tables, segment_ids, form, deterministic))
        return out

    def decode(
        self,
        x: Float[Array, "B T D"],
        cache: Cache,
        layer: int | Array = 0,
        tables: Tables | None = None,
        *,
        plan: MLADecodePlan | None = None,
    ) -> tuple[Float[Array, "B T D"], Cache]:
        """Appends T tokens of every sequence to the cache and attends them to it, absorbed.

        The returned cache counts them: its lengths are advanced, as by `prefill` and by
        `GroupedQueryAttention.extend`. For a step through several layers of one cache take
        `attend`, which leaves the lengths, and `cache.advance` after the last layer.

        Args:
          layer: of the cache.
          tables: cos and sin of the positions, from `rope_tables`; None counts on from the cache.
          plan: of `pallas_kernels.mla_decode_plan`; None makes it here.

        Raises:
          ValueError: the cache is not of these sequences or has no such layer or no room; under jit
            its room cannot be checked, and rows beyond it are dropped, yet counted.
        """
        num_new = self._check(x, cache, layer, None)
        tables = self._tables_at(_positions_in(cache, x)) if tables is None else tables
        out, cache = self.attend(x, Decode(tables, plan), cache, layer)
        return out, advance(cache, num_new)

    def prefill(
        self,
        x: Float[Array, "B T D"],
        cache: Cache,
        layer: int | Array = 0,
        tables: Tables | None = None,
        *,
        num_new: Int[Array, " B"] | None = None,
        has_context: bool = True,
        form: Form | None = None,
    ) -> tuple[Float[Array, "B T D"], Cache]:
        """Appends the first num_new[b] of T tokens and attends them to the cache and themselves.

        The returned cache counts them, see `decode`.

        Args:
          layer, tables: as in `decode`.
          num_new: valid tokens of each right-padded row, None for all; outputs after them mean
            nothing.
          has_context: False when the cache is known to be empty.
          form: None lets `choose_form` decide.

        Raises:
          ValueError: as `decode`.
        """
        num_new = self._check(x, cache, layer, num_new)
        if tables is None:
            tables = self._tables_at(to_stripes(_positions_in(cache, x), self.placement))
        out, cache = self.attend(x, Prefill(tables, num_new, has_context, form), cache, layer)
        return out, advance(cache, num_new)

    def attend(
        self,
        x: Float[Array, "B T D"],
        phase: Phase,
        cache: Cache | None = None,
        layer: int | Int[Array, ""] = 0,
    ) -> tuple[Float[Array, "B T D"], Any]:
        """What the three methods above do, by the kind of pass: the output, and the cache.

        The cache holds the new rows of this layer, but its lengths are as they were, since all
        layers append at the same place. A `Full` pass has no cache and returns the given one.

        Raises:
          ValueError: x is not of width D.
        """
        check_hidden(x, self.config.hidden_size, num_axes=3)
        new, num_new = self._new_tokens(x, phase.tables), x.shape[1]
        form = self._form(phase, num_new, cache)
        run = self._on_devices(phase, x, form)
        if isinstance(phase, Full):
            out, _ = run(new, phase.segment_ids)
        elif isinstance(phase, Prefill):
            out, cache = run(new, cache, layer, phase.num_new, None)
        else:
            out, cache = run(new, cache, layer, appended(x, phase.valid), phase.plan)
        return self._output(out.astype(x.dtype), form), cache

    def _form(self, phase: Phase, num_new: int, cache: Cache | None) -> Form:
        if isinstance(phase, Decode):
            return "absorbed"
        has_context = isinstance(phase, Prefill) and phase.has_context
        num_cached = capacity(cache) - num_new if has_context and cache is not None else 0
        return resolve_form(phase.form, self.config, num_new, max(num_cached, 0))

    def _on_devices(self, phase: Phase, x: Array, form: Form) -> Callable[..., Any]:
        """What every device computes, mapped over the mesh if there is one."""
        place, is_decode = self.placement, isinstance(phase, Decode)
        context_axes = () if place is None else place.axes("context")
        # Positions are sharded in whole sequences and in prompts; decoding leaves them together.
        sequence = None if place is None or is_decode else place.of_tokens(x)[1]
        sequence_axes = () if place is None or sequence is None else place.axes(sequence)
        options = {"config": self.config, "form": form, "sequence_axes": sequence_axes}
        if isinstance(phase, Full):
            run = functools.partial(attend_new, **options, deterministic=phase.deterministic)
            return run if place is None else full_on_mesh(run, place, sequence)
        if is_decode and (x.shape[1] == 1 or not context_axes):
            run = functools.partial(decode, config=self.config, context_axes=context_axes)
        else:  # also several new tokens on a sharded context, where the last may be on any device
            has_context = phase.has_context if isinstance(phase, Prefill) else True
            options |= {"has_context": has_context, "context_axes": context_axes}
            run = functools.partial(prefill, **options)
        return run if place is None else cached_on_mesh(run, place, sequence)

    def _check(
        self, x: Array, cache: Cache, layer: int | Array, num_new: Int[Array, " B"] | None
    ) -> Int[Array, " B"]:
        """The tokens fit into the cache; returns how many of each row are new."""
        check_hidden(x, self.config.hidden_size, num_axes=3)
        new = np.full(x.shape[0], x.shape[1], np.int32) if num_new is None else num_new
        batch = x.shape[0]
        check_cache(cache, self.config, new, batch=batch, placement=self.placement, layer=layer)
        return jnp.asarray(new, jnp.int32)

    def _tables(self, x: Array) -> Tables:
        return self._tables_at(to_stripes(positions_of(x[..., 0]), self.placement))

    def _tables_at(self, positions: Int[Array, "B T"]) -> Tables:
        c = self.config
        return rope_tables(positions, c.qk_rope_head_dim, c.rope_theta, c.rope_scaling)

    def _new_tokens(self, x: Array, tables: Tables) -> NewTokens:
        interleaved = self.config.rope_interleave
        q_nope, q_pe = jnp.split(self._queries(x), [self.config.qk_nope_head_dim], axis=-1)
        kv_c, k_pe = jnp.split(self.kv_a_proj_with_mqa(x), [self.config.kv_lora_rank], axis=-1)
        k_pe = rotate(k_pe, *tables, interleaved=interleaved)
        rows = jnp.concatenate([self.kv_a_layernorm(kv_c), k_pe], axis=-1)
        q_pe = rotate(q_pe, *tables, interleaved=interleaved)
        return NewTokens(q_nope, q_pe, rows, self.k_b_proj.array(), self.v_b_proj.array())

    def _queries(self, x: Array) -> Float[Array, "B T N PR"]:
        if self.config.q_lora_rank is None:
            return self.q_proj(x)
        return self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))

    def _output(self, out: Array, form: Form) -> Float[Array, "B T D"]:
        return self.o_proj(value_up(out, self.v_b_proj.array()) if form == "absorbed" else out)


def _positions_in(cache: Cache, x: Float[Array, "B T D"]) -> Int[Array, "B T"]:
    """Positions of new tokens appended to a cache."""
    return cache.lengths[:, None] + jnp.arange(x.shape[1], dtype=jnp.int32)[None]
