"""Flash attention: against a slow loop, its gradients against autodiff, masks, memory, errors."""

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

from pallas_kernels import flash_attention
from pallas_kernels.flash_attention.reference import block_sizes, flash_attention_reference
from pallas_kernels.flash_attention.workloads import QUICK, WORKLOADS

MANY_BLOCKS = 1  # scores per block: the smallest, of 32 queries and 32 keys


def inputs(rng, B, T, S, N, G, K, H, dtype="float32"):
    return (
        normal(rng, (B, T, N, K), dtype),
        normal(rng, (B, S, G, K), dtype),
        normal(rng, (B, S, G, H), dtype),
    )


def in_blocks(q, k, v, *, block_scores, scale=None, **options):
    """`flash_attention` with blocks as small as a short test needs; None is the public function."""
    if block_scores is None:
        return flash_attention(q, k, v, scale=scale, **options)
    defaults = {"causal": True, "segment_ids": None, "lengths": None, "deterministic": False}
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return_lse = options.pop("return_lse", False)
    options = defaults | options | {"scale": scale, "block_scores": block_scores}
    out, lse = flash_attention_reference(q, k, v, **options)
    return (out, lse) if return_lse else out


def visible(B, T, S, causal=True, segment_ids=None, lengths=None):
    """bool "B T S", written from the docstring."""
    p, s = S - T + np.arange(T)[None, :, None], np.arange(S)[None, None, :]
    seen = np.ones((B, T, S), bool)
    if causal:
        seen &= s <= p
    if lengths is not None:
        seen &= s < np.asarray(lengths)[:, None, None]
    if segment_ids is not None:
        ids = np.asarray(segment_ids)
        seen &= ids[:, S - T :, None] == ids[:, None, :]
    return seen


def slow(q, k, v, seen, scale):
    (B, T, N, _), G = q.shape, k.shape[2]
    out, lse = np.zeros((B, T, N, v.shape[-1])), np.zeros((B, T, N))
    for b in range(B):
        for n in range(N):
            g = n // (N // G)
            head = slow_attention(q[b, :, n], k[b, :, g], v[b, :, g], seen[b], scale)
            out[b, :, n], lse[b, :, n] = head
    return out, lse


def naive(q, k, v, seen, scale):
    """The same by whole score matrices, which autodiff differentiates."""
    group = q.shape[2] // k.shape[2]
    k, v = jnp.repeat(k, group, 2), jnp.repeat(v, group, 2)
    scores = scale * jnp.einsum("BTNK,BSNK->BNTS", q, k, precision="highest")
    seen = jnp.asarray(seen)[:, None]
    lse = jax.nn.logsumexp(jnp.where(seen, scores, -1e30), -1)
    p = jnp.where(seen, jnp.exp(jnp.where(seen, scores - lse[..., None], 0)), 0)
    out = jnp.einsum("BNTS,BSNH->BTNH", p, v, precision="highest")
    return out, jnp.moveaxis(jnp.where(seen.any(-1), lse, -jnp.inf), 1, 2)


# Ids of documents: in one piece each, or spread over the sequence.
IDS = {
    "sorted": lambda rng, shape: np.sort(rng.integers(0, 3, shape), axis=1),
    "spread": lambda rng, shape: rng.choice([-(2**31), -7, 0, 900, 2**31 - 1], shape),
    "each-its-own": lambda rng, shape: np.broadcast_to(np.arange(shape[1]), shape),
}

# B, T, S, N, G, K, H, what masks, blocks
CASES = {
    "mha": (2, 40, 40, 4, 4, 24, 16, {}, None),
    "gqa-T<S-blocks": (1, 37, 101, 6, 2, 8, 12, {}, MANY_BLOCKS),
    "mqa-full": (2, 33, 70, 3, 1, 8, 8, {"causal": False}, MANY_BLOCKS),
    "full-T>S": (1, 70, 33, 2, 2, 8, 8, {"causal": False}, MANY_BLOCKS),
    "one-query": (3, 1, 50, 4, 2, 8, 8, {"lengths": True}, None),
    "lengths-full": (3, 20, 90, 2, 1, 8, 4, {"lengths": True, "causal": False}, MANY_BLOCKS),
    "all-masks": (3, 45, 80, 4, 2, 8, 6, {"segment_ids": "sorted", "lengths": True}, MANY_BLOCKS),
    "spread-ids": (2, 70, 70, 2, 1, 8, 12, {"segment_ids": "spread"}, MANY_BLOCKS),
    "spread-ids-lengths-full": (
        3, 35, 70, 2, 1, 8, 8, {"segment_ids": "spread", "lengths": True, "causal": False},
        MANY_BLOCKS,
    ),
    "each-its-own-id": (1, 40, 40, 2, 1, 4, 4, {"segment_ids": "each-its-own"}, MANY_BLOCKS),
    "one-query-ids": (2, 1, 67, 4, 1, 8, 4, {"segment_ids": "spread"}, MANY_BLOCKS),
    "one-key": (2, 1, 1, 4, 1, 8, 4, {}, None),
    "columns-of-1": (2, 33, 40, 2, 1, 1, 1, {}, MANY_BLOCKS),
}  # fmt: skip


def case(rng, name):
    """Arrays, options and the visible keys of a case; the lengths include 0 and S."""
    B, T, S, N, G, K, H, masks, block_scores = CASES[name]
    options = dict(masks)
    if options.get("lengths"):
        options["lengths"] = np.array([S, 0, min(S // 2 + 1, S)][:B])
    if options.get("segment_ids"):
        options["segment_ids"] = IDS[options["segment_ids"]](rng, (B, S))
    seen = visible(B, T, S, **options)
    return inputs(rng, B, T, S, N, G, K, H), options | {"block_scores": block_scores}, seen


@pytest.mark.parametrize("name", CASES)
def test_equals_slow_loop(rng, name):
    arrays, options, seen = case(rng, name)
    out, lse = in_blocks(*arrays, **options, scale=0.3, return_lse=True)
    want_out, want_lse = slow(*arrays, seen, 0.3)
    assert out.dtype == jnp.float32 and lse.dtype == jnp.float32
    assert_close(out, want_out)
    assert_close(lse, want_lse)


@pytest.mark.parametrize("scale", [0.0, -0.5], ids=str)
def test_scales_that_are_not_positive(rng, scale):
    """0 weighs all alike; below it the smallest score is seen most."""
    arrays = inputs(rng, 1, 33, 40, 2, 1, 4, 4)
    got = in_blocks(*arrays, scale=scale, return_lse=True, block_scores=MANY_BLOCKS)
    for one, want in zip(got, slow(*arrays, visible(1, 33, 40), scale), strict=True):
        assert_close(one, want)


def test_scores_beyond_the_range_of_float16(rng):
    """Of 1e5 and more: they and their maximum are float32."""
    q, k, v = inputs(rng, 1, 40, 40, 2, 1, 64, 8, "float16")
    q, k = 100 * q, 100 * k
    out, lse = in_blocks(q, k, v, scale=1.0, return_lse=True, block_scores=MANY_BLOCKS)
    want_out, want_lse = slow(q, k, v, visible(1, 40, 40), 1.0)
    assert np.isfinite(want_lse).all() and np.abs(want_lse).max() > 1e5
    assert_close(out, want_out)
    assert_close(lse, want_lse)


@pytest.mark.parametrize(
    "name", ["mha", "gqa-T<S-blocks", "all-masks", "spread-ids-lengths-full", "one-query-ids"]
)
def test_gradients_equal_autodiff_of_naive(rng, name):
    """Through out and through lse at once."""
    arrays, options, seen = case(rng, name)
    scale = arrays[0].shape[-1] ** -0.5
    weights = normal(rng, (*arrays[0].shape[:3], arrays[2].shape[-1]))

    def loss(attend, *arrays):
        out, lse = attend(*arrays)
        lse = jnp.where(lse == -jnp.inf, 0, lse)
        return jnp.sum(weights * out) + jnp.sum(jnp.sin(lse))

    def gradients(attend):
        return jax.jit(jax.grad(functools.partial(loss, attend), argnums=(0, 1, 2)))(*arrays)

    got = gradients(lambda *x: in_blocks(*x, **options, return_lse=True))
    want = gradients(lambda *x: naive(*x, seen, scale))
    for g, w in zip(got, want, strict=True):
        assert_close(g, w)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_is_near_float32_on_the_same_inputs(rng, dtype):
    arrays = inputs(rng, 2, 48, 80, 4, 2, 16, 16, dtype)
    out = flash_attention(*arrays)
    assert out.dtype == jnp.dtype(dtype)
    assert_close(out, flash_attention(*(x.astype(jnp.float32) for x in arrays)))


def test_bfloat16_gradients_are_near_float32_on_the_same_inputs(rng):
    arrays = inputs(rng, 2, 48, 80, 4, 2, 16, 16, "bfloat16")
    grad = jax.grad(lambda *x: jnp.sum(flash_attention(*x).astype(jnp.float32) ** 2), (0, 1, 2))
    want = grad(*(x.astype(jnp.float32) for x in arrays))
    for g, w in zip(grad(*arrays), want, strict=True):
        assert g.dtype == jnp.bfloat16
        assert_close(g, w)


def test_rows_that_see_nothing_are_zero_and_have_no_gradient(rng):
    q, k, v = inputs(rng, 2, 5, 5, 2, 2, 4, 4)
    lengths = jnp.array([0, 3])
    out, lse = flash_attention(q, k, v, lengths=lengths, return_lse=True)
    assert (out[0] == 0).all() and (lse[0] == -jnp.inf).all()
    assert jnp.isfinite(lse[1]).all()

    def loss(q, k, v):
        out, lse = flash_attention(q, k, v, lengths=lengths, return_lse=True)
        norm = jnp.sqrt(jnp.sum(out**2, -1, keepdims=True))
        # The cotangents of an empty row are NaN, and -inf for its lse.
        return jnp.sum(out / norm) + jnp.sum(lse * lse)

    for gradient in jax.grad(loss, (0, 1, 2))(q, k, v):
        assert (gradient[0] == 0).all()
        assert jnp.isfinite(gradient).all()


@pytest.mark.parametrize("value", POISONS.values(), ids=POISONS)
@pytest.mark.parametrize("block_scores", [None, MANY_BLOCKS], ids=["one-block", "blocks"])
def test_poison_past_the_lengths_changes_no_bit(rng, value, block_scores):
    q, k, v = inputs(rng, 3, 20, 80, 2, 1, 8, 8)
    lengths = np.array([80, 0, 33])
    is_unread = np.arange(80)[None] >= lengths[:, None]

    def run(k, v):
        def attend(q, k, v):
            return in_blocks(
                q, k, v, causal=False, lengths=lengths, return_lse=True, block_scores=block_scores
            )

        out, pullback = jax.vjp(attend, q, k, v)
        return out, pullback((jnp.ones_like(out[0]), jnp.ones_like(out[1])))

    poisoned = run(poison(k, is_unread, value), poison(v, is_unread, value))
    clean = run(poison(k, is_unread, 0), poison(v, is_unread, 0))
    chex.assert_trees_all_equal(poisoned, clean)
    assert all(jnp.isfinite(x).all() for x in clean[1])


@given(data=st.data())
def test_any_lengths_and_segments(data):
    B, T, S = 2, 40, 70
    lengths = np.array(data.draw(st.lists(st.integers(0, S), min_size=B, max_size=B)))
    cuts = data.draw(st.lists(st.integers(0, S), max_size=4))
    ids = np.tile(np.searchsorted(np.sort(cuts), np.arange(S), side="right"), (B, 1))
    arrays = inputs(np.random.default_rng(0), B, T, S, 2, 1, 4, 4)
    options = {"lengths": lengths, "segment_ids": ids, "return_lse": True}
    out, lse = in_blocks(*arrays, **options, block_scores=MANY_BLOCKS)
    seen = visible(B, T, S, lengths=lengths, segment_ids=ids)
    want_out, want_lse = slow(*arrays, seen, 0.5)
    assert_close(out, want_out)
    assert_close(lse, want_lse)


def test_jit_gives_what_eager_gives(rng):
    arrays = inputs(rng, 1, 16, 16, 2, 2, 8, 8)
    chex.assert_trees_all_equal(jax.jit(flash_attention)(*arrays), flash_attention(*arrays))


def test_vmap_equals_a_loop(rng):
    """The vmapped requests have loops of different lengths."""
    q, k, v = (jnp.stack([x, 2 * x]) for x in inputs(rng, 2, 40, 40, 2, 1, 8, 8))
    lengths = jnp.array([[40, 3], [0, 20]])

    def attend(q, k, v, lengths):
        return in_blocks(q, k, v, lengths=lengths, block_scores=MANY_BLOCKS)

    want = [attend(*(x[i] for x in (q, k, v, lengths))) for i in range(2)]
    assert_close(jax.vmap(attend)(q, k, v, lengths), jnp.stack(want))


def test_a_length_beyond_the_keys_counts_as_all_of_them_under_jit(rng):
    """Outside of jit it is refused; inside, values cannot be looked at."""
    q, k, v = inputs(rng, 1, 3, 33, 1, 1, 4, 4)
    attend = functools.partial(in_blocks, q, k, v, causal=False, block_scores=MANY_BLOCKS)
    got = jax.jit(lambda lengths: attend(lengths=lengths))(jnp.array([50]))
    assert_close(got, attend())


@pytest.mark.parametrize("dtype", ["uint8", "int8", "int16", "uint32"])
def test_lengths_of_any_integer_dtype(rng, dtype):
    """The 300 keys are more than 8 bits can count."""
    q, k, v = inputs(rng, 2, 3, 300, 1, 1, 4, 4)
    attend = functools.partial(flash_attention, q, k, v, causal=False)
    lengths = np.array([70, 120])
    assert_close(attend(lengths=jnp.asarray(lengths.astype(dtype))), attend(lengths=lengths))


def test_other_lengths_do_not_compile_again(rng):
    arrays = inputs(rng, 2, 8, 8, 2, 2, 4, 4)

    @jax.jit
    @chex.assert_max_traces(n=1)
    def attend(q, k, v, lengths):
        return flash_attention(q, k, v, lengths=lengths)

    for lengths in ([8, 8], [0, 3]):
        attend(*arrays, jnp.array(lengths))


def test_memory_grows_with_T_and_not_with_its_square():
    def temporary_bytes(T):
        def loss(*arrays):
            return jnp.sum(flash_attention(*arrays))

        shape = jax.ShapeDtypeStruct((1, T, 2, 64), jnp.float32)
        run = jax.jit(jax.grad(loss, (0, 1, 2))).lower(shape, shape, shape).compile()
        return run.memory_analysis().temp_size_in_bytes

    short, long = temporary_bytes(2048), temporary_bytes(4096)
    assert long < 2.1 * short
    assert long < 4096 * 4096 * 4  # not one matrix of scores, of two heads


def test_shard_map_over_batch_and_heads_equals_the_whole(rng):
    """The one key head is on every shard of the query heads: its gradient is the sum over them."""
    arrays = inputs(rng, 2, 40, 40, 4, 1, 8, 8)
    mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    query, key = P("data", None, "tensor"), P("data")
    attend = functools.partial(in_blocks, block_scores=MANY_BLOCKS)
    sharded = jax.shard_map(attend, mesh=mesh, in_specs=(query, key, key), out_specs=query)

    def run(attend):
        return jax.jit(
            jax.value_and_grad(lambda *x: jnp.sum(jnp.sin(attend(*x))), argnums=(0, 1, 2))
        )(*arrays)

    chex.assert_trees_all_close(run(sharded), run(attend), rtol=1e-4, atol=1e-5)


def test_trace_names_the_implementation(rng):
    arrays = inputs(rng, 1, 4, 4, 1, 1, 4, 4)
    run = jax.jit(lambda *x: flash_attention(*x, implementation="xla"))
    assert "flash_attention.xla" in run.lower(*arrays).as_text(debug_info=True)


def test_blocks_split_evenly():
    assert block_sizes(1, 10, 2000, block_scores=2**20) == (10, 1000)
    assert block_sizes(96, 260, 260, block_scores=2**19) == (65, 65)
    assert block_sizes(10**9, 64, 64) == (32, 32)


@pytest.mark.parametrize(
    "workload", [QUICK[1], WORKLOADS[0], WORKLOADS[-1]], ids=lambda workload: workload.name
)
def test_workloads_have_consistent_shapes(workload):
    arrays = jax.eval_shape(workload.arrays)

    def run(arrays):
        return workload.function(None)(*workload.prepare(arrays, None))

    out = jax.eval_shape(run, arrays)
    assert workload.document_lengths().sum() == workload.S
    want = arrays[:3] if workload.is_backward else arrays[3]
    assert jax.tree.map(jnp.shape, out) == jax.tree.map(jnp.shape, want)


Q, K, V = (2, 4, 4, 8), (2, 6, 2, 8), (2, 6, 2, 5)


@pytest.mark.parametrize(
    ("q", "k", "v", "options", "message"),
    [
        (Q[1:], K, V, {}, r"q must have rank 4, got shape \(4, 4, 8\)"),
        (Q, (2, 6, 2, 7), V, {}, r"k must have shape \(2, 6, 2, 8\) for .*, got \(2, 6, 2, 7\)"),
        (
            Q,
            (3, 6, 2, 8),
            (3, 6, 2, 5),
            {},
            r"must have shape \(2, 6, 2, 8\) for .*, got \(3, 6, 2, 8\)",
        ),
        (Q, (2, 6, 3, 8), (2, 6, 3, 5), {}, "multiple of the 3 key heads, got 4"),
        ((2, 7, 4, 8), K, V, {}, "causal queries must be at most the 6 keys, got 7"),
        (
            Q,
            K,
            V,
            {"segment_ids": np.zeros((2, 4), int)},
            r"segment_ids must have shape \(2, 6\).*, got \(2, 4\)",
        ),
        (
            Q,
            K,
            V,
            {"segment_ids": np.zeros((2, 6))},
            "segment_ids must have an integer dtype, got float64",
        ),
        (
            Q,
            K,
            V,
            {"segment_ids": np.array([[0, 2**32] * 3] * 2)},
            "must fit into 32 bits, got 0 to 4294967296",
        ),
        (Q, K, V, {"segment_ids": [[0] * 6] * 2}, "segment_ids must be an array, got list"),
        (Q, K, V, {"lengths": [1, 2]}, "lengths must be an array, got list"),
        (
            Q,
            K,
            V,
            {"lengths": np.array([1, 2, 3])},
            r"lengths must have shape \(2,\).*, got \(3,\)",
        ),
        (Q, K, V, {"lengths": np.array([1, 7])}, "lengths must be within 0 and 6, got 1 to 7"),
        (Q, K, V, {"lengths": np.array([-1, 6])}, "within 0 and 6, got -1 to 6"),
        ((2, 0, 4, 8), K, V, {}, "all sizes must be positive"),
    ],
)
def test_bad_input_is_refused(q, k, v, options, message):
    with pytest.raises(ValueError, match=message):
        unchecked(flash_attention)(jnp.zeros(q), jnp.zeros(k), jnp.zeros(v), **options)


def test_mixed_dtypes_are_refused():
    q, k = jnp.zeros(Q), jnp.zeros(K, jnp.bfloat16)
    with pytest.raises(ValueError, match="k must have q's dtype float32, got bfloat16"):
        flash_attention(q, k, jnp.zeros(V))


def test_missing_kernel_is_refused_with_the_reason():
    with pytest.raises(NotImplementedError, match="mosaic_gpu"):
        flash_attention(jnp.zeros(Q), jnp.zeros(K), jnp.zeros(V), implementation="mosaic_gpu")
