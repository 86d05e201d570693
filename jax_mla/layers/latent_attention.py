"""Attention over latents as functions of arrays: to a sequence itself, and to a cache.

They run on what one device holds: under a mesh `MLA` maps them over it, with heads, sequences and
positions split, and `sequence_axes` naming the mesh axes that split the positions.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

from jax_mla.cache import LatentCache, PagedLatentCache, layer_pages
from jax_mla.config import DeepSeekConfig
from jax_mla.layers.weight import project
from pallas_kernels import flash_attention, merge_attention, mla_decode

# Cached tokens that the expanded form turns into keys and values at a time.
CONTEXT_BLOCK = 512
NO_SEGMENT = -1  # of positions that no query may see; segment ids are not negative

Result = tuple[Float[Array, "B T N H"], Float32[Array, "B T N"]]


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


def attend_new(
    q_nope: Float[Array, "B T N P"],
    q_pe: Float[Array, "B T N R"],
    rows: Float[Array, "B T X"],
    k_b_proj: Float[Array, "N P C"],
    v_b_proj: Float[Array, "N H C"],
    segment_ids: Int[Array, "B T"] | None = None,
    lengths: Int[Array, " B"] | None = None,
    *,
    config: DeepSeekConfig,
    form: str,
    sequence_axes: tuple[str, ...] = (),
) -> Result:
    """Causal attention of new tokens to themselves; absorbed, its output is still a latent."""
    if sequence_axes:
        rows, segment_ids = _gather_seen(rows, segment_ids, lengths, sequence_axes)
        lengths = None
    if form == "expanded":
        q = jnp.concatenate([q_nope, q_pe], axis=-1)
        k, v = expand(rows, k_b_proj, v_b_proj)
    else:
        q = absorb_query(q_nope, q_pe, k_b_proj)
        k = rows[:, :, None, :]
        v = k[..., : config.kv_lora_rank]
    return flash_attention(
        q, k, v, scale=config.softmax_scale, return_lse=True,
        segment_ids=segment_ids, lengths=lengths,
    )  # fmt: skip


def _gather_seen(rows, segment_ids, lengths, axes):
    """All devices' rows in the order 'behind mine, before mine, mine', and which of them count.

    flash_attention takes queries to be the last of its keys: turned this way they are, and what
    lies behind them, now in front, is hidden as a segment of its own.
    """
    num_new = rows.shape[1]
    rank = jax.lax.axis_index(axes)
    if segment_ids is None:
        segment_ids = jnp.zeros_like(rows[:, :, 0], jnp.int32)
    rows, segment_ids = (
        jax.lax.all_gather(x, axes, axis=1, tiled=True) for x in (rows, segment_ids)
    )
    position = jnp.arange(rows.shape[1])[None, :]
    is_seen = position < (rank + 1) * num_new
    if lengths is not None:
        is_seen = is_seen & (position < lengths[:, None])
        rows = jnp.where((position < lengths[:, None])[:, :, None], rows, 0)
    segment_ids = jnp.where(is_seen, segment_ids, NO_SEGMENT)
    shift = -(rank + 1) * num_new
    return jnp.roll(rows, shift, axis=1), jnp.roll(segment_ids, shift, axis=1)


def attend_cached(
    q_nope: Float[Array, "B T N P"],
    q_pe: Float[Array, "B T N R"],
    k_b_proj: Float[Array, "N P C"],
    v_b_proj: Float[Array, "N H C"],
    cache: LatentCache | PagedLatentCache,
    layer: int | Array,
    *,
    config: DeepSeekConfig,
    form: str,
) -> Result:
    """Attention of new tokens to all cached ones; absorbed, its output is still a latent."""
    if form == "absorbed":
        pool, table = layer_pages(cache, layer)
        q = absorb_query(q_nope, q_pe, k_b_proj).astype(pool.dtype)
        C, scale = config.kv_lora_rank, config.softmax_scale
        out, lse = mla_decode(
            q, pool, table, cache.lengths, latent_dim=C, scale=scale, causal=False
        )
        return out.astype(q_nope.dtype), lse
    return _attend_cached_expanded(q_nope, q_pe, k_b_proj, v_b_proj, cache, layer, config)


def _attend_cached_expanded(q_nope, q_pe, k_b_proj, v_b_proj, cache, layer, config) -> Result:
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
        k, v = expand(rows.astype(q.dtype), k_b_proj, v_b_proj)
        out, lse = flash_attention(
            q, k, v, causal=False, scale=config.softmax_scale, lengths=left, return_lse=True
        )
        return merge_attention(carry[0], carry[1], out, lse)

    empty = (
        jnp.zeros((*q.shape[:3], config.v_head_dim), jnp.float32),
        jnp.full(q.shape[:3], -jnp.inf, jnp.float32),
    )
    num_blocks = -(-jnp.max(cache.lengths) // block)
    return jax.lax.fori_loop(0, num_blocks, attend_block, empty)
