"""Grouped matmul: against a slow loop, gradients, empty groups, poison, errors."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from numerics import POISONS, assert_close, normal, poison, unchecked

from pallas_kernels import grouped_matmul
from pallas_kernels.grouped_matmul.reference import MAX_BLOCK, block_size, row_blocks
from pallas_kernels.grouped_matmul.workloads import QUICK, WORKLOADS

SIZES = {
    "even": [8, 8, 8, 8],
    "one-has-all": [0, 32, 0, 0],
    "last-has-all": [0, 0, 0, 32],
    "odd": [1, 0, 13, 18],
    "rows-left-over": [3, 0, 5, 7],
    "nobody": [0, 0, 0, 0],
}


def slow(lhs, rhs, group_sizes):
    out, row = np.zeros((lhs.shape[0], rhs.shape[2])), 0
    lhs, rhs = np.asarray(lhs, np.float64), np.asarray(rhs, np.float64)
    for matrix, size in zip(rhs, group_sizes, strict=True):
        for _ in range(size):
            out[row] = lhs[row] @ matrix
            row += 1
    return out


def slow_gradients(lhs, rhs, group_sizes, dout):
    dlhs = slow(dout, np.swapaxes(rhs, 1, 2), group_sizes)
    drhs, begin = np.zeros(rhs.shape), 0
    for e, size in enumerate(group_sizes):
        rows = slice(begin, begin + size)
        drhs[e] = np.asarray(lhs, np.float64)[rows].T @ np.asarray(dout, np.float64)[rows]
        begin += size
    return dlhs, drhs


@pytest.mark.parametrize("first", [0, 3, 6])
def test_groups_of_a_larger_pool(rng, first):
    """As with the pool's part alone; the rest of the pool is not read and gets gradient 0."""
    lhs, pool, dout = normal(rng, (32, 7)), normal(rng, (10, 7, 5)), normal(rng, (32, 5))
    group_sizes, part = jnp.array(SIZES["odd"]), slice(first, first + 4)
    is_own = (np.arange(10) >= first) & (np.arange(10) < first + 4)

    @jax.jit
    def run(lhs, pool, first):
        call = lambda *x: grouped_matmul(*x, group_sizes, first_group=first)  # noqa: E731
        out, pullback = jax.vjp(call, lhs, pool)
        return out, *pullback(dout)

    out, dlhs, dpool = run(lhs, poison(pool, ~is_own), first)
    want, pullback = jax.vjp(lambda *x: grouped_matmul(*x, group_sizes), lhs, pool[part])
    want_dlhs, want_drhs = pullback(dout)
    chex.assert_trees_all_equal((out, dlhs, dpool[part]), (want, want_dlhs, want_drhs))
    assert not dpool[~is_own].any()


def test_a_pool_too_small_is_refused(rng):
    with pytest.raises(ValueError, match="within 0 and 6 for 4 groups of 10 matrices, got 7"):
        sizes = jnp.array(SIZES["odd"])
        grouped_matmul(normal(rng, (32, 7)), normal(rng, (10, 7, 5)), sizes, first_group=7)


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_equals_slow_loop_with_its_gradients(rng, sizes):
    lhs, rhs, dout = normal(rng, (32, 7)), normal(rng, (4, 7, 5)), normal(rng, (32, 5))
    group_sizes = jnp.array(sizes)
    out, pullback = jax.vjp(lambda *x: grouped_matmul(*x, group_sizes), lhs, rhs)
    dlhs, drhs = pullback(dout)
    assert_close(out, slow(lhs, rhs, sizes))
    want_dlhs, want_drhs = slow_gradients(lhs, rhs, sizes, dout)
    assert_close(dlhs, want_dlhs)
    assert_close(drhs, want_drhs)
    for e, size in enumerate(sizes):
        assert size > 0 or (drhs[e] == 0).all()
    assert (out[sum(sizes) :] == 0).all() and (dlhs[sum(sizes) :] == 0).all()


@pytest.mark.parametrize("M", [1, 5, 700], ids="M={}".format)
def test_any_number_of_rows(rng, M):
    """One row, fewer rows than groups, and blocks of the largest size with tails."""
    lhs, rhs, dout = normal(rng, (M, 6)), normal(rng, (2, 6, 4)), normal(rng, (M, 4))
    sizes = [M - M // 3, M // 3]
    out, pullback = jax.vjp(lambda *x: grouped_matmul(*x, jnp.array(sizes)), lhs, rhs)
    assert_close(out, slow(lhs, rhs, sizes))
    for got, want in zip(pullback(dout), slow_gradients(lhs, rhs, sizes, dout), strict=True):
        assert_close(got, want)


def test_no_rows_at_all():
    out = grouped_matmul(jnp.zeros((0, 3)), jnp.ones((2, 3, 4)), jnp.zeros(2, int))
    assert out.shape == (0, 4)


@given(sizes=st.lists(st.integers(0, 9), min_size=4, max_size=4))
def test_any_group_sizes(sizes):
    rng = np.random.default_rng(0)
    lhs, rhs = normal(rng, (36, 3)), normal(rng, (4, 3, 2))
    assert_close(grouped_matmul(lhs, rhs, jnp.array(sizes)), slow(lhs, rhs, sizes))


@pytest.mark.parametrize("value", POISONS.values(), ids=POISONS)
def test_poison_past_the_last_group_changes_no_bit(rng, value):
    lhs, rhs, dout = normal(rng, (32, 7)), normal(rng, (4, 7, 5)), normal(rng, (32, 5))
    is_unread = np.arange(32) >= 15

    def run(value):
        arrays = poison(lhs, is_unread, value), rhs
        out, pullback = jax.vjp(lambda *x: grouped_matmul(*x, jnp.array([3, 0, 5, 7])), *arrays)
        return out, pullback(poison(dout, is_unread, value))

    poisoned, clean = run(value), run(0)
    chex.assert_trees_all_equal(poisoned, clean)
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(clean))


def test_bfloat16_is_near_float32_on_the_same_inputs(rng):
    lhs, rhs = normal(rng, (32, 64), "bfloat16"), normal(rng, (4, 64, 16), "bfloat16")
    dout, group_sizes = normal(rng, (32, 16)), jnp.array([1, 0, 13, 18])

    def run(lhs, rhs):
        out, pullback = jax.vjp(lambda *x: grouped_matmul(*x, group_sizes), lhs, rhs)
        return out, *pullback(dout.astype(out.dtype))

    want = run(lhs.astype(jnp.float32), rhs.astype(jnp.float32))
    for g, w in zip(run(lhs, rhs), want, strict=True):
        assert g.dtype == jnp.bfloat16
        assert_close(g, w)


def test_preferred_element_type_keeps_the_float32_sums(rng):
    lhs, rhs = normal(rng, (8, 64), "bfloat16"), normal(rng, (2, 64, 16), "bfloat16")
    out = grouped_matmul(lhs, rhs, jnp.array([3, 5]), preferred_element_type=jnp.float32)
    assert out.dtype == jnp.float32
    assert_close(out, slow(lhs, rhs, [3, 5]))


@given(sizes=st.lists(st.integers(0, 600), min_size=5, max_size=5))
def test_blocks_cut_the_rows_of_every_group_and_are_few(sizes):
    """The number of blocks, which is the work, does not grow as M * E."""
    M, E = 3000, len(sizes)
    size = block_size(M, E)
    count, expert, begin, end = map(np.asarray, row_blocks(M, size, jnp.array(sizes)))
    assert size == MAX_BLOCK
    assert count <= M // size + E == len(expert)
    rows = [
        (e, row)
        for e, first, last in zip(expert[:count], begin, end, strict=False)
        for row in range(first, min(first + size, last))
    ]
    assert rows == list(zip(np.repeat(np.arange(E), sizes), range(sum(sizes)), strict=True))


@pytest.mark.parametrize(
    ("M", "E", "size"), [(0, 4, 1), (4, 16, 1), (32, 16, 2), (33, 16, 2), (1000, 8, 128)]
)
def test_block_is_near_the_average_group(M, E, size):
    assert block_size(M, E) == size


def test_vmap_equals_a_loop(rng):
    lhs, rhs = normal(rng, (2, 12, 3)), normal(rng, (2, 3, 3, 2))
    sizes = jnp.array([[4, 0, 8], [1, 2, 3]])
    got = jax.vmap(grouped_matmul)(lhs, rhs, sizes)
    want = [grouped_matmul(*x) for x in zip(lhs, rhs, sizes, strict=True)]
    chex.assert_trees_all_close(got, jnp.stack(want), rtol=1e-6)


def test_shard_map_sums_the_gradient_of_replicated_matrices(rng):
    lhs, rhs, sizes = (
        normal(rng, (24, 3)),
        normal(rng, (3, 3, 2)),
        jnp.array([[4, 0, 8], [1, 9, 2]]),
    )
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    sharded = jax.shard_map(
        lambda lhs, rhs, sizes: grouped_matmul(lhs, rhs, sizes[0]),
        mesh=mesh,
        in_specs=(P("data"), P(), P("data")),
        out_specs=P("data"),
    )

    def whole(lhs, rhs, sizes):
        parts = [grouped_matmul(lhs[12 * i :][:12], rhs, sizes[i]) for i in range(2)]
        return jnp.concatenate(parts)

    def run(multiply):
        loss = jax.value_and_grad(lambda *x: jnp.sum(jnp.sin(multiply(*x, sizes))), (0, 1))
        return jax.jit(loss)(lhs, rhs)

    chex.assert_trees_all_close(run(sharded), run(whole), rtol=1e-5, atol=1e-6)


def test_other_group_sizes_do_not_compile_again(rng):
    @jax.jit
    @chex.assert_max_traces(n=1)
    def multiply(lhs, rhs, sizes):
        return grouped_matmul(lhs, rhs, sizes)

    lhs, rhs = normal(rng, (12, 3)), normal(rng, (3, 3, 2))
    for sizes in ([4, 0, 8], [0, 0, 0]):
        multiply(lhs, rhs, jnp.array(sizes))


def test_trace_names_the_implementation():
    run = jax.jit(lambda *x: grouped_matmul(*x, implementation="xla"))
    text = run.lower(jnp.ones((4, 3)), jnp.ones((2, 3, 2)), np.array([1, 3])).as_text(
        debug_info=True
    )
    assert "grouped_matmul.xla" in text


@pytest.mark.parametrize("workload", [QUICK[3], WORKLOADS[0]], ids=lambda workload: workload.name)
def test_workloads_have_consistent_shapes(workload):
    arrays = jax.eval_shape(workload.arrays)
    assert workload.group_sizes().sum() == workload.M
    out = jax.eval_shape(workload.function(None), *workload.prepare(arrays, None))
    want = arrays[:2] if workload.is_backward else arrays[3]
    assert jax.tree.map(jnp.shape, out) == jax.tree.map(jnp.shape, want)


@pytest.mark.parametrize(
    ("lhs", "rhs", "group_sizes", "message"),
    [
        ((8,), (2, 3, 4), [4, 4], r"lhs must have rank 2, got shape \(8,\)"),
        ((8, 3), (2, 5, 4), [4, 4], r"rhs must have shape \(2, 3, 4\) for .*, got \(2, 5, 4\)"),
        ((8, 3), (2, 3, 4), [4, 4, 0], r"group_sizes must have shape \(2,\) for .*, got \(3,\)"),
        (
            (8, 3),
            (2, 3, 4),
            [5, 4],
            "at most the 8 rows of lhs, got 4 as the smallest and 9 as the sum",
        ),
        ((8, 3), (2, 3, 4), [-1, 4], "got -1 as the smallest and 3 as the sum"),
        ((8, 3), (2, 3, 4), [0.5, 4], "group_sizes must have an integer dtype, got float64"),
        ((8, 3), (2, 3, 0), [4, 4], r"all sizes must be positive, got rhs \(2, 3, 0\)"),
    ],
)
def test_bad_input_is_refused(lhs, rhs, group_sizes, message):
    with pytest.raises(ValueError, match=message):
        unchecked(grouped_matmul)(jnp.zeros(lhs), jnp.zeros(rhs), np.array(group_sizes))


def test_missing_kernel_is_refused_with_the_reason():
    with pytest.raises(NotImplementedError, match="no mosaic_gpu kernel for grouped_matmul yet"):
        arrays = jnp.zeros((8, 3)), jnp.zeros((2, 3, 4)), np.array([4, 4])
        grouped_matmul(*arrays, implementation="mosaic_gpu")
