"""Grouped-query attention: MHA, GQA and MQA against a loop in numpy, and with a cache."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from numerics import assert_close, normal, poison

import jax_mla

D, N, K = 48, 6, 8


def layer(kv_heads):
    return jax_mla.GroupedQueryAttention(D, N, kv_heads, K, rngs=nnx.Rngs(0), stddev=0.3)


def turn(x):
    frequency = 10000.0 ** (-np.arange(0, K, 2) / K)
    z = (x[..., : K // 2] + 1j * x[..., K // 2 :]) * np.exp(
        1j * np.arange(len(x))[:, None] * frequency
    )
    return np.concatenate([z.real, z.imag], axis=-1)


def written_out(gqa, x, kv_heads):
    x = np.asarray(x, np.float64)
    wq, wk, wv, wo = (
        np.asarray(w.array(), np.float64) for w in (gqa.q_proj, gqa.k_proj, gqa.v_proj, gqa.o_proj)
    )
    out = np.zeros_like(x)
    for b in range(len(x)):
        for n in range(N):
            g = n // (N // kv_heads)
            q, k, v = turn(x[b] @ wq[:, n]), turn(x[b] @ wk[:, g]), x[b] @ wv[:, g]
            for t in range(x.shape[1]):
                scores = k[: t + 1] @ q[t] * K**-0.5
                p = np.exp(scores - scores.max())
                out[b, t] += (p / p.sum()) @ v[: t + 1] @ wo[n]
    return out


@pytest.mark.parametrize("kv_heads", [6, 2, 1], ids=["MHA", "GQA", "MQA"])
def test_whole_sequence_and_cached_steps(kv_heads, rng):
    gqa = layer(kv_heads)
    x = normal(rng, (2, 11, D))
    want = written_out(gqa, x, kv_heads)
    assert_close(jax.jit(gqa)(x), want, "float32")
    cache, extend = jax_mla.KeyValueCache.empty(2, 16, kv_heads, K), jax.jit(gqa.extend)
    first, cache = extend(x[:, :7], cache)
    parts = [first]
    for t in range(7, 11):
        y, cache = extend(x[:, t : t + 1], cache)
        parts.append(y)
    assert_close(jnp.concatenate(parts, axis=1), want, "float32")
    assert cache.lengths.tolist() == [11, 11]


def test_a_chunk_over_ragged_caches(rng):
    """Five cached tokens and two; what holds no token holds NaN."""
    gqa = layer(2)
    x = normal(rng, (2, 11, D))
    want, extend = written_out(gqa, x, 2), jax.jit(gqa.extend)
    _, cache = extend(x[:, :5], jax_mla.KeyValueCache.empty(2, 11, 2, K))
    lengths = np.array([5, 2])
    is_free = np.arange(11) >= lengths[:, None]
    keys, values = poison(cache.keys, is_free), poison(cache.values, is_free)
    cache = jax_mla.KeyValueCache(keys, values, jnp.asarray(lengths))
    chunk = jnp.stack([x[0, 5:11], x[1, 2:8]])
    got, cache = extend(chunk, cache)
    assert_close(got, np.stack([want[0, 5:11], want[1, 2:8]]), "float32")
    assert cache.lengths.tolist() == [11, 8]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda gqa, x, c: gqa.extend(x[:1], c), "x must have 2 sequences, as the cache, got 1"),
        (lambda gqa, x, c: gqa.extend(x, c), "the cache, which has room for 8 tokens, got 11"),
        (
            lambda gqa, x, c: jax_mla.KeyValueCache.empty(2, 0, 2, K),
            "max_tokens must be an integer of at least 1, got 0",
        ),
    ],
    ids=["batch", "room", "size"],
)
def test_what_does_not_fit_is_refused(call, message, rng):
    cache = jax_mla.KeyValueCache.empty(2, 8, 2, K)
    with pytest.raises(ValueError, match=message):
        call(layer(2), normal(rng, (2, 11, D)), cache)


def test_heads_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="num_kv_heads must be a divisor of num_heads=6, got 4"):
        layer(4)
    with pytest.raises(ValueError, match="num_kv_heads must be an integer of at least 1, got 0"):
        layer(0)


def test_caches_of_other_dtypes_are_refused():
    with pytest.raises(
        ValueError, match="dtype must be one of float32, bfloat16, float16, got 'int32'"
    ):
        jax_mla.KeyValueCache.empty(2, 8, 2, K, dtype="int32")
