"""Merging partial attentions: equals attention over all keys, with its gradients, and at -inf."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numerics import assert_close, normal, unchecked

from pallas_kernels import flash_attention, merge_attention


def test_merge_of_two_halves_is_the_whole_with_its_gradients(rng):
    q, k, v = normal(rng, (2, 6, 4, 8)), normal(rng, (2, 20, 2, 8)), normal(rng, (2, 20, 2, 8))
    lengths = jnp.array([13, 5])  # the second request has nothing in its second half
    weights = normal(rng, (2, 6, 4))

    def loss(attend):
        def run(q, k, v):
            out, lse = attend(q, k, v)
            return jnp.sum(jnp.sin(out)) + jnp.sum(weights * lse)

        return jax.jit(jax.value_and_grad(run, (0, 1, 2)))(q, k, v)

    def whole(q, k, v):
        return flash_attention(q, k, v, causal=False, lengths=lengths, return_lse=True)

    def merged(q, k, v):
        parts = []
        for begin, end in ((0, 12), (12, 20)):
            inside = jnp.clip(lengths - begin, 0, end - begin)
            half = (q, k[:, begin:end], v[:, begin:end])
            parts += flash_attention(*half, causal=False, lengths=inside, return_lse=True)
        return merge_attention(*parts)

    chex.assert_trees_all_close(loss(merged), loss(whole), rtol=2e-5, atol=2e-6)


def test_both_empty_gives_zero_and_no_nan_in_gradients(rng):
    out, lse = normal(rng, (3, 4)), jnp.array([-jnp.inf, 0.5, -jnp.inf])
    other, other_lse = normal(rng, (3, 4)), jnp.array([-jnp.inf, -jnp.inf, 1.5])
    merged, merged_lse = merge_attention(out, lse, other, other_lse)
    assert (merged[0] == 0).all() and merged_lse[0] == -jnp.inf
    chex.assert_trees_all_equal(merged[1:], jnp.stack([out[1], other[2]]))
    chex.assert_trees_all_equal(merged_lse[1:], jnp.array([0.5, 1.5]))

    def loss(*arrays):
        merged, merged_lse = merge_attention(*arrays)
        return jnp.sum(merged) + jnp.sum(jnp.where(jnp.isfinite(merged_lse), merged_lse, 0))

    gradients = jax.jit(jax.grad(loss, (0, 1, 2, 3)))(out, lse, other, other_lse)
    assert all(jnp.isfinite(g).all() for g in gradients)
    chex.assert_trees_all_close(gradients[1], jnp.array([0.0, 1.0, 0.0]), atol=1e-6)


SIDES = {
    "neither": (1.3, -0.2),
    "the first": (-jnp.inf, 0.4),
    "the second": (0.4, -jnp.inf),
    "both": (-jnp.inf, -jnp.inf),
}


def shares_of(lse_a, lse_b):
    """Of the two sides of a row, in float64; 0 where both are empty."""
    weights = np.exp(np.array([lse_a, lse_b], np.float64))
    return weights / weights.sum() if weights.any() else np.zeros(2)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("empty", SIDES)
def test_gradients_of_a_row(rng, empty, dtype):
    """d out = p_a d out_a + p_b d out_b, d lse / d lse_a = p_a; of what is empty they are 0."""
    lse = jnp.asarray(SIDES[empty], jnp.float32)[:, None]
    out = normal(rng, (2, 1, 5), dtype)
    dout, dlse = normal(rng, (1, 5), dtype), normal(rng, (1,))
    if empty == "both":  # as division by the sum, or its log, would make them
        dout, dlse = jnp.full_like(dout, jnp.nan), jnp.full_like(dlse, -jnp.inf)
    _, pullback = jax.vjp(merge_attention, out[0], lse[0], out[1], lse[1])
    da, dlse_a, db, dlse_b = pullback((dout, dlse))
    assert da.dtype == db.dtype == dtype and dlse_a.dtype == dlse_b.dtype == jnp.float32
    share = shares_of(*SIDES[empty])
    outs = np.asarray(out, np.float64)
    dout, dlse = np.asarray(dout, np.float64), np.asarray(dlse, np.float64)
    merged = np.einsum("S,SBH->BH", share, outs)
    for i, (got, got_lse) in enumerate(((da, dlse_a), (db, dlse_b))):
        if share[i] == 0:
            assert (got == 0).all() and (got_lse == 0).all()
        else:
            assert_close(got, share[i] * dout)
            assert_close(got_lse, share[i] * (np.sum(dout * (outs[i] - merged), -1) + dlse), dtype)


def test_merging_in_any_order_is_the_same(rng):
    """Five parts one by one, from the other end, and in pairs; a row is empty in most of them."""
    out, lse = normal(rng, (5, 7, 4)), 20 * normal(rng, (5, 7))
    lse = lse.at[1:, 3].set(-jnp.inf).at[:, 4].set(-jnp.inf)
    parts = list(zip(out, lse, strict=True))

    def merge(a, b):
        return merge_attention(*a, *b)

    want = functools.reduce(merge, parts)
    pairs = merge(merge(parts[1], parts[3]), merge(parts[4], merge(parts[0], parts[2])))
    for got in (functools.reduce(merge, parts[::-1]), pairs):
        assert_close(got[0], want[0])
        assert_close(got[1], want[1])
    assert (want[0][4] == 0).all() and want[1][4] == -jnp.inf
    weights = np.exp(np.asarray(lse, np.float64))
    total = weights.sum(0)
    shares = weights / np.where(total == 0, 1, total)
    assert_close(want[0], np.einsum("PB,PBH->BH", shares, np.asarray(out, np.float64)))


def test_out_of_an_empty_side_is_not_looked_at(rng):
    out, empty = normal(rng, (2, 4)), jnp.full((2, 4), jnp.nan)
    lse, empty_lse = jnp.zeros(2), jnp.full(2, -jnp.inf)
    for arguments in ((out, lse, empty, empty_lse), (empty, empty_lse, out, lse)):
        merged, merged_lse = merge_attention(*arguments)
        chex.assert_trees_all_equal((merged, merged_lse), (out, lse))


def test_far_apart_weights_do_not_overflow(rng):
    out, other = normal(rng, (2, 4)), normal(rng, (2, 4))
    lse, other_lse = jnp.array([1e4, -1e4]), jnp.array([-1e4, 1e4])
    merged, merged_lse = merge_attention(out, lse, other, other_lse)
    chex.assert_trees_all_equal(merged, jnp.stack([out[0], other[1]]))
    chex.assert_trees_all_equal(merged_lse, jnp.array([1e4, 1e4]))


def test_result_has_the_dtype_of_out(rng):
    out, lse = normal(rng, (5, 4), "bfloat16"), normal(rng, (5,))
    merged, merged_lse = merge_attention(out, lse, out, lse)
    assert (merged.dtype, merged_lse.dtype) == (jnp.bfloat16, jnp.float32)
    assert_close(merged, out)
    assert_close(merged_lse, lse + jnp.log(2.0))


def test_lse_of_another_dtype_is_refused():
    """In bfloat16 an lse of 10 may be off by 0.03, and the weight of its side by 3 %."""
    out, lse = jnp.zeros((2, 4)), jnp.zeros(2)
    for arguments in (
        (out, lse.astype(jnp.bfloat16), out, lse),
        (out, lse, out, jnp.zeros(2, int)),
    ):
        with pytest.raises(
            ValueError, match=r"lse_[ab] must have dtype float32, got (bfloat16|int32)"
        ):
            unchecked(merge_attention)(*arguments)


def test_out_may_be_wider_on_one_side(rng):
    """As where a float32 sum of many parts meets the next part."""
    out, lse = normal(rng, (2, 5, 4)), normal(rng, (2, 5))
    got, _ = merge_attention(out[0], lse[0], out[1].astype(jnp.bfloat16), lse[1])
    want, _ = merge_attention(out[0], lse[0], out[1].astype(jnp.bfloat16).astype("float32"), lse[1])
    chex.assert_trees_all_equal(got, want)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (
            ((2, 4), (2,), (2, 5), (2,)),
            r"out_b must have shape \(2, 4\) for out_a \(2, 4\), got \(2, 5\)",
        ),
        (((2, 4), (3,), (2, 4), (2,)), r"lse_a must have shape \(2,\).*, got \(3,\)"),
        (((2, 4), (2,), (2, 4), (1,)), r"lse_b must have shape \(2,\).*, got \(1,\)"),
    ],
)
def test_bad_shapes_are_refused(shapes, message):
    with pytest.raises(ValueError, match=message):
        unchecked(merge_attention)(*(jnp.zeros(shape) for shape in shapes))
