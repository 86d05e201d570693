"""MLA decode: against a slow loop, poison in all that must not be read, chunks, errors."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from numerics import POISONS, assert_close, normal, poison, slow_attention, unchecked

from pallas_kernels import mla_decode, mla_decode_plan
from pallas_kernels.mla_decode.workloads import IRREGULAR, QUICK, WORKLOADS

GARBAGE = 2147480000  # FlashMLA's filling of unused table entries
C, X = 16, 24
SCALE = 0.4


def cache(rng, lengths, page_size, max_pages, dtype="float32"):
    """Shuffled pages, garbage in unused table entries, and which rows of the pages are unused."""
    lengths = np.asarray(lengths)
    num_pages = len(lengths) * max_pages + 1  # one page is nobody's
    table = rng.permutation(num_pages)[:-1].reshape(len(lengths), max_pages)
    is_unread = np.ones((num_pages, page_size), bool)
    for pages, length in zip(table, lengths, strict=True):
        tokens = np.arange(length)
        is_unread[pages[tokens // page_size], tokens % page_size] = False
        pages[-(-length // page_size) :] = GARBAGE
    return normal(rng, (num_pages, page_size, X), dtype), table.astype(np.int32), is_unread


def slow(q, kv_pages, table, lengths, causal=True):
    B, T, N, _ = q.shape
    out, lse = np.zeros((B, T, N, C)), np.zeros((B, T, N))
    for b, length in enumerate(lengths):
        used = table[b, : -(-length // kv_pages.shape[1])]
        kv = np.asarray(kv_pages, np.float64)[used].reshape(-1, X)[:length]
        border = length - np.arange(T - 1, -1, -1) if causal else np.full(T, length)
        seen = np.arange(length)[None] < border[:, None]
        for n in range(N):
            out[b, :, n], lse[b, :, n] = slow_attention(q[b, :, n], kv, kv[:, :C], seen, SCALE)
    return out, lse


decode = functools.partial(mla_decode, latent_dim=C, scale=SCALE)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize(
    ("T", "N", "page_size"),
    [(1, 1, 64), (1, 16, 16), (2, 3, 64), (4, 9, 128), (4, 2, 16)],
    ids=lambda size: str(size),
)
def test_equals_slow_loop(rng, T, N, page_size, causal):
    """Lengths on both sides of page borders, empty, shorter than T, and more than one chunk."""
    lengths = np.array([0, 1, 3, page_size - 1, page_size, page_size + 1, 5 * page_size])
    kv_pages, table, _ = cache(rng, lengths, page_size, max_pages=5)
    q = normal(rng, (len(lengths), T, N, X))
    out, lse = decode(q, kv_pages, jnp.asarray(table), jnp.asarray(lengths), causal=causal)
    want_out, want_lse = slow(q, kv_pages, table, lengths, causal)
    assert lse.dtype == jnp.float32
    assert_close(out, want_out)
    assert_close(lse, want_lse)


@pytest.mark.parametrize("value", POISONS.values(), ids=POISONS)
def test_poison_in_unused_rows_and_pages_changes_no_bit(rng, value):
    lengths = np.array([0, 1, 40, 64, 65, 200])
    kv_pages, table, is_unread = cache(rng, lengths, page_size=64, max_pages=6)
    q = normal(rng, (len(lengths), 2, 3, X))
    got = decode(q, poison(kv_pages, is_unread, value), jnp.asarray(table), jnp.asarray(lengths))
    table[table == GARBAGE] = 0
    want = decode(q, poison(kv_pages, is_unread, 0), jnp.asarray(table), jnp.asarray(lengths))
    chex.assert_trees_all_equal(got, want)
    assert (got.out[0] == 0).all() and (got.lse[0] == -jnp.inf).all()
    assert (got.lse[1, 0] == -jnp.inf).all()  # causal: the first of two tokens is not there yet


@pytest.mark.parametrize("garbage", [-1, -GARBAGE, GARBAGE, 12345])
def test_garbage_in_unused_table_entries_changes_no_bit(rng, garbage):
    lengths = np.array([3, 17, 0])
    kv_pages, table, _ = cache(rng, lengths, page_size=16, max_pages=3)
    q = normal(rng, (3, 1, 2, X))
    want = decode(q, kv_pages, jnp.asarray(np.where(table == GARBAGE, 0, table)), lengths)
    got = decode(q, kv_pages, jnp.asarray(np.where(table == GARBAGE, garbage, table)), lengths)
    chex.assert_trees_all_equal(got, want)


@given(data=st.data())
def test_any_lengths_and_tables(data):
    """Pages may be shared by requests, as with a common prefix."""
    B, page_size, max_pages, num_pages = 3, 8, 20, 7
    draw = st.lists(st.integers(0, page_size * max_pages), min_size=B, max_size=B)
    lengths = np.array(data.draw(draw))
    rng = np.random.default_rng(data.draw(st.integers(0, 100)))
    table = rng.integers(0, num_pages, (B, max_pages)).astype(np.int32)
    kv_pages, q = normal(rng, (num_pages, page_size, X)), normal(rng, (B, 2, 2, X))
    out, lse = decode(q, kv_pages, jnp.asarray(table), jnp.asarray(lengths))
    want_out, want_lse = slow(q, kv_pages, table, lengths)
    assert_close(out, want_out)
    assert_close(lse, want_lse)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_is_near_float32_on_the_same_inputs(rng, dtype):
    lengths = jnp.array([300, 5])
    kv_pages, table, _ = cache(rng, lengths, page_size=64, max_pages=5, dtype=dtype)
    q = normal(rng, (2, 1, 4, X), dtype)
    got = decode(q, kv_pages, jnp.asarray(table), lengths)
    floats = (q.astype(jnp.float32), kv_pages.astype(jnp.float32))
    want = decode(*floats, jnp.asarray(table), lengths)
    assert got.out.dtype == jnp.dtype(dtype)
    assert_close(got.out, want.out)
    assert_close(got.lse, want.lse, dtype)


def test_only_the_longest_length_is_paid_for(rng):
    """A cache of another capacity runs the same chunks: equal bits, and no compile for lengths."""
    lengths = np.array([5, 200])
    kv_pages, table, _ = cache(rng, lengths, page_size=16, max_pages=13)
    q = normal(rng, (2, 1, 2, X))
    longer = np.concatenate([table, np.full((2, 100), GARBAGE, np.int32)], axis=1)
    chex.assert_trees_all_equal(
        decode(q, kv_pages, jnp.asarray(table), lengths),
        decode(q, kv_pages, jnp.asarray(longer), lengths),
    )

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(q, kv_pages, table, lengths):
        return decode(q, kv_pages, table, lengths)

    for other in ([0, 0], [5, 200], [1, 2]):
        step(q, kv_pages, jnp.asarray(table), jnp.array(other))


def test_shard_map_over_batch_and_heads_equals_the_whole(rng):
    """Every head reads the whole cache; every data shard has its own pages."""
    lengths = np.array([70, 300])
    q, kv_pages = normal(rng, (2, 1, 4, X)), normal(rng, (10, 64, X))
    table = np.tile(rng.permutation(5), (2, 1)).astype(np.int32)  # counted within a shard's pages
    mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    heads = P("data", None, "tensor")
    sharded = jax.shard_map(
        lambda *arrays: tuple(decode(*arrays)),
        mesh=mesh,
        in_specs=(heads, P("data"), P("data"), P("data")),
        out_specs=(heads, heads),
    )
    out, lse = jax.jit(sharded)(q, kv_pages, table, lengths)
    want = decode(q, kv_pages, table + np.array([[0], [5]], np.int32), lengths)
    assert_close(out, want.out)
    assert_close(lse, want.lse)


def test_plan_does_not_change_the_result(rng):
    lengths = np.array([70, 3])
    kv_pages, table, _ = cache(rng, lengths, page_size=16, max_pages=5)
    q = normal(rng, (2, 1, 4, X))
    plan = mla_decode_plan(lengths, num_rows=4, page_size=16)
    chex.assert_trees_all_equal(
        decode(q, kv_pages, table, lengths, plan=plan), decode(q, kv_pages, table, lengths)
    )


def test_trace_names_the_implementation(rng):
    kv_pages, table, _ = cache(rng, [3], page_size=16, max_pages=1)
    run = jax.jit(lambda *x: decode(*x, implementation="xla"))
    text = run.lower(normal(rng, (1, 1, 1, X)), kv_pages, table, np.array([3])).as_text(
        debug_info=True
    )
    assert "mla_decode.xla" in text


@pytest.mark.parametrize(
    "workload", [QUICK[2], WORKLOADS[0], IRREGULAR], ids=lambda workload: workload.name
)
def test_workloads_have_consistent_shapes(workload):
    arrays = jax.eval_shape(workload.arrays)
    lengths, capacity = workload.lengths(), arrays[2].shape[1] * workload.page_size
    assert len(lengths) == workload.B
    assert workload.T <= lengths.min() and lengths.max() <= capacity
    out = jax.eval_shape(workload.function(None), *workload.prepare(arrays, None)).out
    assert out.shape == (workload.B, workload.T, workload.N, 512)


def test_every_page_of_a_workload_belongs_to_one_request():
    """So that the cache is read once, as its count of bytes says."""
    workload = dataclasses.replace(QUICK[2], page_size=16)
    _, kv_pages, table, lengths, _ = workload.arrays()
    used = [row[: -(-length // 16)] for row, length in zip(table, lengths, strict=True)]
    assert sorted(map(int, np.concatenate(used))) == list(range(len(kv_pages)))


def arguments(**changes):
    """A call of 2 requests with 3 pages of 16 tokens each, out of 7; `changes` replace parts."""
    default = {
        "q": jnp.zeros((2, 1, 4, X)),
        "kv_pages": jnp.zeros((7, 16, X)),
        "page_table": jnp.zeros((2, 3), int),
        "lengths": np.array([48, 0]),
        "latent_dim": C,
        "scale": SCALE,
    }
    return default | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": jnp.zeros((2, 4, X))}, r"q must have rank 4, got shape \(2, 4, 24\)"),
        (
            {"q": jnp.zeros((2, 1, 4, 23))},
            r"kv_pages must have shape \(7, 16, 23\) for .*, got \(7, 16, 24\)",
        ),
        ({"q": jnp.zeros((2, 1, 4, X), int)}, r"q must have a dtype of \[.*\], got int32"),
        (
            {"kv_pages": jnp.zeros((7, 16, X), jnp.bfloat16)},
            "must have q's dtype float32, got bfloat16",
        ),
        ({"kv_pages": jnp.zeros((0, 16, X))}, "all sizes must be positive"),
        (
            {"page_table": jnp.zeros((3, 3), int)},
            r"page_table must have shape \(2, 3\).*, got \(3, 3\)",
        ),
        ({"page_table": jnp.zeros((2, 3))}, "page_table must have an integer dtype, got float32"),
        ({"lengths": np.array([1])}, r"lengths must have shape \(2,\).*, got \(1,\)"),
        ({"latent_dim": 25}, "latent_dim must be within 1 and 24, got 25"),
        ({"latent_dim": 8.0}, "latent_dim must be an integer, got 8.0"),
        ({"lengths": [5, 0]}, "lengths must be an array, got list"),
        ({"lengths": np.array([49, 0])}, "within 0 and 3 pages of 16, got 0 to 49"),
        ({"lengths": jnp.array([3, -2])}, "lengths must be within 0 .*, got -2 to 3"),
        ({"page_table": jnp.array([[0, 1, 7]] * 2)}, "must be within 0 and 6, got 0 to 7"),
        ({"page_table": np.array([[0, -1, 0]] * 2)}, "got -1 to 0"),
        (
            {"plan": mla_decode_plan(np.ones(3, int), num_rows=4, page_size=16)},
            "plan must have batch 2, got 3",
        ),
        ({"plan": mla_decode_plan(np.ones(2, int), num_rows=4)}, "must have page_size 16, got 64"),
        (
            {"plan": mla_decode_plan(np.ones(2, int), num_rows=8, page_size=16)},
            "must have num_rows 4, got 8",
        ),
    ],
)
def test_bad_input_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        unchecked(mla_decode)(**arguments(**changes))


def test_a_length_beyond_the_pages_counts_as_all_of_them_under_jit(rng):
    """Outside of jit it is refused; inside, values cannot be looked at."""
    kv_pages, table, _ = cache(rng, [160], page_size=16, max_pages=10)
    arrays = normal(rng, (1, 1, 2, X)), kv_pages, jnp.asarray(table)
    got = jax.jit(decode)(*arrays, jnp.array([1000]))
    assert_close(got.out, decode(*arrays, jnp.array([160])).out)


@pytest.mark.parametrize("dtype", ["uint8", "int8", "int16", "uint32"])
def test_lengths_of_any_integer_dtype(rng, dtype):
    """The table's 320 tokens are more than 8 bits can count; the first query sees nothing."""
    lengths = np.array([120, 1])
    kv_pages, table, _ = cache(rng, lengths, page_size=16, max_pages=20)
    arrays = normal(rng, (2, 2, 2, X)), kv_pages, jnp.asarray(table)
    got = decode(*arrays, jnp.asarray(lengths.astype(dtype)))
    chex.assert_trees_all_equal(got, decode(*arrays, lengths))


def test_missing_kernel_is_refused_with_the_reason():
    with pytest.raises(NotImplementedError, match="'mosaic_gpu' cannot run here: the dtype must"):
        mla_decode(**arguments(), implementation="mosaic_gpu")
