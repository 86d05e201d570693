"""Merging partial attentions: equals attention over all keys, with its gradients, and at -inf."""

import chex
import jax
import jax.numpy as jnp
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


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((2, 4), (2,), (2, 5), (2,)), r"out_b has shape \(2, 5\), out_a \(2, 4\)"),
        (((2, 4), (3,), (2, 4), (2,)), r"lse_a has shape \(3,\)"),
        (((2, 4), (2,), (2, 4), (1,)), r"lse_b has shape \(1,\)"),
    ],
)
def test_bad_shapes_are_refused(shapes, message):
    with pytest.raises(ValueError, match=message):
        unchecked(merge_attention)(*(jnp.zeros(shape) for shape in shapes))
