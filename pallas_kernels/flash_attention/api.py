"""Attention of the last T positions of a sequence to all S of it, without storing T x S."""

from typing import Literal, TypedDict, Unpack, overload

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
from pallas_kernels.flash_attention.reference import flash_attention_reference
from pallas_kernels.flash_attention.sm90.launch import flash_attention_sm90, why_not

IMPLEMENTATIONS = (
    dispatch.Implementation("mosaic_gpu", flash_attention_sm90, why_not),
    dispatch.Implementation("xla", flash_attention_reference),
)


class Options(TypedDict, total=False):
    """Keyword arguments that do not change what `flash_attention` returns."""

    causal: bool
    scale: float | None
    segment_ids: Array | np.ndarray | None
    lengths: Array | np.ndarray | None
    deterministic: bool
    implementation: Literal["mosaic_gpu", "xla"] | None


@overload
def flash_attention(
    q: Array, k: Array, v: Array, *, return_lse: Literal[False] = False, **options: Unpack[Options]
) -> Array: ...


@overload
def flash_attention(
    q: Array, k: Array, v: Array, *, return_lse: Literal[True], **options: Unpack[Options]
) -> tuple[Array, Array]: ...


@overload
def flash_attention(
    q: Array, k: Array, v: Array, *, return_lse: bool, **options: Unpack[Options]
) -> Array | tuple[Array, Array]: ...


def flash_attention(
    q: Float[Array, "B T N K"],
    k: Float[Array, "B S G K"],
    v: Float[Array, "B S G H"],
    *,
    causal: bool = True,
    scale: float | None = None,
    segment_ids: Integer[Array | np.ndarray, "B S"] | None = None,
    lengths: Integer[Array | np.ndarray, " B"] | None = None,
    return_lse: bool = False,
    deterministic: bool = False,
    implementation: Literal["mosaic_gpu", "xla"] | None = None,
) -> Float[Array, "B T N H"] | tuple[Float[Array, "B T N H"], Float32[Array, "B T N"]]:
    """Attends the last T positions of every sequence to its keys, in memory that grows with T.

    out[b, t, n] = softmax(scale * q[b, t, n] @ k[b, seen, g].T) @ v[b, seen, g], g = n // (N // G).
    Query t is position p = S - T + t. Key s is seen if s <= p (causal), s < lengths[b] (lengths),
    and segment_ids[b, s] == segment_ids[b, p] (segment_ids), as far as these are given.

    Differentiable in q, k and v, through out and through lse; the backward pass recomputes the
    probabilities block by block. "xla" also has forward mode (jax.jvp) and its combination with
    reverse mode (Hessian-vector products as jax.jvp of jax.grad). Works under jit, vmap and
    shard_map.

    Args:
      q: queries; float32, bfloat16 or float16.
      k: keys, q's dtype. G divides N: MHA (G = N), GQA, MQA (G = 1).
      v: values, q's dtype. H may differ from K.
      causal: a query sees itself and what precedes it; T must not exceed S.
      scale: multiplies the scores; None takes K ** -0.5.
      segment_ids: the document of each position, for packed sequences: any 32-bit integers, in any
        order.
      lengths: keys at positions >= lengths[b] are never seen, and may hold NaN. A query that sees
        nothing has out = 0, lse = -inf and gradient 0.
      return_lse: also return the natural log of the sum of exponentials.
      deterministic: makes gradients bitwise reproducible. Otherwise "mosaic_gpu" may sum dq in the
        order in which blocks end, in a temporary float32 array of q's shape. "xla" always is.
      implementation: None chooses the fastest that can run here; a name insists on it.

    Returns:
      out in q's dtype; with return_lse, (out, lse), lse float32.

    Raises:
      ValueError: sizes or dtypes disagree; the message names both with their values.
      NotImplementedError: the named implementation cannot run here, or "mosaic_gpu" is to be
        differentiated in forward mode; the message says why.

    Cost: 2 * B * N * T * S * (K + H) floating-point operations forward and 2 * B * N * T * S *
    (3 * K + 2 * H) backward; causal halves both for T = S.
    Source: FlashAttention-2, arXiv 2307.08691.
    """
    _check(q, k, v, causal, segment_ids, lengths)
    out, lse = dispatch.call(
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
        deterministic=deterministic,
    )
    return (out, lse) if return_lse else out


def _check(q, k, v, causal, segment_ids, lengths):
    op = "flash_attention"
    require_rank(op, q=(q, 4), k=(k, 4), v=(v, 4))
    require_float(op, q=q, k=k, v=v)
    (B, T, N, K), (S, G, H) = q.shape, v.shape[1:]
    require_shape(op, "k", k, (B, S, G, K), f"q {q.shape} and v {v.shape}")
    require(v.shape[0] == B, f"{op}: v must have q's batch {B}, got {v.shape[0]}")
    require(
        all(size > 0 for size in (B, T, S, N, G, K, H)),
        f"{op}: all sizes must be positive, got q {q.shape}, k {k.shape}, v {v.shape}",
    )
    require(N % G == 0, f"{op}: query heads must be a multiple of the {G} key heads, got {N}")
    require(not causal or T <= S, f"{op}: causal queries must be at most the {S} keys, got {T}")
    if segment_ids is not None:
        require_rank(op, segment_ids=(segment_ids, 2))
        require_integer(op, segment_ids=segment_ids)
        require_shape(op, "segment_ids", segment_ids, (B, S), f"k {k.shape}")
        require(T <= S, f"{op}: queries with segment_ids must be at most the {S} keys, got {T}")
        if segment_ids.dtype.itemsize > 4 and (values := host_values(segment_ids)) is not None:
            require(  # JAX would drop the upper bits, and two documents could become one
                -(2**31) <= values.min() and values.max() < 2**31,
                f"{op}: segment_ids must fit into 32 bits, got {values.min()} to {values.max()}",
            )
    if lengths is not None:
        require_rank(op, lengths=(lengths, 1))
        require_integer(op, lengths=lengths)
        require_shape(op, "lengths", lengths, (B,), f"q {q.shape}")
        if (values := host_values(lengths)) is not None:
            require(
                values.min() >= 0 and values.max() <= S,
                f"{op}: lengths must be within 0 and {S}, got {values.min()} to {values.max()}",
            )
