"""FlashMLA's names: its own test matrix, reduced, with its poison, sentinels and tolerances."""

import inspect

import jax.numpy as jnp
import numpy as np
import pytest
from numerics import normal, slow_attention

from pallas_kernels import mla_decode
from pallas_kernels.flash_mla import flash_mla_with_kvcache, get_mla_metadata

D, DV, PAGE = 576, 512, 64
UNUSED_PAGE = 2147480000


def close_as_flash_mla_asks(got, want, absolute, relative, cosine):
    """Every entry within one of two tolerances, and the whole near in angle; infinities equal."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    np.testing.assert_array_equal(np.isposinf(got), np.isposinf(want))
    assert not np.isnan(got).any() and not np.isneginf(got).any()
    got, want = (np.where(np.isposinf(x), 0, x) for x in (got, want))
    error = np.abs(got - want)
    assert ((error <= absolute) | (error <= relative * np.abs(want))).all(), error.max()
    if (want != 0).any():
        assert 1 - 2 * (got * want).sum() / (got**2 + want**2).sum() <= cosine


def request(rng, b, s_q, h_q, h_kv, lengths):
    """Inputs normal / 10 within 1; pages shuffled; NaN where no token is; poisoned table."""
    max_pages = -(-int(lengths.max()) // PAGE) + 1
    table = rng.permutation(b * max_pages).reshape(b, max_pages).astype(np.int32)
    cache = np.clip(rng.standard_normal((b * max_pages, PAGE, h_kv, D)) / 10, -1, 1)
    for pages, length in zip(table, lengths, strict=True):
        used = -(-length // PAGE)
        cache[pages[used:]] = np.nan
        if length % PAGE:
            cache[pages[used - 1], length % PAGE :] = np.nan
        pages[used:] = UNUSED_PAGE
    q = normal(rng, (b, s_q, h_q, D), "bfloat16", scale=0.1)
    return q, jnp.asarray(cache, jnp.bfloat16), table


def slow(q, cache, table, lengths, causal):
    """FlashMLA's reference in float64: lse "b h_q s_q", and +inf where nothing is seen."""
    (b, s_q, h_q, _), h_kv = q.shape, cache.shape[2]
    cache = np.asarray(cache, np.float64)
    out, lse = np.zeros((b, s_q, h_q, DV)), np.zeros((b, h_q, s_q))
    for i, length in enumerate(lengths):
        kv = cache[table[i, : -(-length // PAGE)]].reshape(-1, h_kv, D)[:length]
        border = length - np.arange(s_q - 1, -1, -1) if causal else np.full(s_q, length)
        seen = np.arange(length)[None] < border[:, None]
        for h in range(h_q):
            head = kv[:, h // (h_q // h_kv)]
            out[i, :, h], lse[i, h] = slow_attention(q[i, :, h], head, head[:, :DV], seen, D**-0.5)
    return out, np.where(np.isneginf(lse), np.inf, lse)


@pytest.mark.parametrize("metadata", ["old", "new"])
@pytest.mark.parametrize(
    ("b", "s_q", "h_q", "h_kv", "s_k", "is_ragged", "causal"),
    [
        (1, 1, 1, 1, 20, False, False),
        (2, 2, 9, 3, 140, True, True),
        (6, 4, 3, 1, 140, True, True),
        (2, 1, 63, 1, 140, False, True),
        (2, 2, 16, 8, 20, True, False),
    ],
)
def test_matrix(rng, b, s_q, h_q, h_kv, s_k, is_ragged, causal, metadata):
    lengths = np.full(b, s_k)
    if is_ragged:
        lengths = np.maximum(rng.normal(s_k, s_k / 2, b), s_q).astype(int)
    q, cache, table = request(rng, b, s_q, h_q, h_kv, lengths)
    lengths = lengths.astype(np.int32)
    old = (jnp.asarray(lengths), s_q * h_q // h_kv, h_kv)
    plan, num_splits = get_mla_metadata(*old) if metadata == "old" else get_mla_metadata()
    out, lse = flash_mla_with_kvcache(q, cache, table, lengths, DV, plan, num_splits, causal=causal)
    assert (out.shape, out.dtype) == ((b, s_q, h_q, DV), jnp.bfloat16)
    assert (lse.shape, lse.dtype) == ((b, h_q, s_q), jnp.float32)
    want_out, want_lse = slow(q, cache, table, lengths, causal)
    close_as_flash_mla_asks(out, want_out, 8e-4, 2.01 / 128, 5e-6)
    close_as_flash_mla_asks(lse, want_lse, 1e-6, 8.01 / 65536, 1)


def test_rows_without_tokens_are_zero_with_lse_plus_infinity(rng):
    """Half of the batch is empty; a causal row ahead of a short sequence is empty, too."""
    lengths = np.array([0, 70, 0, 1], np.int32)
    q, cache, table = request(rng, 4, 2, 4, 1, lengths)
    out, lse = flash_mla_with_kvcache(q, cache, table, lengths, DV, None, causal=True)
    want_out, want_lse = slow(q, cache, table, lengths, True)
    close_as_flash_mla_asks(out, want_out, 8e-4, 2.01 / 128, 5e-6)
    close_as_flash_mla_asks(lse, want_lse, 1e-6, 8.01 / 65536, 1)
    assert np.isposinf(lse[::2]).all() and np.isposinf(lse[3, :, 0]).all()
    assert (out[0] == 0).all() and (out[2] == 0).all() and (out[3, 0] == 0).all()


def test_defaults_are_flash_mlas(rng):
    """No mask of the future, and scale d ** -0.5 of the whole row."""
    lengths = np.array([5], np.int32)
    q, cache, table = request(rng, 1, 2, 2, 1, lengths)
    out, lse = flash_mla_with_kvcache(q, cache, table, lengths, DV)
    want = mla_decode(q, cache[:, :, 0], table, lengths, latent_dim=DV, scale=D**-0.5, causal=False)
    np.testing.assert_array_equal(out, want.out)
    np.testing.assert_array_equal(lse, want.lse.swapaxes(1, 2))


def test_arguments_are_flash_mlas():
    names = list(inspect.signature(flash_mla_with_kvcache).parameters)
    assert names == [
        "q", "k_cache", "block_table", "cache_seqlens", "head_dim_v", "tile_scheduler_metadata",
        "num_splits", "softmax_scale", "causal", "is_fp8_kvcache", "indices", "attn_sink",
        "extra_k_cache", "extra_indices_in_kvcache", "topk_length", "extra_topk_length",
    ]  # fmt: skip


def test_metadata_divides_the_machine_among_key_heads():
    lengths = jnp.array([100, 2000])
    plan, num_splits = get_mla_metadata(lengths, 128, 2, num_heads_q=128)
    assert len(plan.begin_request) == 132 // 2 // 2
    np.testing.assert_array_equal(num_splits, plan.num_splits)
    assert get_mla_metadata() == (None, None)


ARRAYS = [
    "indices", "attn_sink", "extra_k_cache", "extra_indices_in_kvcache", "topk_length",
    "extra_topk_length",
]  # fmt: skip


@pytest.mark.parametrize(
    ("feature", "value"), [("is_fp8_kvcache", True), *((name, np.zeros(1)) for name in ARRAYS)]
)
def test_missing_features_are_refused_by_name(rng, feature, value):
    q, cache, table = request(rng, 1, 1, 1, 1, np.array([3]))
    with pytest.raises(NotImplementedError, match=f"{feature} is a feature of FlashMLA"):
        flash_mla_with_kvcache(q, cache, table, np.array([3]), DV, **{feature: value})


@pytest.mark.parametrize("feature", [{"is_fp8_kvcache": True}, {"topk": 64}])
def test_missing_features_are_refused_in_metadata(feature):
    with pytest.raises(NotImplementedError, match=f"{next(iter(feature))} is a feature"):
        get_mla_metadata(jnp.array([3]), 16, 1, **feature)


def test_lengths_without_rows_are_refused():
    with pytest.raises(
        ValueError, match="num_q_tokens_per_head_k must be given with cache_seqlens"
    ):
        get_mla_metadata(jnp.array([3]))


def test_heads_that_do_not_divide_are_refused():
    q, cache = jnp.zeros((1, 1, 4, D)), jnp.zeros((1, PAGE, 3, D))
    with pytest.raises(ValueError, match="multiple of the 3 key heads, got 4"):
        flash_mla_with_kvcache(q, cache, jnp.zeros((1, 1), int), jnp.ones(1, int), DV)
