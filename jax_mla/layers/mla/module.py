"""Multi-head latent attention: a module of weights over plain functions of arrays."""

from __future__ import annotations

import functools

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jax_mla.cache.latent import Cache
from jax_mla.cache.pages import advance, append, capacity, layer_pages
from jax_mla.cache.shards import own_tokens
from jax_mla.config.model import DeepSeekConfig
from jax_mla.layers.linear import constant, project, weight
from jax_mla.layers.mla.attend import (
    absorb_query,
    attend_cached,
    attend_new,
    merge_over_devices,
    value_up,
)
from jax_mla.layers.mla.forms import Form, resolve_form
from jax_mla.layers.mla.on_mesh import over_mesh, over_mesh_cached
from jax_mla.layers.mla.stripes import gather_stripes, to_stripes
from jax_mla.layers.norm import LATENT_NORM_EPS, RMSNorm
from jax_mla.layers.rope import rope_tables, rotate
from jax_mla.sharding.placement import Placement
from pallas_kernels import MLADecodePlan, merge_attention, mla_decode

Tables = tuple[Float[Array, "B T half"], Float[Array, "B T half"]]


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
        self, config: DeepSeekConfig, *, rngs: nnx.Rngs, placement: Placement | None = None
    ):
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
        options = {"stddev": config.initializer_range, "dtype": config.dtype}
        if Q is None:
            self.q_proj = weight(rngs, (D, N, P + R), ("embed", "heads", "head_dim"), **options)
        else:
            self.q_a_proj = weight(rngs, (D, Q), ("embed", "q_latent"), **options)
            self.q_a_layernorm = RMSNorm(Q, eps=LATENT_NORM_EPS, dtype=config.dtype)
            self.q_b_proj = weight(rngs, (Q, N, P + R), ("latent", "heads", "head_dim"), **options)
        self.kv_a_proj_with_mqa = weight(rngs, (D, X), ("embed", "kv_latent"), **options)
        self.kv_a_layernorm = RMSNorm(C, eps=LATENT_NORM_EPS, dtype=config.dtype)
        self.k_b_proj = weight(rngs, (N, P, C), ("heads", "head_dim", "latent"), **options)
        self.v_b_proj = weight(rngs, (N, H, C), ("heads", "head_dim", "latent"), **options)
        self.o_proj = weight(rngs, (N, H, D), ("heads", "head_dim", "embed"), **options)
        if config.attention_bias:
            if Q is not None:
                self.q_a_proj_bias = constant(0.0, (Q,), ("q_latent",), dtype=config.dtype)
            self.kv_a_proj_with_mqa_bias = constant(0.0, (X,), ("kv_latent",), dtype=config.dtype)
            self.o_proj_bias = constant(0.0, (D,), ("norm",), dtype=config.dtype)

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
        tables = self._tables(x) if tables is None else tables
        q_nope, q_pe = self._queries(x, tables)
        rows = self._rows(x, tables)
        form = resolve_form(form, self.config, x.shape[1], 0)
        sequence = self._sequence(x)
        options = {"sequence_axes": self._axes(sequence), "deterministic": deterministic}
        attend = functools.partial(attend_new, config=self.config, form=form, **options)
        new_tokens = (q_nope, q_pe, rows, *self._up_projections())
        attend = over_mesh(attend, self.placement, sequence)
        out, _ = attend(*new_tokens, segment_ids)
        return self._output(out, form)

    def decode(
        self,
        x: Float[Array, "B T D"],
        cache: Cache,
        layer: int | Array,
        tables: Tables,
        *,
        plan: MLADecodePlan | None = None,
    ) -> tuple[Float[Array, "B T D"], Cache]:
        """Appends T tokens of every sequence to the cache and attends them to it, absorbed."""
        new = jnp.full(x.shape[:1], x.shape[1], jnp.int32)
        scale, context_axes = self.config.softmax_scale, self._axes("context")
        if context_axes and x.shape[1] > 1:  # a device's last tokens need not be the last of all
            return self._prefill(x, cache, layer, tables, new, True, "absorbed", sequence=None)

        def attend(q_nope, q_pe, rows, k_b_proj, v_b_proj, cache, layer, new, plan):
            cache = append(cache, layer, rows, new)
            own = own_tokens(advance(cache, new), context_axes)
            pool, table = layer_pages(own, layer)
            q = absorb_query(q_nope, q_pe, k_b_proj).astype(pool.dtype)
            out, lse = mla_decode(
                q, pool, table, own.lengths,
                latent_dim=v_b_proj.shape[-1], scale=scale, plan=plan,
            )  # fmt: skip
            if context_axes:
                out, _ = merge_over_devices(out, lse, context_axes)
            return out, cache

        q_nope, q_pe = self._queries(x, tables)
        new_tokens = (q_nope, q_pe, self._rows(x, tables), *self._up_projections())
        attend = over_mesh_cached(attend, self.placement, sequence=None)
        out, cache = attend(*new_tokens, cache, layer, new, plan)
        return self._output(out.astype(x.dtype), "absorbed"), cache

    def prefill(
        self,
        x: Float[Array, "B T D"],
        cache: Cache,
        layer: int | Array,
        tables: Tables,
        *,
        num_new: Int[Array, " B"],
        has_context: bool = True,
        form: Form | None = None,
    ) -> tuple[Float[Array, "B T D"], Cache]:
        """Appends the first num_new[b] of T tokens and attends them to the cache and themselves.

        Args:
          num_new: valid tokens of each right-padded row; outputs behind them mean nothing.
          has_context: False when the cache is known to be empty.
          form: None lets `choose_form` decide.
        """
        num_cached = capacity(cache) - x.shape[1] if has_context else 0
        form = resolve_form(form, self.config, x.shape[1], max(num_cached, 0))
        sequence = self._sequence(x)
        return self._prefill(x, cache, layer, tables, num_new, has_context, form, sequence=sequence)

    def _prefill(self, x, cache, layer, tables, num_new, has_context, form, *, sequence):
        sequence_axes, context_axes = self._axes(sequence), self._axes("context")
        options = {"config": self.config, "form": form, "sequence_axes": sequence_axes}

        def attend(q_nope, q_pe, rows, k_b_proj, v_b_proj, cache, layer, num_new, _):
            weights = k_b_proj, v_b_proj
            out, lse = attend_new(q_nope, q_pe, rows, *weights, lengths=num_new, **options)
            if has_context:
                own = own_tokens(cache, context_axes)
                context = attend_cached(
                    q_nope, q_pe, *weights, own, layer, context_axes=context_axes, **options
                )
                out, _ = merge_attention(out, lse, *context)
            if sequence_axes:
                rows = gather_stripes(rows, sequence_axes)
            return out, append(cache, layer, rows, num_new)

        q_nope, q_pe = self._queries(x, tables)
        new_tokens = (q_nope, q_pe, self._rows(x, tables), *self._up_projections())
        attend = over_mesh_cached(attend, self.placement, sequence)
        out, cache = attend(*new_tokens, cache, layer, num_new, None)
        return self._output(out.astype(x.dtype), form), cache

    def _axes(self, logical_axis: str | None) -> tuple[str, ...]:
        if self.placement is None or logical_axis is None:
            return ()
        return self.placement.axes(logical_axis)

    def _sequence(self, x) -> str | None:
        """The logical axis of the positions of a whole sequence or prompt x[B, T, D]."""
        return None if self.placement is None else self.placement.of_tokens(x)[1]

    def _up_projections(self) -> tuple[Array, Array]:
        return self.k_b_proj[...], self.v_b_proj[...]

    def _tables(self, x):
        positions = jnp.broadcast_to(jnp.arange(x.shape[1])[None], x.shape[:2])
        positions = to_stripes(positions, self.placement)
        c = self.config
        return rope_tables(positions, c.qk_rope_head_dim, c.rope_theta, c.rope_scaling)

    def _queries(self, x, tables):
        if self.config.q_lora_rank is None:
            q = project("BTD,DNK->BTNK", x, self.q_proj[...])
        else:
            bias = self.q_a_proj_bias[...] if self.config.attention_bias else None
            q_c = self.q_a_layernorm(project("BTD,DQ->BTQ", x, self.q_a_proj[...], bias))
            q = project("BTQ,QNK->BTNK", q_c, self.q_b_proj[...])
        q_nope, q_pe = jnp.split(q, [self.config.qk_nope_head_dim], axis=-1)
        return q_nope, rotate(q_pe, *tables, interleaved=self.config.rope_interleave)

    def _rows(self, x, tables):
        """What is cached of each token: normalised latent, rotated key."""
        bias = self.kv_a_proj_with_mqa_bias[...] if self.config.attention_bias else None
        row = project("BTD,DX->BTX", x, self.kv_a_proj_with_mqa[...], bias)
        kv_c, k_pe = jnp.split(row, [self.config.kv_lora_rank], axis=-1)
        k_pe = rotate(k_pe, *tables, interleaved=self.config.rope_interleave)
        return jnp.concatenate([self.kv_a_layernorm(kv_c), k_pe], axis=-1)

    def _output(self, out, form):
        if form == "absorbed":
            out = value_up(out, self.v_b_proj[...])
        bias = self.o_proj_bias[...] if self.config.attention_bias else None
        return project("BTNH,NHD->BTD", out, self.o_proj[...], bias)
