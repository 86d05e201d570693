"""Attention of the last T positions of a sequence to all S of it, without storing T x S."""

from typing import Any, Literal, overload

import numpy as np
from jaxtyping import Array, Float, Float32, Int

from pallas_kernels import dispatch
from pallas_kernels.checks import (
    host_values,
    require,
    require_float,
    require_integer,
    require_rank,
)
from pallas_kernels.flash_attention.reference import flash_attention_reference
from pallas_kernels.flash_attention.sm90.launch import flash_attention_sm90, why_not

IMPLEMENTATIONS = (
    dispatch.Implementation("mosaic_gpu", flash_attention_sm90, why_not),
    dispatch.Implementation("xla", flash_attention_reference),
)


@overload
def flash_attention(
    q: Array, k: Array, v: Array, *, return_lse: Literal[False] = False, **options: Any
) -> Array: ...


@overload
def flash_attention(
    q: Array, k: Array, v: Array, *, return_lse: Literal[True], **options: Any
) -> tuple[Array, Array]: ...


def flash_attention(  # pyright: ignore[reportInconsistentOverload]: the overloads are short forms
    q: Float[Array, "B T N K"],
    k: Float[Array, "B S G K"],
    v: Float[Array, "B S G H"],
    *,
    causal: bool = True,
    scale: float | None = None,
    segment_ids: Int[Array | np.ndarray, "B S"] | None = None,
    lengths: Int[Array | np.ndarray, "B"] | None = None,
    return_lse: bool = False,
    deterministic: bool = False,
    implementation: Literal["mosaic_gpu", "xla"] | None = None,
) -> Float[Array, "B T N H"] | tuple[Float[Array, "B T N H"], Float32[Array, "B T N"]]:
    """Attends the last T positions of every sequence to its keys, in memory that grows with T.

    out[b, t, n] = softmax(scale * q[b, t, n] @ k[b, seen, g].T) @ v[b, seen, g], g = n // (N // G).
    Query t is position p = S - T + t. A key at position s is seen if s <= p (causal),
    s < lengths[b], and segment_ids[b, s] == segment_ids[b, p], where these are asked for.

    Differentiable in q, k and v, through out and through lse; the backward pass recomputes the
    probabilities block by block. Works under jit, vmap and shard_map; jax.jvp is not supported.

    Args:
      q: queries; float32, bfloat16 or float16.
      k: keys, q's dtype. G divides N: MHA (G = N), GQA, MQA (G = 1).
      v: values, q's dtype. H may differ from K.
      causal: a query sees itself and what precedes it; T > S is refused.
      scale: multiplies the scores; None is K ** -0.5.
      segment_ids: number of the document that a position belongs to, for packed sequences: any
        integers of 32 bits, in any order.
      lengths: keys at positions >= lengths[b] are never seen, and may hold NaN. A query that sees
        nothing gives out = 0, lse = -inf and no gradient.
      return_lse: also return the natural log of the sum of exponentials.
      deterministic: gradients are bitwise reproducible. Otherwise "mosaic_gpu" may sum dq in the
        order in which blocks end, in a temporary float32 array of q's shape; "xla" never does.
      implementation: None chooses the fastest that can run here; a name insists on it.

    Returns:
      out in q's dtype; with return_lse, (out, lse), lse float32.

    Raises:
      ValueError: sizes or dtypes disagree; the message names both with their values.
      NotImplementedError: the named implementation cannot run here; the message says why.

    Cost: 2 * B * N * T * S * (K + H) floating-point operations forward and 2 * B * N * T * S *
    (3 * K + 2 * H) backward; causal halves both for T = S.
    Source: FlashAttention-2, arXiv 2307.08691.
    """
    _check(q, k, v, causal, segment_ids, lengths)
    return dispatch.call(
        "flash_attention",
        IMPLEMENTATIONS,
        implementation,
        q,
        k,
        v,
        causal=causal,
        scale=q.shape[-1] ** -0.5 if scale is None else float(scale),
        segment_ids=segment_ids,
        lengths=lengths,
        return_lse=return_lse,
        deterministic=deterministic,
    )


def _check(q, k, v, causal, segment_ids, lengths):
    op = "flash_attention"
    require_rank(op, q=(q, 4), k=(k, 4), v=(v, 4))
    require_float(op, q=q, k=k, v=v)
    (B, T, N, K), (S, G, H) = q.shape, v.shape[1:]
    require(
        k.shape == (B, S, G, K),
        f"{op}: k has shape {k.shape}, q {q.shape} and v {v.shape} ask for {(B, S, G, K)}",
    )
    require(v.shape[0] == B, f"{op}: v has batch {v.shape[0]}, q has {B}")
    require(
        min(B, T, S, N, G, K, H) > 0,
        f"{op}: no size may be 0, found q {q.shape}, k {k.shape}, v {v.shape}",
    )
    require(N % G == 0, f"{op}: {N} query heads are not a multiple of {G} key heads")
    require(not causal or T <= S, f"{op}: causal attention of {T} queries to only {S} keys")
    if segment_ids is not None:
        require_rank(op, segment_ids=(segment_ids, 2))
        require_integer(op, segment_ids=segment_ids)
        require(
            segment_ids.shape == (B, S),
            f"{op}: segment_ids has shape {segment_ids.shape}, k asks for {(B, S)}",
        )
        require(T <= S, f"{op}: segment_ids of {S} positions cannot name {T} queries")
        if segment_ids.dtype.itemsize > 4 and (values := host_values(segment_ids)) is not None:
            require(  # JAX would cut off what is above, and documents could become one
                -(2**31) <= values.min() and values.max() < 2**31,
                f"{op}: segment_ids span {values.min()} to {values.max()}, more than 32 bits",
            )
    if lengths is not None:
        require_rank(op, lengths=(lengths, 1))
        require_integer(op, lengths=lengths)
        require(
            lengths.shape == (B,), f"{op}: lengths has shape {lengths.shape}, q asks for {(B,)}"
        )
        if (values := host_values(lengths)) is not None:
            require(
                values.min() >= 0 and values.max() <= S,
                f"{op}: lengths span {values.min()} to {values.max()}, allowed are 0 to {S}",
            )
