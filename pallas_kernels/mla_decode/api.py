"""Attention of the newest tokens to a paged cache of MLA latents."""

from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Array, Float, Float32, Integer

from pallas_kernels import dispatch
from pallas_kernels.checks import (
    host_values,
    require,
    require_float,
    require_integer,
    require_rank,
    require_shape,
)
from pallas_kernels.mla_decode.plan import MLADecodePlan
from pallas_kernels.mla_decode.reference import mla_decode_reference
from pallas_kernels.mla_decode.sm90.launch import mla_decode_sm90, why_not

IMPLEMENTATIONS = (
    dispatch.Implementation("mosaic_gpu", mla_decode_sm90, why_not),
    dispatch.Implementation("xla", mla_decode_reference),
)


class MLADecodeOutput(NamedTuple):
    """Result of `mla_decode`; unpacks as `out, lse`."""

    out: Float[Array, "B T N C"]
    lse: Float32[Array, "B T N"]


def mla_decode(
    q: Float[Array, "B T N X"],
    kv_pages: Float[Array, "num_pages page_size X"],
    page_table: Integer[Array | np.ndarray, "B max_pages"],
    lengths: Integer[Array | np.ndarray, " B"],
    *,
    latent_dim: int,
    scale: float,
    causal: bool = True,
    plan: MLADecodePlan | None = None,
    implementation: Literal["mosaic_gpu", "xla"] | None = None,
) -> MLADecodeOutput:
    """Attends the last T query tokens of every sequence to its cached latents.

    out[b, t, n] = softmax(scale * q[b, t, n] @ kv[b].T) @ kv[b, :, :latent_dim], where kv[b] is the
    first lengths[b] tokens of the pages named in page_table[b]; causal: query t sees
    lengths[b] - (T - 1 - t) of them.

    Args:
      q: absorbed query and its rotary part, concatenated; float32, bfloat16 or float16.
      kv_pages: one row per token: latent, then rotary key; q's dtype. Rows past a sequence's
        length may hold NaN: they do not change the result.
      page_table: the page of every page_size tokens; entries past the last used page are ignored.
      lengths: tokens in cache, the T new ones included; 0 <= lengths <= max_pages * page_size.
        A query that sees nothing (length 0, or causal and t too early) has out = 0, lse = -inf.
      latent_dim: C, the leading part of a row that is also the value.
      scale: multiplies the scores. DeepSeek: (P + R) ** -0.5 times YaRN's mscale squared.
      causal: the T queries are the last T tokens, and none sees the tokens after it; otherwise all
        see all lengths[b] tokens.
      plan: how the work is split over the GPU, from mla_decode_plan for exactly these lengths; None
        computes it here. One plan serves all layers of a step. "xla" does not use it.
      implementation: None chooses the fastest that can run here; a name insists on it. "mosaic_gpu"
        is for Hopper GPUs, bfloat16 or float16, pages of 64 or 128 tokens, C a multiple of 64 up
        to 512, X - C of 16.

    Returns:
      out in q's dtype, and lse, the natural log of the sum of exponentials.

    Raises:
      ValueError: sizes or dtypes disagree, or a length or a used table entry is out of range where
        the host can see it (outside of jit); the message names both with their values.
      NotImplementedError: the named implementation cannot run here; the message says why.

    Works under jit, vmap and shard_map; "mosaic_gpu" runs the elements of a vmap one after the
    other, so put requests into B instead.

    Decode needs no gradient, so none is defined: use flash_attention where you differentiate. "xla"
    has forward mode (jax.jvp).

    Cost: reads sum(lengths) * X * 2 bytes in bfloat16; 2 * T * N * sum(lengths) * (X + C)
    floating-point operations.
    Source: DeepSeek-V2, arXiv 2405.04434, section 2.1; schedule after FlashMLA.
    """
    _check(q, kv_pages, page_table, lengths, latent_dim, plan)
    out, lse = dispatch.call(
        "mla_decode",
        IMPLEMENTATIONS,
        implementation,
        q,
        kv_pages,
        page_table,
        lengths,
        latent_dim=latent_dim,
        scale=float(scale),
        causal=causal,
        plan=plan,
    )
    return MLADecodeOutput(out, lse)


def _check(q, kv_pages, page_table, lengths, latent_dim, plan):
    op = "mla_decode"
    require_rank(
        op, q=(q, 4), kv_pages=(kv_pages, 3), page_table=(page_table, 2), lengths=(lengths, 1)
    )
    require_float(op, q=q, kv_pages=kv_pages)
    require_integer(op, page_table=page_table, lengths=lengths)
    B, X = q.shape[0], q.shape[3]
    require(
        all(size > 0 for size in (*q.shape, *kv_pages.shape, *page_table.shape)),
        f"{op}: all sizes must be positive, got q {q.shape}, kv_pages {kv_pages.shape},"
        f" page_table {page_table.shape}",
    )
    num_pages, page_size, _ = kv_pages.shape
    require_shape(op, "kv_pages", kv_pages, (num_pages, page_size, X), f"q {q.shape}")
    require_shape(op, "page_table", page_table, (B, page_table.shape[1]), f"q {q.shape}")
    require_shape(op, "lengths", lengths, (B,), f"q {q.shape}")
    require(
        isinstance(latent_dim, int | np.integer),
        f"{op}: latent_dim must be an integer, got {latent_dim!r}",
    )
    require(0 < latent_dim <= X, f"{op}: latent_dim must be within 1 and {X}, got {latent_dim}")
    if plan is not None:
        _check_plan(plan, q, kv_pages)
    _check_values(kv_pages, page_table, lengths)


def _check_plan(plan, q, kv_pages):
    for name, got, want in (
        ("batch", plan.num_splits.shape[0] - 1, q.shape[0]),
        ("page_size", plan.page_size, kv_pages.shape[1]),
        ("num_rows", plan.num_rows, q.shape[1] * q.shape[2]),
    ):
        require(got == want, f"mla_decode: the plan must have {name} {want}, got {got}")


def _check_values(kv_pages, page_table, lengths):
    """Refuses impossible lengths and used table entries, where the host can read them."""
    num_pages, page_size, _ = kv_pages.shape
    max_pages = page_table.shape[1]
    if (lengths := host_values(lengths)) is None:
        return
    require(
        lengths.min() >= 0 and lengths.max() <= max_pages * page_size,
        f"mla_decode: lengths must be within 0 and {max_pages} pages of {page_size}, got"
        f" {lengths.min()} to {lengths.max()}",
    )
    if (page_table := host_values(page_table)) is None:
        return
    used = page_table[np.arange(max_pages)[None, :] * page_size < lengths[:, None]]
    require(
        used.size == 0 or (used.min() >= 0 and used.max() < num_pages),
        f"mla_decode: used pages of page_table must be within 0 and {num_pages - 1}, got"
        f" {used.min(initial=0)} to {used.max(initial=0)}",
    )
