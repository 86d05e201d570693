"""The Hopper kernels as one differentiable function: shapes, masks, residuals.

The kernels themselves are imported when they are first called, because Mosaic GPU is slow to
import.
"""

import dataclasses
import functools
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Integer

from pallas_kernels import hardware, varying
from pallas_kernels.derivatives import differentiable, not_differentiable
from pallas_kernels.flash_attention.reference import zeros_past
from pallas_kernels.flash_attention.sm90.config import (
    HEAD_SIZES,
    TILE_ROWS,
    Problem,
    choose_group_splits,
    is_backward_fused,
)
from pallas_kernels.flash_attention.sm90.tiles import Masks
from pallas_kernels.hardware import SM90, WGMMA_ROWS

DTYPES = ("bfloat16", "float16")
LEAST_SCALE = 1e-30  # lse / scale stays far inside of float32, and scale is no subnormal number


def why_not(q, k, v, *, scale: float, **options: Any) -> str | None:
    """Why the Hopper kernels cannot run these arguments here, or None."""
    del k, options
    head_sizes = q.shape[-1], v.shape[-1]
    if head_sizes not in HEAD_SIZES:
        return f"head sizes (K, H) must be one of {list(HEAD_SIZES)}, got {head_sizes}"
    if str(q.dtype) not in DTYPES:
        return f"the dtype must be one of {list(DTYPES)}, got {q.dtype}"
    if not scale >= LEAST_SCALE:
        return (
            f"scale must be at least {LEAST_SCALE}, got {scale}: kernels keep the maximum of scores"
            " times it, and lse divided by it"
        )
    return hardware.missing_gpu(SM90)


@dataclasses.dataclass(frozen=True)
class Static:
    """What a trace is specialised on."""

    problem: Problem
    deterministic: bool
    num_sms: int


@functools.partial(jax.jit, static_argnames=("causal", "scale", "deterministic", "num_sms"))
def flash_attention_sm90(
    q: Float[Array, "B T N K"],
    k: Float[Array, "B S G K"],
    v: Float[Array, "B S G H"],
    *,
    causal: bool,
    scale: float,
    segment_ids: Integer[Array, "B S"] | None,
    lengths: Integer[Array, " B"] | None,
    deterministic: bool,
    num_sms: int | None = None,
) -> tuple[Float[Array, "B T N H"], Float32[Array, "B T N"]]:
    """Returns out and lse, see `flash_attention`."""
    (B, T, N, K), (S, G, H) = q.shape, v.shape[1:]
    masks = make_masks(B, T, S, segment_ids, lengths)
    q, k, v = _pad(q, WGMMA_ROWS), _pad(k, TILE_ROWS), _pad(v, TILE_ROWS)
    T_padded, S_padded = q.shape[1], k.shape[1]
    sizes = B, T_padded, S_padded, N, G, K, H
    problem = Problem(*sizes, causal, float(scale), S - T, has_lengths=lengths is not None)
    static = Static(problem, deterministic, num_sms or hardware.num_sms())
    q, k, v, *masks = varying.align(q, k, v, *masks)
    out, lse = _attention(static, q, k, v, Masks(*masks))
    return out[:, :T], jnp.swapaxes(lse[:, :, :T], 1, 2)


def make_masks(B: int, T: int, S: int, segment_ids: Array | None, lengths: Array | None) -> Masks:
    """Ids are padded to whole tiles, because kernels read them without a bounds check."""
    # int32 before S meets them, which a narrower dtype may not hold.
    key_ends = jnp.asarray(jnp.full((B,), S) if lengths is None else lengths, jnp.int32)
    query_ids = key_ids = None
    if segment_ids is not None:
        key_ids = jnp.asarray(segment_ids, jnp.int32)
        query_ids = jnp.pad(key_ids[:, S - T :], ((0, 0), (0, -T % TILE_ROWS)), mode="edge")
        key_ids = jnp.pad(key_ids, ((0, 0), (0, -S % TILE_ROWS)), mode="edge")
    return Masks(jnp.minimum(key_ends, S), query_ids, key_ids)


def _pad(x: Float[Array, "B T N K"], least: int) -> Float[Array, "B rows N K"]:
    """Appends zeros until TMA can copy `x` in tiles of 8 tokens, and a box of `least` fits."""
    size = max(-(-x.shape[1] // 8) * 8, least)
    return jnp.pad(x, ((0, 0), (0, size - x.shape[1]), (0, 0), (0, 0)))


class Residuals(NamedTuple):
    q: Float[Array, "B T N K"]
    k: Float[Array, "B S G K"]
    v: Float[Array, "B S G H"]
    masks: Masks
    out: Float[Array, "B T N H"]
    lse: Float32[Array, "B N rows"]


def _forward(static: Static, q, k, v, masks: Masks) -> tuple[jax.Array, ...]:
    """out "B T N H" and lse "B N T", T rounded up to whole tiles in lse."""
    from pallas_kernels.flash_attention.sm90.forward import forward

    results = forward(static.problem, masks, q, k, v, num_sms=static.num_sms)
    return varying.align(q, *results)[1:]


def _push_forward(*_) -> NoReturn:
    raise NotImplementedError(
        "flash_attention: the kernels of 'mosaic_gpu' have no forward-mode derivative (jax.jvp);"
        " use implementation='xla', which has one"
    )


def _pull_back(static: Static, residuals: Residuals, cotangents: tuple) -> tuple[jax.Array, ...]:
    q, k, v, masks, out, lse = residuals
    dout, dlse = cotangents
    # d(score) = p * (dp - delta), for sum(p * dp) = sum(dout * out) and d(lse) / d(score) = p.
    delta = jnp.sum(dout.astype(jnp.float32) * out.astype(jnp.float32), -1)
    delta = jnp.swapaxes(delta, 1, 2)
    delta = jnp.pad(delta, ((0, 0), (0, 0), (0, lse.shape[2] - delta.shape[2]))) - dlse
    start = -lse / static.problem.scale
    if static.problem.has_lengths:
        # An empty row has no gradient, even where log or division made its cotangent NaN.
        is_empty = lse == -jnp.inf
        start, delta = jnp.where(is_empty, -jnp.inf, start), jnp.where(is_empty, 0, delta)
        is_empty = jnp.swapaxes(is_empty[:, :, : dout.shape[1]], 1, 2)[..., None]
        dout = jnp.where(is_empty, 0, dout)
    stats = jnp.stack([start, -delta], 2)
    dq, dk, dv = _backward(static, masks, q, k, v, dout, stats)
    return varying.align(q, dq, dk, dv)[1:]


@functools.partial(
    not_differentiable,
    reason="flash_attention: the gradients that the kernels of 'mosaic_gpu' compute have no"
    " derivative (jax.hessian); use implementation='xla', which has second derivatives",
)
def _backward(static: Static, masks: Masks, q, k, v, dout, stats) -> tuple[jax.Array, ...]:
    """dq, dk, dv."""
    from pallas_kernels.flash_attention.sm90 import backward, fused

    num_sms = static.num_sms
    splits = choose_group_splits(static.problem, num_sms)
    problem = dataclasses.replace(static.problem, group_splits=splits)
    if problem.has_lengths:
        # As in `key_rows`; compared with five matmuls a copy of everything costs little.
        k, v = zeros_past(masks.key_ends, k), zeros_past(masks.key_ends, v)
    operands = masks, q, k, v, dout, stats
    if is_backward_fused(problem, static.deterministic, num_sms):
        dq, dk, dv = fused.gradients(problem, *operands, num_sms=num_sms)
        dq = (problem.scale * dq).astype(q.dtype)
    else:
        dq = backward.query_gradient(problem, *operands, num_sms=num_sms)
        dk, dv = backward.key_gradients(problem, *operands, num_sms=num_sms)
    return dq, _sum_splits(problem, dk, k), _sum_splits(problem, dv, v)


def _sum_splits(problem: Problem, gradient: jax.Array, like: jax.Array) -> jax.Array:
    """The gradient of `like` "B S G K", from those of its groups' splits, which are whole tiles."""
    if problem.group_splits == 1:
        return gradient
    splits = gradient[:, : problem.S].reshape(*like.shape[:3], problem.group_splits, like.shape[3])
    return splits.sum(3).astype(like.dtype)


_attention = differentiable(
    _forward,
    residuals=lambda operands, results: Residuals(*operands, *results),
    push_forward=_push_forward,
    pull_back=_pull_back,
    num_differentiable=3,
)
