"""Paged absorbed MLA decode in jnp: the definition of the op, and its implementation "xla".

Letters: B T S N C X as in `mla_decode`; M = T * N rows of queries, which read the same keys.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Integer

from pallas_kernels.mla_decode.plan import MLADecodePlan

# Tokens of every sequence that a step gathers. On a CPU they should stay in a core's cache
# (measured in NOTES.md); elsewhere a step costs several kernel launches, so there should be few.
CHUNK_TOKENS_CPU = 128
CHUNK_TOKENS = 1024


def mla_decode_reference(
    q: Float[Array, "B T N X"],
    kv_pages: Float[Array, "num_pages page_size X"],
    page_table: Integer[Array | np.ndarray, "B max_pages"],
    lengths: Integer[Array | np.ndarray, " B"],
    *,
    latent_dim: int,
    scale: float,
    causal: bool,
    plan: MLADecodePlan | None,
) -> tuple[Float[Array, "B T N C"], Float32[Array, "B T N"]]:
    """See `mla_decode`. Gathers a chunk of pages at a time, up to the longest length only."""
    del plan  # how a GPU splits the work; here XLA does
    chunk_tokens = CHUNK_TOKENS_CPU if jax.default_backend() == "cpu" else CHUNK_TOKENS
    return _decode(q, kv_pages, page_table, lengths, latent_dim, scale, causal, chunk_tokens)


@functools.partial(jax.jit, static_argnums=(4, 5, 6, 7))
def _decode(
    q: Float[Array, "B T N X"],
    kv_pages: Float[Array, "num_pages page_size X"],
    page_table: Integer[Array, "B max_pages"],
    lengths: Integer[Array, " B"],
    latent_dim: int,
    scale: float,
    causal: bool,
    chunk_tokens: int,
) -> tuple[Float[Array, "B T N C"], Float32[Array, "B T N"]]:
    B, T, N, X = q.shape
    page_size, max_pages = kv_pages.shape[1], page_table.shape[1]
    # int32, because a narrower dtype may not hold the capacity. Longer lengths count as all of it,
    # so that no chunk is read twice.
    lengths = jnp.minimum(jnp.asarray(lengths, jnp.int32), max_pages * page_size)
    chunk_pages = min(max_pages, max(1, chunk_tokens // page_size))
    chunk, num_chunks = chunk_pages * page_size, -(-max_pages // chunk_pages)
    page_table = jnp.pad(page_table, [(0, 0), (0, num_chunks * chunk_pages - max_pages)])
    q_BMX = q.reshape(B, T * N, X)
    hidden_M = jnp.repeat(jnp.arange(T - 1, -1, -1), N) if causal else jnp.zeros(T * N, int)
    border_BM = lengths[:, None] - hidden_M[None, :]  # a row sees the tokens before its border

    def attend(i, state):
        s = i * chunk + jnp.arange(chunk)
        is_cached_BS = s[None, :] < lengths[:, None]
        pages = jax.lax.dynamic_slice_in_dim(page_table, i * chunk_pages, chunk_pages, axis=1)
        # Entries past the last used page may be any number: they are clipped to a page that exists,
        # and what it holds is masked. Masked NaN must not reach a matmul: 0 * NaN is NaN.
        kv_BSX = jnp.take(kv_pages, pages, axis=0, mode="clip").reshape(B, chunk, X)
        kv_BSX = jnp.where(is_cached_BS[:, :, None], kv_BSX, 0)
        scores_BMS = scale * _einsum("BMX,BSX->BMS", q_BMX, kv_BSX)
        is_seen_BMS = s[None, None, :] < border_BM[:, :, None]
        return _online_softmax(state, jnp.where(is_seen_BMS, scores_BMS, -jnp.inf), kv_BSX)

    # The first chunk runs before the loop: a short cache then needs no loop at all.
    state = attend(0, None)
    if num_chunks > 1:
        state = jax.lax.fori_loop(1, -(-jnp.max(lengths) // chunk), attend, state)
    highest_BM, total_BM, acc_BMX = state
    is_empty_BM = total_BM == 0
    total_BM = jnp.where(is_empty_BM, 1, total_BM)
    out_BMC = acc_BMX[..., :latent_dim] / total_BM[..., None]
    lse_BM = jnp.where(is_empty_BM, -jnp.inf, highest_BM + jnp.log(total_BM))
    return out_BMC.reshape(B, T, N, latent_dim).astype(q.dtype), lse_BM.reshape(B, T, N)


State = tuple[Float32[Array, "B M"], Float32[Array, "B M"], Float32[Array, "B M X"]]


def _online_softmax(
    state: State | None, scores_BMS: Float32[Array, "B M S"], kv_BSX: Float[Array, "B S X"]
) -> State:
    """Adds a chunk to the running (maximum, sum, output); `state` None is the first chunk."""
    highest_BM = jnp.max(scores_BMS, -1)
    if state is not None:
        highest_BM = jnp.maximum(highest_BM, state[0])
    shift_BM = jnp.where(highest_BM == -jnp.inf, 0, highest_BM)  # -inf - -inf would be NaN
    p_BMS = jnp.exp(scores_BMS - shift_BM[..., None])
    total_BM = jnp.sum(p_BMS, -1)
    # All X columns: the R rotary ones are wasted, but slicing them off first copies the chunk.
    acc_BMX = _einsum("BMS,BSX->BMX", p_BMS.astype(kv_BSX.dtype), kv_BSX)
    if state is not None:
        decay_BM = jnp.exp(state[0] - shift_BM)
        total_BM = total_BM + decay_BM * state[1]
        acc_BMX = acc_BMX + decay_BM[..., None] * state[2]
    return highest_BM, total_BM, acc_BMX


def _einsum(subscripts: str, a: Array, b: Array) -> Float32[Array, "..."]:
    return jnp.einsum(subscripts, a, b, precision="highest", preferred_element_type=jnp.float32)
