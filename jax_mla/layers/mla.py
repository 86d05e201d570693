"""Multi-head latent attention: a module of weights over plain functions of arrays."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jax_mla.cache import Cache, append, capacity, layer_pages
from jax_mla.config import DeepSeekConfig
from jax_mla.layers.norm import LATENT_NORM_EPS, RMSNorm
from jax_mla.layers.rope import rope_tables, rotate
from jax_mla.layers.weight import constant, project, weight
from pallas_kernels import MLADecodePlan, flash_attention, merge_attention, mla_decode

Form = Literal["expanded", "absorbed"]
Tables = tuple[Float[Array, "B T half"], Float[Array, "B T half"]]

# Operations that a GPU does in the time it moves one byte (an H200: 790 TFLOP/s over 4.3 TB/s).
FLOP_PER_BYTE = 184
# Cached tokens that the expanded form turns into keys and values at a time.
CONTEXT_BLOCK = 512


def resolve_form(
    form: str | None, config: DeepSeekConfig, num_queries: int, num_cached: int
) -> Form:
    """`form` itself, or the cheaper one when None.

    Raises:
      ValueError: there is no form of that name.
    """
    if form is None:
        return choose_form(config, num_queries, num_cached)
    if form not in ("expanded", "absorbed"):
        raise ValueError(f"form {form!r} is not one of 'expanded', 'absorbed' or None")
    return form


def choose_form(config: DeepSeekConfig, num_queries: int, num_cached: int) -> Form:
    """The cheaper way to attend `num_queries` new tokens to themselves and `num_cached` older ones.

    Expanding makes keys and values of every token, absorbing folds those weights into queries and
    outputs, so that attention runs on the latents themselves. With S = cached + T tokens and
    pairs = T (cached + T / 2), two steps each:

        expanded  make keys, values  2 S N C (P + H) operations, S N (P + R + H) numbers written
                  attend             2 pairs N (P + R + H),      as many read
        absorbed  fold the weights   2 T N C (P + H)
                  attend             2 pairs N (2 C + R),        S (C + R) numbers read

    A step costs its operations or its 2-byte numbers, whichever takes a GPU longer. For V3's sizes
    the forms break even near T = 170 over a long cache: decoding absorbs, prefill expands.

    Source: DeepSeek-V2, arXiv 2405.04434, section 2.1 and appendix C.
    """
    N, C, R = config.num_attention_heads, config.kv_lora_rank, config.qk_rope_head_dim
    P, H, T, S = config.qk_nope_head_dim, config.v_head_dim, num_queries, num_cached + num_queries
    pairs = T * (num_cached + T / 2)
    weights = 2 * N * C * (P + H)

    def step(operations, numbers):
        return max(operations, FLOP_PER_BYTE * 2 * numbers)

    keys_values = S * N * (P + R + H)
    expanded = step(S * weights, keys_values) + step(2 * pairs * N * (P + R + H), keys_values)
    absorbed = T * weights + step(2 * pairs * N * (2 * C + R), S * (C + R))
    return "expanded" if expanded < absorbed else "absorbed"


def expand(
    rows: Float[Array, "B S X"], k_b_proj: Float[Array, "N P C"], v_b_proj: Float[Array, "N H C"]
) -> tuple[Float[Array, "B S N PR"], Float[Array, "B S N H"]]:
    """Keys and values of every head from cached rows; the rotary key is shared by all heads."""
    kv_c, k_pe = jnp.split(rows, [k_b_proj.shape[-1]], axis=-1)
    k_nope = project("BSC,NPC->BSNP", kv_c, k_b_proj)
    k_pe = jnp.broadcast_to(k_pe[:, :, None, :], (*k_nope.shape[:3], k_pe.shape[-1]))
    return jnp.concatenate([k_nope, k_pe], axis=-1), project("BSC,NHC->BSNH", kv_c, v_b_proj)


def absorb_query(
    q_nope: Float[Array, "B T N P"], q_pe: Float[Array, "B T N R"], k_b_proj: Float[Array, "N P C"]
) -> Float[Array, "B T N X"]:
    """Queries that score cached rows directly: (q_nope @ W_UK, q_pe)."""
    # Weights first: the other way round XLA's CPU backend takes six times as long for a few tokens.
    q_c = project("NPC,BTNP->BTNC", k_b_proj.astype(q_nope.dtype), q_nope)
    return jnp.concatenate([q_c, q_pe], axis=-1)


def value_up(
    out_c: Float[Array, "B T N C"], v_b_proj: Float[Array, "N H C"]
) -> Float[Array, "B T N H"]:
    """Head outputs from attention over latents: out_c @ W_UV."""
    return project("BTNC,NHC->BTNH", out_c, v_b_proj)


class MLA(nnx.Module):
    """Multi-head latent attention.

    latent = rms_norm(x @ W_DKV), keys = (latent @ W_UK, rotate(x @ W_KR)), values = latent @ W_UV;
    softmax(scale * q @ keys.T) @ values @ W_O. What is cached is (latent, rotate(x @ W_KR)), C + R
    numbers a token for all heads together.

    Args:
      config: reads the head sizes, ranks, rope and attention_bias. With q_lora_rank=None queries
        come from x directly.

    Source: DeepSeek-V2, arXiv 2405.04434, section 2.1. Weight names are the checkpoints' own;
    kv_b_proj is kept as its two halves, k_b_proj (W_UK) and v_b_proj (W_UV).
    """

    def __init__(self, config: DeepSeekConfig, *, rngs: nnx.Rngs):
        self.config = config
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
            self.q_b_proj = weight(
                rngs, (Q, N, P + R), ("q_latent", "heads", "head_dim"), **options
            )
        self.kv_a_proj_with_mqa = weight(rngs, (D, X), ("embed", "kv_latent"), **options)
        self.kv_a_layernorm = RMSNorm(C, eps=LATENT_NORM_EPS, dtype=config.dtype)
        self.k_b_proj = weight(rngs, (N, P, C), ("heads", "head_dim", "kv_latent"), **options)
        self.v_b_proj = weight(rngs, (N, H, C), ("heads", "head_dim", "kv_latent"), **options)
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
    ) -> Float[Array, "B T D"]:
        """Causal attention of a whole sequence to itself.

        Args:
          tables: cos and sin of the positions, from `rope_tables`; None counts from 0.
          segment_ids: tokens attend only to tokens with their own id (packed sequences).
          form: None lets `choose_form` decide.
        """
        tables = self._tables(x) if tables is None else tables
        q_nope, q_pe = self._queries(x, tables)
        rows = self._rows(x, tables)
        form = resolve_form(form, self.config, x.shape[1], 0)
        out, _ = self._attend_new(q_nope, q_pe, rows, form, segment_ids=segment_ids)
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
        q_nope, q_pe = self._queries(x, tables)
        new = jnp.full(x.shape[:1], x.shape[1], jnp.int32)
        cache = append(cache, layer, self._rows(x, tables), new)
        pool, table = layer_pages(cache, layer)
        q = absorb_query(q_nope, q_pe, self.k_b_proj[...])
        out = mla_decode(
            q.astype(pool.dtype), pool, table, cache.lengths + new,
            latent_dim=self.config.kv_lora_rank, scale=self.config.softmax_scale, plan=plan,
        ).out  # fmt: skip
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
        q_nope, q_pe = self._queries(x, tables)
        rows = self._rows(x, tables)
        out, lse = self._attend_new(q_nope, q_pe, rows, form, lengths=num_new)
        if has_context:
            attend = (
                self._attend_cached_absorbed if form == "absorbed" else self._attend_cached_expanded
            )
            out, _ = merge_attention(out, lse, *attend(q_nope, q_pe, cache, layer))
        cache = append(cache, layer, rows, num_new)
        return self._output(out.astype(x.dtype), form), cache

    def _tables(self, x):
        positions = jnp.broadcast_to(jnp.arange(x.shape[1])[None], x.shape[:2])
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

    def _attend_new(self, q_nope, q_pe, rows, form, **masks):
        if form == "expanded":
            q = jnp.concatenate([q_nope, q_pe], axis=-1)
            k, v = expand(rows, self.k_b_proj[...], self.v_b_proj[...])
        else:
            q = absorb_query(q_nope, q_pe, self.k_b_proj[...])
            k = rows[:, :, None, :]
            v = k[..., : self.config.kv_lora_rank]
        return flash_attention(q, k, v, scale=self.config.softmax_scale, return_lse=True, **masks)

    def _attend_cached_absorbed(self, q_nope, q_pe, cache, layer):
        pool, table = layer_pages(cache, layer)
        q = absorb_query(q_nope, q_pe, self.k_b_proj[...]).astype(pool.dtype)
        C, scale = self.config.kv_lora_rank, self.config.softmax_scale
        out, lse = mla_decode(
            q, pool, table, cache.lengths, latent_dim=C, scale=scale, causal=False
        )
        return out.astype(q_nope.dtype), lse

    def _attend_cached_expanded(self, q_nope, q_pe, cache, layer):
        """Expands the cache a block at a time: no more than CONTEXT_BLOCK keys exist at once."""
        pool, table = layer_pages(cache, layer)
        page_size = pool.shape[1]
        pages_a_block = -(-CONTEXT_BLOCK // page_size)
        block = pages_a_block * page_size
        q = jnp.concatenate([q_nope, q_pe], axis=-1)

        def attend_block(i, carry):
            slots = jnp.minimum(i * pages_a_block + jnp.arange(pages_a_block), table.shape[1] - 1)
            rows = pool.at[table[:, slots]].get(mode="clip").reshape(q.shape[0], block, -1)
            left = jnp.clip(cache.lengths - i * block, 0, block)
            # Rows that hold no token may hold NaN, which a matmul of the weights would keep.
            rows = jnp.where(jnp.arange(block)[None, :, None] < left[:, None, None], rows, 0)
            k, v = expand(rows.astype(q.dtype), self.k_b_proj[...], self.v_b_proj[...])
            scale = self.config.softmax_scale
            out, lse = flash_attention(
                q, k, v, causal=False, scale=scale, lengths=left, return_lse=True
            )
            return merge_attention(carry[0], carry[1], out, lse)

        empty = (
            jnp.zeros((*q.shape[:3], self.config.v_head_dim), jnp.float32),
            jnp.full(q.shape[:3], -jnp.inf, jnp.float32),
        )
        num_blocks = -(-jnp.max(cache.lengths) // block)
        return jax.lax.fori_loop(0, num_blocks, attend_block, empty)

    def _output(self, out, form):
        if form == "absorbed":
            out = value_up(out, self.v_b_proj[...])
        bias = self.o_proj_bias[...] if self.config.attention_bias else None
        return project("BTNH,NHD->BTD", out, self.o_proj[...], bias)
