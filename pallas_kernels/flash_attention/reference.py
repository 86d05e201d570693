"""Flash attention in jnp: the definition of the op, and its implementation "xla".

Blocks of queries meet blocks of keys with an online softmax, forward and backward, so that memory
grows with T and never with T * S. Blocks of keys that no query of a block may see are skipped.

Letters: B T S N K H as in `flash_attention`; G key heads; M rows of a query block: its tokens for
each of the N // G heads that share a key head. I counts query blocks, J key blocks; t and s are the
tokens of one block.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax.export import is_symbolic_dim
from jaxtyping import Array, Float, Float32, Int, Int32, Integer, Shaped

from pallas_kernels import varying
from pallas_kernels.derivatives import differentiable

# Scores, over all heads, that exist at once. On a CPU they should stay in the cores' caches
# (measured in NOTES.md); elsewhere a block costs several kernel launches, so there should be few.
BLOCK_SCORES_CPU = 2**19
BLOCK_SCORES = 2**25
MIN_BLOCK, MAX_BLOCK = 32, 1024  # tokens


@dataclasses.dataclass(frozen=True)
class Static:
    """What a trace is specialised on."""

    causal: bool
    scale: float
    offset: int  # S - T, the position of query 0
    block_t: int
    block_s: int


class Operands(NamedTuple):
    """What the loops read, cut into blocks."""

    q: Float[Array, "I B G M K"]
    k: Float[Array, "J B G s K"]
    v: Float[Array, "J B G s H"]
    lengths: Int32[Array, " B"]
    query_ids: Integer[Array, "I B M"] | None
    key_ids: Integer[Array, "J B s"] | None


class Residuals(NamedTuple):
    operands: Operands
    out: Float[Array, "I B G M H"]
    lse: Float32[Array, "I B G M"]


State = TypeVar("State")


@functools.partial(jax.jit, static_argnames=("causal", "scale", "deterministic", "block_scores"))
def flash_attention_reference(
    q: Float[Array, "B T N K"],
    k: Float[Array, "B S G K"],
    v: Float[Array, "B S G H"],
    *,
    causal: bool,
    scale: float,
    segment_ids: Integer[Array, "B S"] | None,
    lengths: Integer[Array, " B"] | None,
    deterministic: bool,
    block_scores: int | None = None,
) -> tuple[Float[Array, "B T N H"], Float32[Array, "B T N"]]:
    """Returns out and lse, see `flash_attention`. Sums have a fixed order: always deterministic."""
    del deterministic
    B, T, N, K = q.shape
    _, S, G, H = v.shape
    heads = N if is_symbolic_dim(B) else B * N  # of a batch that an export leaves open
    block_t, block_s = block_sizes(heads, T, S, block_scores)
    static = Static(causal, float(scale), S - T, block_t, block_s)
    if lengths is None:
        lengths = jnp.full((B,), S, jnp.int32)
    else:
        lengths = jnp.asarray(lengths, jnp.int32)  # a narrower dtype may not hold S
        k, v = zeros_past(lengths, k), zeros_past(lengths, v)
    query_ids = key_ids = None
    if segment_ids is not None:
        query_ids = jnp.tile(_blocks(segment_ids[:, S - T :], block_t), (1, 1, N // G))
        key_ids = _blocks(segment_ids, block_s)

    q_IBtGMK = _blocks(q.reshape(B, T, G, N // G, K), block_t)
    operands = varying.align(
        _rows(q_IBtGMK),
        jnp.swapaxes(_blocks(k, block_s), 2, 3),
        jnp.swapaxes(_blocks(v, block_s), 2, 3),
        jnp.minimum(lengths, S),  # more would show the zeros after S
        query_ids,
        key_ids,
    )
    out_IBGMH, lse_IBGM = _attention(static, *operands)
    out = _tokens(out_IBGMH, block_t)[:, :T].reshape(B, T, N, H)
    lse = _tokens(lse_IBGM[..., None], block_t)[:, :T].reshape(B, T, N)
    return out, lse


def zeros_past(
    lengths: Integer[Array, " B"], x: Float[Array, "B S G K"]
) -> Float[Array, "B S G K"]:
    """`x` with zeros in place of what keys past a length may hold: NaN, and 0 * NaN is NaN."""
    is_past_BS11 = (jnp.arange(x.shape[1])[None, :] >= lengths[:, None])[:, :, None, None]
    return jnp.where(is_past_BS11, 0, x)


def block_sizes(heads: int, T: int, S: int, block_scores: int | None = None) -> tuple[int, int]:
    """Tokens of a query and of a key block: near a square, and of even size over the sequence."""
    if block_scores is None:
        block_scores = BLOCK_SCORES_CPU if jax.default_backend() == "cpu" else BLOCK_SCORES
    scores = block_scores // heads
    block_t = _even_split(T, math.isqrt(scores))
    return block_t, _even_split(S, scores // block_t)


def _even_split(size: int, block: int) -> int:
    """Size of the blocks if `size` is split into as few as `block` allows."""
    num_blocks = -(-size // min(max(block, MIN_BLOCK), MAX_BLOCK))
    return -(-size // num_blocks)


def _blocks(x: Shaped[Array, "B S *rest"], size: int) -> Shaped[Array, "J B size *rest"]:
    """Cuts S into blocks. Zeros fill up the last one; they are masked or sliced off."""
    num_blocks = -(-x.shape[1] // size)
    padding = [(0, 0)] * x.ndim
    padding[1] = (0, num_blocks * size - x.shape[1])
    x = jnp.pad(x, padding).reshape(x.shape[0], num_blocks, size, *x.shape[2:])
    return jnp.moveaxis(x, 1, 0)


def _rows(q: Float[Array, "I B t G heads K"]) -> Float[Array, "I B G M K"]:
    I, B, block, G, heads, K = q.shape
    return q.transpose(0, 1, 3, 4, 2, 5).reshape(I, B, G, heads * block, K)


def _tokens(x: Float[Array, "I B G M H"], block: int) -> Float[Array, "B T G heads H"]:
    """The inverse of _blocks and _rows; T is I * block."""
    I, B, G, M, H = x.shape
    x = x.reshape(I, B, G, M // block, block, H).transpose(1, 0, 4, 2, 3, 5)
    return x.reshape(B, I * block, G, M // block, H)


def _forward(
    static: Static, *operands: Any
) -> tuple[Float[Array, "I B G M H"], Float32[Array, "I B G M"]]:
    """out and lse of Operands."""
    q, k, v, lengths, query_ids, key_ids = operands

    def attend(_, block):
        i, q_i, ids_i = block

        def meet(j, state):
            scores_BGMS = _scores(static, i, j, q_i, k[j], lengths, ids_i, _at(key_ids, j))
            highest, total, acc = state
            new_highest = jnp.maximum(highest, jnp.max(scores_BGMS, -1))
            shift = jnp.where(new_highest == -jnp.inf, 0, new_highest)  # -inf - -inf would be NaN
            p_BGMS = jnp.exp(scores_BGMS - shift[..., None])
            decay = jnp.exp(highest - shift)
            total = decay * total + jnp.sum(p_BGMS, -1)
            new = _einsum("BGMS,BGSH->BGMH", p_BGMS.astype(v.dtype), v[j])
            return new_highest, total, decay[..., None] * acc + new

        # full_like of q_i rather than full: inside shard_map the state must vary as q does.
        full = functools.partial(jax.lax.full_like, q_i, dtype=jnp.float32)
        rows = q_i.shape[:-1]
        state = full(-jnp.inf, shape=rows), full(0, shape=rows), full(0, shape=(*rows, v.shape[-1]))
        highest, total, acc = _visit_keys(static, i, len(k), lengths, meet, state)
        is_empty = total == 0
        out = acc / jnp.where(is_empty, 1, total)[..., None]
        lse = jnp.where(is_empty, -jnp.inf, highest + jnp.log(jnp.where(is_empty, 1, total)))
        return None, (out.astype(q.dtype), lse)

    return jax.lax.scan(attend, None, (jnp.arange(len(q)), q, query_ids))[1]


def _push_forward(
    static: Static, residuals: Residuals, tangents: tuple
) -> tuple[Float[Array, "I B G M H"], Float32[Array, "I B G M"]]:
    """Tangents of out and lse for those of q, k and v; recomputes the probabilities from lse."""
    (q, k, v, lengths, query_ids, key_ids), out, lse = residuals
    dq, dk, dv = tangents
    lse = jnp.where(lse == -jnp.inf, jnp.inf, lse)  # p = exp(-inf) = 0 in an empty row

    def attend(_, block):
        i, q_i, ids_i, out_i, lse_i, dq_i = block

        def meet(j, sums):
            # d(lse) = sum(p * d(scores)), d(out) = sum(p * d(scores) * v + p * dv) - d(lse) * out.
            dlse, acc = sums
            scores_BGMS = _scores(static, i, j, q_i, k[j], lengths, ids_i, _at(key_ids, j))
            p_BGMS = jnp.exp(scores_BGMS - lse_i[..., None])
            dscores_BGMS = _einsum("BGMK,BGSK->BGMS", dq_i, k[j])
            dscores_BGMS += _einsum("BGMK,BGSK->BGMS", q_i, dk[j])
            dp_BGMS = static.scale * p_BGMS * dscores_BGMS
            acc += _einsum("BGMS,BGSH->BGMH", dp_BGMS.astype(v.dtype), v[j])
            acc += _einsum("BGMS,BGSH->BGMH", p_BGMS.astype(v.dtype), dv[j])
            return dlse + jnp.sum(dp_BGMS, -1), acc

        sums = jnp.zeros_like(lse_i), jnp.zeros_like(out_i, dtype=jnp.float32)
        dlse, acc = _visit_keys(static, i, len(k), lengths, meet, sums)
        return None, ((acc - dlse[..., None] * out_i).astype(out.dtype), dlse)

    blocks = (jnp.arange(len(q)), q, query_ids, out, lse, dq)
    return jax.lax.scan(attend, None, blocks)[1]


def _pull_back(
    static: Static, residuals: Residuals, cotangents: tuple
) -> tuple[Float[Array, "I B G M K"], Float[Array, "J B G s K"], Float[Array, "J B G s H"]]:
    """dq, dk, dv for the cotangents of out and lse; recomputes the probabilities from lse."""
    (q, k, v, lengths, query_ids, key_ids), out, lse = residuals
    dout, dlse = cotangents
    # d(scores) = p * (dp - delta), for sum(p * dp) = sum(dout * out) and d(lse) / d(scores) = p.
    delta = jnp.sum(dout.astype(jnp.float32) * out.astype(jnp.float32), -1) - dlse
    # An empty row has no gradient, even where a later log or division made its cotangent NaN.
    is_empty = lse == -jnp.inf
    delta, dout = jnp.where(is_empty, 0, delta), jnp.where(is_empty[..., None], 0, dout)
    lse = jnp.where(is_empty, jnp.inf, lse)  # p = exp(-inf) = 0

    def attend(carry, block):
        i, q_i, ids_i, dout_i, lse_i, delta_i = block

        def meet(j, carry):
            dq_i, dk, dv = carry
            scores_BGMS = _scores(static, i, j, q_i, k[j], lengths, ids_i, _at(key_ids, j))
            p_BGMS = jnp.exp(scores_BGMS - lse_i[..., None])
            dp_BGMS = _einsum("BGMH,BGSH->BGMS", dout_i, v[j])
            ds_BGMS = (static.scale * p_BGMS * (dp_BGMS - delta_i[..., None])).astype(q.dtype)
            dv_j = _einsum("BGMS,BGMH->BGSH", p_BGMS.astype(v.dtype), dout_i)
            dk_j = _einsum("BGMS,BGMK->BGSK", ds_BGMS, q_i)
            dq_i += _einsum("BGMS,BGSK->BGMK", ds_BGMS, k[j])
            return dq_i, dk.at[j].add(dk_j), dv.at[j].add(dv_j)

        carry = (jnp.zeros_like(q_i, dtype=jnp.float32), *carry)
        dq_i, *carry = _visit_keys(static, i, len(k), lengths, meet, carry)
        return tuple(carry), dq_i.astype(q.dtype)

    zeros = tuple(jnp.zeros_like(x, dtype=jnp.float32) for x in (k, v))
    blocks = (jnp.arange(len(q)), q, query_ids, dout, lse, delta)
    (dk, dv), dq = jax.lax.scan(attend, zeros, blocks)
    return dq, dk.astype(k.dtype), dv.astype(v.dtype)


_attention = differentiable(
    _forward,
    residuals=lambda operands, results: Residuals(Operands(*operands), *results),
    push_forward=_push_forward,
    pull_back=_pull_back,
    num_differentiable=3,
)


def _visit_keys(
    static: Static,
    i: Int[Array, ""],
    num_blocks: int,
    lengths: Int32[Array, " B"],
    meet: Callable[[Any, State], State],
    state: State,
) -> State:
    """`state = meet(j, state)` for the key blocks before the last length and the causal border."""
    if num_blocks == 1:
        return meet(0, state)
    end = jnp.max(lengths)
    if static.causal:
        end = jnp.minimum(end, static.offset + (i + 1) * static.block_t)
    return jax.lax.fori_loop(0, jnp.minimum(-(-end // static.block_s), num_blocks), meet, state)


def _scores(
    static: Static,
    i: Int[Array, ""],
    j: Int[Array, ""] | int,
    q_i: Float[Array, "B G M K"],
    k_j: Float[Array, "B G s K"],
    lengths: Int32[Array, " B"],
    query_ids: Integer[Array, "B M"] | None,
    key_ids: Integer[Array, "B s"] | None,
) -> Float32[Array, "B G M s"]:
    """Scaled scores of query block i and key block j, -inf where a query must not see a key."""
    scores_BGMS = static.scale * _einsum("BGMK,BGSK->BGMS", q_i, k_j)
    s = j * static.block_s + jnp.arange(static.block_s)
    is_visible_BMS = s[None, None, :] < lengths[:, None, None]
    if static.causal:
        t = static.offset + i * static.block_t + jnp.arange(q_i.shape[2]) % static.block_t
        is_visible_BMS = is_visible_BMS & (s[None, None, :] <= t[None, :, None])
    if query_ids is not None and key_ids is not None:
        is_visible_BMS = is_visible_BMS & (query_ids[:, :, None] == key_ids[:, None, :])
    return jnp.where(is_visible_BMS[:, None], scores_BGMS, -jnp.inf)


def _at(x: Array | None, j: Int[Array, ""] | int) -> Array | None:
    return None if x is None else x[j]


def _einsum(subscripts: str, a: Array, b: Array) -> Float32[Array, "..."]:
    return jnp.einsum(subscripts, a, b, precision="highest", preferred_element_type=jnp.float32)
