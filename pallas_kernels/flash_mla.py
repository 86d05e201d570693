"""FlashMLA's dense decode by its own names, shapes and sentinels, for code that is ported."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int32, Integer

from pallas_kernels import hardware
from pallas_kernels.checks import require, require_rank
from pallas_kernels.mla_decode import MLADecodePlan, mla_decode, mla_decode_plan

PAGE_SIZE = 64  # the page that FlashMLA's scheduler counts in


def get_mla_metadata(
    cache_seqlens: Integer[Array | np.ndarray, " b"] | None = None,
    num_q_tokens_per_head_k: int | None = None,
    num_heads_k: int = 1,
    num_heads_q: int | None = None,
    is_fp8_kvcache: bool = False,
    topk: int | None = None,
) -> tuple[MLADecodePlan | None, Int32[Array | np.ndarray, " _"] | None]:
    """Returns the pair (tile_scheduler_metadata, num_splits) that `flash_mla_with_kvcache` takes.

    Both of FlashMLA's calls work: the old one, with lengths, splits the work here, once per step;
    the new one, without arguments, returns (None, None) and every decode splits its own work.

    Args:
      cache_seqlens: tokens in cache of every request.
      num_q_tokens_per_head_k: s_q * h_q // h_kv, the query rows that read the same keys.
      num_heads_k: h_kv.
      num_heads_q: h_q; ignored, because the split does not depend on it.
      is_fp8_kvcache: must be False.
      topk: must be None.

    Raises:
      NotImplementedError: a feature is asked for that does not exist here.
      ValueError: lengths without the number of query rows.
    """
    del num_heads_q
    _refuse("get_mla_metadata", is_fp8_kvcache=is_fp8_kvcache, topk=topk)
    if cache_seqlens is None:
        return None, None
    if num_q_tokens_per_head_k is None:
        raise ValueError(
            "get_mla_metadata: num_q_tokens_per_head_k must be given with cache_seqlens, got None"
        )
    plan = mla_decode_plan(
        cache_seqlens,
        num_rows=num_q_tokens_per_head_k,
        page_size=PAGE_SIZE,
        num_sms=max(hardware.num_sms() // num_heads_k, 1),
    )
    return plan, plan.num_splits


def flash_mla_with_kvcache(
    q: Float[Array, "b s_q h_q d"],
    k_cache: Float[Array, "num_blocks page h_kv d"],
    block_table: Integer[Array | np.ndarray, "b max_blocks"],
    cache_seqlens: Integer[Array | np.ndarray, " b"],
    head_dim_v: int,
    tile_scheduler_metadata: MLADecodePlan | None = None,
    num_splits: Int32[Array | np.ndarray, " _"] | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    is_fp8_kvcache: bool = False,
    indices: Array | None = None,
    attn_sink: Array | None = None,
    extra_k_cache: Array | None = None,
    extra_indices_in_kvcache: Array | None = None,
    topk_length: Array | None = None,
    extra_topk_length: Array | None = None,
) -> tuple[Float[Array, "b s_q h_q head_dim_v"], Float32[Array, "b h_q s_q"]]:
    """Attends s_q queries of every request to its paged cache, as FlashMLA's function of this name.

    out[b, t, h] = softmax(softmax_scale * q[b, t, h] @ kv[b, :, g].T) @ kv[b, :, g, :head_dim_v],
    g = h // (h_q // h_kv), over the first cache_seqlens[b] tokens (causal: less s_q - 1 - t).

    Computes what `mla_decode` does, with FlashMLA's conventions: key heads have an axis, causal is
    False by default, lse is "b h_q s_q", and +inf for a row that sees nothing.

    Args:
      q: absorbed queries.
      k_cache: pages of cached rows; values are their first head_dim_v numbers. h_kv divides h_q.
      block_table: pages of every request; entries past its last used page are ignored.
      cache_seqlens: tokens in cache, the new ones included.
      head_dim_v: width of a value, 512 for DeepSeek.
      tile_scheduler_metadata: from `get_mla_metadata`, for the same lengths and shapes.
      num_splits: ignored, because it is part of the metadata here.
      softmax_scale: None takes d ** -0.5.
      causal: query t does not see the s_q - 1 - t tokens after it.
      is_fp8_kvcache, indices, attn_sink, extra_k_cache, extra_indices_in_kvcache, topk_length,
        extra_topk_length: must be False or None.

    Returns:
      out in q's dtype (0 for a row that sees nothing) and lse, float32 natural log.

    Raises:
      NotImplementedError: a feature is asked for that does not exist here.
      ValueError: sizes disagree; the message names both.

    Source: FlashMLA, flash_mla_interface.py.
    """
    op = "flash_mla_with_kvcache"
    _refuse(
        op,
        is_fp8_kvcache=is_fp8_kvcache,
        indices=indices,
        attn_sink=attn_sink,
        extra_k_cache=extra_k_cache,
        extra_indices_in_kvcache=extra_indices_in_kvcache,
        topk_length=topk_length,
        extra_topk_length=extra_topk_length,
    )
    del num_splits
    require_rank(op, q=(q, 4), k_cache=(k_cache, 4))
    b, s_q, h_q, d = q.shape
    h_kv = k_cache.shape[2]
    require(
        h_kv > 0 and h_q % h_kv == 0,
        f"{op}: query heads must be a multiple of the {h_kv} key heads, got {h_q}",
    )
    scale = d**-0.5 if softmax_scale is None else softmax_scale

    def attend(q, kv_pages):
        return mla_decode(
            q,
            kv_pages,
            block_table,
            cache_seqlens,
            latent_dim=head_dim_v,
            scale=scale,
            causal=causal,
            plan=tile_scheduler_metadata,
        )

    q = q.reshape(b, s_q, h_kv, h_q // h_kv, d)
    outs, lses = zip(*(attend(q[:, :, g], k_cache[:, :, g]) for g in range(h_kv)), strict=True)
    out, lse = jnp.concatenate(outs, axis=2), jnp.concatenate(lses, axis=2)
    return out, jnp.where(lse == -jnp.inf, jnp.inf, lse).swapaxes(1, 2)


def _refuse(op: str, **features) -> None:
    for name, value in features.items():
        if value is not None and value is not False:
            raise NotImplementedError(
                f"{op}: {name} is a feature of FlashMLA that does not exist here"
            )
