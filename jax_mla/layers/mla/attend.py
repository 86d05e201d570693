"""Attention over latents as functions of arrays: to a sequence itself, and to a cache.

They run on what one device holds; `on_mesh` maps them over a mesh. There `sequence_axes` are the
mesh axes that shard the new tokens in stripes (see `stripes`), `context_axes` the mesh
axes that shard the cached ones.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

from jax_mla.cache.latent import Cache
from jax_mla.cache.pages import advance, append, layer_pages
from jax_mla.cache.shards import own_tokens
from jax_mla.config.model import DeepSeekConfig
from jax_mla.layers.linear import project
from jax_mla.layers.mla.stripes import gather_stripes, stripe_order
from jax_mla.phases import Form
from pallas_kernels import MLADecodePlan, flash_attention, merge_attention, mla_decode

# Cached tokens that the expanded form turns into keys and values at a time.
CONTEXT_BLOCK = 512


class NewTokens(NamedTuple):
    """New tokens as attention takes them, and the weights that expand or absorb their latents.

    `rows` is what is cached of each token: its normalised latent, then its rotated key.
    """

    q_nope: Float[Array, "B T N P"]
    q_pe: Float[Array, "B T N R"]
    rows: Float[Array, "B T X"]
    k_b_proj: Float[Array, "N P C"]
    v_b_proj: Float[Array, "N H C"]


# Output, of H numbers per head or, absorbed, of C, and lse.
Result = tuple[Float[Array, "B T N H_or_C"], Float32[Array, "B T N"]]


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
    new: NewTokens,
    segment_ids: Int[Array, "B T"] | None = None,
    lengths: Int[Array, " B"] | None = None,
    *,
    config: DeepSeekConfig,
    form: Form,
    sequence_axes: tuple[str, ...] = (),
    deterministic: bool = False,
) -> Result:
    """Causal attention of new tokens to themselves; absorbed, its output is still a latent."""
    if form == "expanded":
        q = jnp.concatenate([new.q_nope, new.q_pe], axis=-1)
    else:
        q = absorb_query(new.q_nope, new.q_pe, new.k_b_proj)

    def keys_values(rows):
        if form == "expanded":
            return expand(rows, new.k_b_proj, new.v_b_proj)
        k = rows[:, :, None, :]
        return k, k[..., : config.kv_lora_rank]

    attend = functools.partial(
        flash_attention,
        scale=config.softmax_scale,
        return_lse=True,
        deterministic=deterministic,
    )
    if not sequence_axes:
        return attend(q, *keys_values(new.rows), segment_ids=segment_ids, lengths=lengths)
    everything = keys_values(gather_stripes(new.rows, sequence_axes))
    return _attend_striped(attend, q, *everything, segment_ids, lengths, sequence_axes)


def _attend_striped(attend, q, k, v, segment_ids, lengths, axes) -> Result:
    """Each local stripe attends to itself (causal) and to all earlier positions (masked by length).

    Pairing an early with a late stripe balances the work: the op stops at a length.
    """
    num_stripes, T = 2 * jax.lax.axis_size(axes), k.shape[1]
    size = T // num_stripes
    ids = None if segment_ids is None else gather_stripes(segment_ids, axes)
    stripes = jnp.asarray(stripe_order(num_stripes // 2)).reshape(-1, 2)
    lengths = jnp.full(q.shape[0], T, jnp.int32) if lengths is None else lengths

    def attend_stripe(i):
        begin = size * stripes[jax.lax.axis_index(axes), i]
        q_i = q[:, i * size : (i + 1) * size]
        own_ids = before_ids = None
        if ids is not None:
            own_ids = jax.lax.dynamic_slice_in_dim(ids, begin, size, axis=1)
            # The op reads its queries' ids from the end, where no stripe has keys before it.
            before_ids = ids.at[:, -size:].set(own_ids)
        k_i, v_i = (jax.lax.dynamic_slice_in_dim(x, begin, size, axis=1) for x in (k, v))
        own_lengths = jnp.clip(lengths - begin, 0, size)
        itself = attend(q_i, k_i, v_i, segment_ids=own_ids, lengths=own_lengths)
        before = attend(
            q_i, k, v, causal=False, segment_ids=before_ids, lengths=jnp.minimum(lengths, begin)
        )
        return merge_attention(*itself, *before)

    (out_a, lse_a), (out_b, lse_b) = attend_stripe(0), attend_stripe(1)
    return jnp.concatenate([out_a, out_b], axis=1), jnp.concatenate([lse_a, lse_b], axis=1)


def prefill(
    new: NewTokens,
    cache: Cache,
    layer: int | Int[Array, ""],
    num_new: Int[Array, " B"],
    plan: None,
    *,
    config: DeepSeekConfig,
    form: Form,
    has_context: bool,
    sequence_axes: tuple[str, ...] = (),
    context_axes: tuple[str, ...] = (),
) -> tuple[Float[Array, "B T N H_or_C"], Cache]:
    """Attends new tokens to the cache and to themselves, and appends num_new[b] of each row."""
    options = {"config": config, "form": form, "sequence_axes": sequence_axes}
    out, lse = attend_new(new, lengths=num_new, **options)
    if has_context:
        own = own_tokens(cache, context_axes)
        context = attend_cached(new, own, layer, context_axes=context_axes, **options)
        out, _ = merge_attention(out, lse, *context)
    rows = gather_stripes(new.rows, sequence_axes) if sequence_axes else new.rows
    return out, append(cache, layer, rows, num_new)


def decode(
    new: NewTokens,
    cache: Cache,
    layer: int | Int[Array, ""],
    num_new: Int[Array, " B"],
    plan: MLADecodePlan | None,
    *,
    config: DeepSeekConfig,
    context_axes: tuple[str, ...] = (),
) -> tuple[Float[Array, "B T N C"], Cache]:
    """Appends all T new tokens of every sequence and attends them to the cache, absorbed."""
    cache = append(cache, layer, new.rows, num_new)
    own = own_tokens(advance(cache, num_new), context_axes)
    pool, table = layer_pages(own, layer)
    q = absorb_query(new.q_nope, new.q_pe, new.k_b_proj).astype(pool.dtype)
    C, scale = config.kv_lora_rank, config.softmax_scale
    out, lse = mla_decode(q, pool, table, own.lengths, latent_dim=C, scale=scale, plan=plan)
    if context_axes:
        out, _ = merge_over_devices(out, lse, context_axes)
    return out, cache


def attend_cached(
    new: NewTokens,
    cache: Cache,
    layer: int | Int[Array, ""],
    *,
    config: DeepSeekConfig,
    form: Form,
    sequence_axes: tuple[str, ...] = (),
    context_axes: tuple[str, ...] = (),
) -> Result:
    """Attention of new tokens to all cached ones; absorbed, its output is still a latent."""
    attend = _attend_cached_absorbed if form == "absorbed" else _attend_cached_expanded
    if not context_axes:
        return attend(new, cache, layer, config)
    is_split = bool(set(sequence_axes) & set(context_axes))  # then both are the same axes
    if is_split:  # each device has some of the keys: all queries must meet them
        gather = functools.partial(jax.lax.all_gather, axis_name=context_axes, axis=1, tiled=True)
        new = new._replace(q_nope=gather(new.q_nope), q_pe=gather(new.q_pe))
    out, lse = attend(new, cache, layer, config)
    return merge_over_devices(out, lse, context_axes, scatter=is_split)


def merge_over_devices(
    out: Float[Array, "B T N H"],
    lse: Float32[Array, "B T N"],
    axes: tuple[str, ...],
    *,
    scatter: bool = False,
) -> tuple[Float[Array, "B T_own N H"], Float32[Array, "B T_own N"]]:
    """Attention over the keys of all devices, from each one's attention over its own.

    Args:
      scatter: leaves each device an equal part of the T queries, in their order, not all.
    """
    highest = jax.lax.pmax(lse, axes)
    highest = jnp.where(highest == -jnp.inf, 0, highest)  # -inf - -inf would be NaN
    weight = jnp.exp(lse - highest)[..., None]
    out_f32 = jnp.where(weight == 0, 0, out.astype(jnp.float32))  # of no keys it may be anything
    sums = jnp.concatenate([weight * out_f32, weight], axis=-1)
    if scatter:
        sums = jax.lax.psum_scatter(sums, axes, scatter_dimension=1, tiled=True)
        size = sums.shape[1]
        begin = jax.lax.axis_index(axes) * size
        highest = jax.lax.dynamic_slice_in_dim(highest, begin, size, axis=1)
    else:
        sums = jax.lax.psum(sums, axes)
    merged, total = sums[..., :-1], sums[..., -1]
    is_empty = total == 0
    total = jnp.where(is_empty, 1, total)
    lse = jnp.where(is_empty, -jnp.inf, highest + jnp.log(total))
    return (merged / total[..., None]).astype(out.dtype), lse


def _attend_cached_absorbed(new: NewTokens, cache, layer, config: DeepSeekConfig) -> Result:
    pool, table = layer_pages(cache, layer)
    q = absorb_query(new.q_nope, new.q_pe, new.k_b_proj).astype(pool.dtype)
    C, scale = config.kv_lora_rank, config.softmax_scale
    out, lse = mla_decode(q, pool, table, cache.lengths, latent_dim=C, scale=scale, causal=False)
    return out.astype(new.q_nope.dtype), lse


def _attend_cached_expanded(new: NewTokens, cache, layer, config: DeepSeekConfig) -> Result:
    """Expands the cache a block at a time: no more than CONTEXT_BLOCK keys exist at once."""
    pool, table = layer_pages(cache, layer)
    page_size = pool.shape[1]
    pages_per_block = -(-CONTEXT_BLOCK // page_size)
    block = pages_per_block * page_size
    q = jnp.concatenate([new.q_nope, new.q_pe], axis=-1)

    def attend_block(i, carry):
        slots = jnp.minimum(i * pages_per_block + jnp.arange(pages_per_block), table.shape[1] - 1)
        rows = pool.at[table[:, slots]].get(mode="clip").reshape(q.shape[0], block, -1)
        left = jnp.clip(cache.lengths - i * block, 0, block)
        # Rows that hold no token may hold NaN, which a matmul of the weights would keep.
        rows = jnp.where(jnp.arange(block)[None, :, None] < left[:, None, None], rows, 0)
        k, v = expand(rows.astype(q.dtype), new.k_b_proj, new.v_b_proj)
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
