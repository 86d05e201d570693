"""Caches: where rows go, and what is never overwritten."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from weights import random_params

import jax_mla
from jax_mla.cache.pages import advance, append, capacity, layer_pages, truncate

CONFIG = dataclasses.replace(
    jax_mla.tiny(), kv_lora_rank=2, qk_rope_head_dim=2, num_hidden_layers=3
)
X = CONFIG.cache_row_dim


@st.composite
def appends(draw):
    """A cache with a shuffled table, some of whose entries name no page, and what to append."""
    batch, max_pages = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    page_size = draw(st.sampled_from([1, 2, 4]))
    num_pages = batch * max_pages + draw(st.integers(0, 2))
    table = np.asarray(draw(st.permutations(range(num_pages))))[: batch * max_pages]
    table = table.reshape(batch, max_pages)
    for slot in draw(st.lists(st.tuples(st.integers(0, batch - 1), st.integers(0, max_pages - 1)))):
        table[slot] = draw(st.sampled_from([-1, num_pages, 2147480000]))
    tokens = draw(st.integers(1, 5))
    full = max_pages * page_size
    lengths = draw(st.lists(st.integers(0, full), min_size=batch, max_size=batch))
    num_new = draw(st.lists(st.integers(0, tokens), min_size=batch, max_size=batch))
    return table, num_pages, page_size, np.asarray(lengths), tokens, np.asarray(num_new)


@given(appends())
def test_append_writes_its_rows_and_nothing_else(case):
    table, num_pages, page_size, lengths, tokens, num_new = case
    layer = 1
    cache = jax_mla.PagedLatentCache.with_table(
        CONFIG, table, num_pages=num_pages, page_size=page_size
    )
    cache = dataclasses.replace(cache, lengths=jnp.asarray(lengths, jnp.int32))
    rows = 1 + np.arange(len(table) * tokens * X, dtype=np.float32).reshape(len(table), tokens, X)
    want = np.zeros(cache.pages.shape, np.float32)
    for b in range(len(table)):
        for t in range(num_new[b]):
            page, offset = divmod(lengths[b] + t, page_size)
            if page < table.shape[1] and 0 <= table[b, page] < num_pages:
                want[layer, table[b, page], offset] = rows[b, t]
    got = append(cache, layer, jnp.asarray(rows), jnp.asarray(num_new))
    np.testing.assert_array_equal(got.pages, want)
    np.testing.assert_array_equal(got.lengths, lengths)
    np.testing.assert_array_equal(advance(got, jnp.asarray(num_new)).lengths, lengths + num_new)


def test_layer_pages_names_the_pages_of_one_layer():
    cache = jax_mla.LatentCache.empty(CONFIG, 2, 8, page_size=4)
    rows = jnp.arange(2 * 8 * X, dtype=jnp.float32).reshape(2, 8, X)
    cache = append(cache, 2, rows, jnp.asarray([8, 8]))
    pool, table = layer_pages(cache, 2)
    np.testing.assert_array_equal(pool[table].reshape(2, 8, X), rows)
    pool, table = layer_pages(cache, 0)
    assert not pool[table].any()


@pytest.mark.parametrize("jit", [False, True])
def test_truncate_shortens_and_never_lengthens(jit):
    cache = jax_mla.PagedLatentCache.empty(CONFIG, 8, 4, batch=4)
    cache = dataclasses.replace(cache, lengths=jnp.asarray([5, 3, 0, 8], jnp.int32))
    shortened = (jax.jit(truncate) if jit else truncate)(cache, np.asarray([2, 3, 7, -1]))
    assert shortened.lengths.tolist() == [2, 3, 0, 0] and shortened.lengths.dtype == jnp.int32
    np.testing.assert_array_equal(shortened.page_table, cache.page_table)
    assert truncate(cache, [2, 3, 7, -1]).lengths.tolist() == [2, 3, 0, 0]


@pytest.mark.parametrize("make", [jax_mla.LatentCache.empty, None], ids=["dense", "paged"])
def test_a_truncated_cache_is_one_that_never_held_the_rest(make):
    """Decoding again after a rejected draft; the rows of the draft are poison."""
    params = random_params(CONFIG)
    tokens = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (2, 9))
    if make is None:
        cache = jax_mla.PagedLatentCache.empty(CONFIG, 6, 4, batch=2)
    else:
        cache = make(CONFIG, 2, 12, page_size=4)
    _, kept = jax_mla.prefill(params, CONFIG, tokens[:, :5], cache, lengths=np.asarray([5, 3]))
    want, _ = jax_mla.decode_step(params, CONFIG, tokens[:, 5], kept)
    draft = jnp.full((2, 4, X), np.nan, kept.pages.dtype)
    drafted = kept
    for layer in range(CONFIG.num_hidden_layers):
        drafted = append(drafted, layer, draft, jnp.asarray([4, 2]))
    drafted = advance(drafted, jnp.asarray([4, 2]))
    got, _ = jax_mla.decode_step(params, CONFIG, tokens[:, 5], truncate(drafted, kept.lengths))
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        (np.asarray([1]), r"lengths must be Int\[B\] for the 2 sequences .* got shape \(1,\)"),
        (np.asarray([1.0, 2.0]), "lengths must be integers, got dtype float64"),
    ],
)
def test_truncate_refuses_other_lengths(lengths, message):
    cache = jax_mla.PagedLatentCache.empty(CONFIG, 8, 4, batch=2)
    with pytest.raises(ValueError, match=message):
        truncate(cache, lengths)


def test_sizes():
    dense = jax_mla.LatentCache.empty(jax_mla.v2_lite(), 2, 100)
    assert dense.pages.shape == (27, 4, 64, 576) and dense.pages.dtype == jnp.bfloat16
    assert capacity(dense) == 128
    paged = jax_mla.PagedLatentCache.empty(CONFIG, 7, batch=3, dtype="float16")
    assert (
        paged.page_table.tolist() == [[0, 1], [2, 3], [4, 5]] and paged.pages.dtype == jnp.float16
    )


def test_a_page_table_may_be_a_list():
    cache = jax_mla.PagedLatentCache.with_table(CONFIG, [[0, 1], [2, 3]], num_pages=4)
    assert cache.page_table.tolist() == [[0, 1], [2, 3]] and cache.page_table.dtype == jnp.int32


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: jax_mla.LatentCache.empty(CONFIG, 0, 8),
            "batch must be an integer of at least 1, got 0",
        ),
        (
            lambda: jax_mla.LatentCache.empty(CONFIG, 2, -1),
            "max_tokens must be an integer of at least 1, got -1",
        ),
        (
            lambda: jax_mla.PagedLatentCache.empty(CONFIG, 2, batch=3),
            "num_pages must be at least 3, .* batch=3, got 2",
        ),
        (
            lambda: jax_mla.PagedLatentCache.with_table(CONFIG, np.zeros(3), num_pages=2),
            r"page_table must be Int\[B max_pages\], .* got shape \(3,\)",
        ),
        (
            lambda: jax_mla.PagedLatentCache.with_table(CONFIG, np.zeros((1, 2)), num_pages=2),
            "page_table must be integers, got dtype float",
        ),
        (
            lambda: jax_mla.PagedLatentCache.with_table(
                CONFIG, np.array([[2**32, 1]]), num_pages=4
            ),
            "page_table must fit into 32 bits, got 4294967296",
        ),
        (
            lambda: jax_mla.PagedLatentCache.with_table(CONFIG, [[0, 1], [2]], num_pages=4),
            r"page_table must be an array, got \[\[0, 1\], \[2\]\]",
        ),
        (
            lambda: jax_mla.LatentCache.empty(CONFIG, 2, 8, dtype="int32"),
            "dtype must be one of float32, bfloat16, float16, got 'int32'",
        ),
        (
            lambda: jax_mla.LatentCache.empty(CONFIG, 2, 8, dtype=jnp.float8_e4m3fn),
            "dtype must be one of .* got 'float8_e4m3fn'",
        ),
        (
            lambda: jax_mla.PagedLatentCache.empty(CONFIG, 2, dtype="foo"),
            "dtype must be one of .* got 'foo'",
        ),
    ],
    ids=[
        "batch", "max_tokens", "num_pages", "page_table", "floats", "wide", "ragged", "int32",
        "float8", "foo",
    ],
)  # fmt: skip
def test_bad_sizes_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
