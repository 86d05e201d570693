"""Rules for both modes of differentiation: of a toy function, and of every op against autodiff."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from kernel_tools.aot import lower_for_cuda
from numerics import assert_close, normal

from pallas_kernels import flash_attention, grouped_matmul, hardware, merge_attention, mla_decode
from pallas_kernels.derivatives import differentiable, not_differentiable


def naive_attention(q, k, v, segment_ids, lengths, scale):
    """Causal attention by whole score matrices, which autodiff differentiates."""
    group, offset = q.shape[2] // k.shape[2], k.shape[1] - q.shape[1]
    k, v = jnp.repeat(k, group, 2), jnp.repeat(v, group, 2)
    scores = scale * jnp.einsum("BTNK,BSNK->BNTS", q, k, precision="highest")
    s = np.arange(k.shape[1])
    seen = s[None, None, :] <= offset + np.arange(q.shape[1])[None, :, None]
    seen = seen & (s[None, None, :] < lengths[:, None, None])
    seen = seen & (segment_ids[:, offset:, None] == segment_ids[:, None, :])
    lse = jax.nn.logsumexp(jnp.where(seen[:, None], scores, -1e30), -1)
    is_empty = ~seen.any(-1)[:, None]
    p = jnp.where(seen[:, None], jnp.exp(jnp.where(seen[:, None], scores - lse[..., None], 0)), 0)
    out = jnp.einsum("BNTS,BSNH->BTNH", p, v, precision="highest")
    return out, jnp.moveaxis(jnp.where(is_empty, 0, lse), 1, 2)


def attention(rng):
    """Several blocks of queries and keys, groups, segments, and rows that see nothing."""
    arrays = [normal(rng, shape) for shape in ((2, 70, 4, 8), (2, 130, 2, 8), (2, 130, 2, 12))]
    ids = np.sort(rng.integers(0, 3, (2, 130)), axis=1).astype(np.int32)
    lengths = np.array([130, 75], np.int32)

    def ours(q, k, v):
        out, lse = flash_attention(
            q, k, v, scale=0.3, segment_ids=ids, lengths=lengths, return_lse=True
        )
        return out, jnp.where(lse == -jnp.inf, 0, lse)

    want = functools.partial(naive_attention, segment_ids=ids, lengths=lengths, scale=0.3)
    return ours, want, arrays


def matmul(rng):
    """A group without rows, and rows without a group."""
    sizes = np.array([3, 0, 20, 4], np.int32)
    expert = np.repeat(np.arange(5), [*sizes, 3])
    arrays = [normal(rng, (30, 7)), normal(rng, (4, 7, 5))]

    def want(lhs, rhs):
        out = jnp.einsum("MK,MKN->MN", lhs, rhs[np.minimum(expert, 3)], precision="highest")
        return jnp.where((expert < 4)[:, None], out, 0)

    return lambda lhs, rhs: grouped_matmul(lhs, rhs, sizes), want, arrays


def decode(rng):
    """More than one chunk of pages, and a request of length 0."""
    q, kv_pages = normal(rng, (2, 2, 3, 24)), normal(rng, (8, 64, 24))
    table, lengths = np.arange(8, dtype=np.int32).reshape(2, 4), np.array([200, 0], np.int32)

    def ours(q, kv_pages):
        result = mla_decode(q, kv_pages, table, lengths, latent_dim=16, scale=0.3)
        return result.out, jnp.where(result.lse == -jnp.inf, 0, result.lse)

    def want(q, kv_pages):
        kv = kv_pages[table].reshape(2, 256, 1, 24)[:, :200]
        # The first request alone, whose last two tokens are the queries'.
        ids, ends = np.zeros((1, 200), np.int32), np.array([200], np.int32)
        out, lse = naive_attention(q[:1], kv[:1], kv[:1, ..., :16], ids, ends, 0.3)
        return (jnp.concatenate([x, jnp.zeros_like(x)]) for x in (out, lse))

    return ours, lambda *x: tuple(want(*x)), [q, kv_pages]


def merge(rng):
    arrays = [normal(rng, shape) for shape in ((5, 4), (5,), (5, 4), (5,))]

    def want(out_a, lse_a, out_b, lse_b):
        weight_a, weight_b = jnp.exp(lse_a)[:, None], jnp.exp(lse_b)[:, None]
        out = (weight_a * out_a + weight_b * out_b) / (weight_a + weight_b)
        return out, jnp.logaddexp(lse_a, lse_b)

    return merge_attention, want, arrays


OPS = {"flash_attention": attention, "grouped_matmul": matmul, "merge_attention": merge}
FORWARD_OPS = OPS | {"mla_decode": decode}


def assert_trees_close(got, want):
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert_close(g, w, "float32")


def tangents_of(rng, arrays):
    return [normal(rng, x.shape) for x in arrays]


def loss(function):
    return lambda *arrays: sum(jnp.sum(jnp.sin(x)) for x in jax.tree.leaves(function(*arrays)))


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize("op", FORWARD_OPS)
def test_forward_mode_equals_autodiff(rng, op, transform):
    ours, naive, arrays = FORWARD_OPS[op](rng)
    tangents = tangents_of(rng, arrays)
    assert_trees_close(jax.jvp(transform(ours), arrays, tangents), jax.jvp(naive, arrays, tangents))


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize("op", OPS)
def test_hessian_vector_product_equals_autodiff(rng, op, transform):
    """Forward over reverse; jit around the gradient, and around it all."""
    ours, naive, arrays = OPS[op](rng)
    every = tuple(range(len(arrays)))

    def product(function, transform=lambda f: f):
        gradient = transform(jax.grad(loss(function), every))
        return transform(lambda *tangents: jax.jvp(gradient, arrays, list(tangents))[1])

    tangents = tangents_of(rng, arrays)
    assert_trees_close(product(ours, transform)(*tangents), product(naive)(*tangents))


@pytest.mark.parametrize("op", ["flash_attention", "grouped_matmul"])
@pytest.mark.parametrize(
    "around",
    [
        jax.checkpoint,
        lambda f: (
            lambda x, *rest: jax.vmap(f, (0, *[None] * len(rest)))(jnp.stack([x, 2 * x]), *rest)
        ),
        lambda f: lambda x, *rest: jax.lax.map(lambda x: f(x, *rest), jnp.stack([x, 2 * x])),
    ],
    ids=["remat", "vmap", "scan"],
)
def test_derivatives_through_other_transformations(rng, op, around):
    ours, naive, arrays = OPS[op](rng)
    tangents, every = tangents_of(rng, arrays), tuple(range(len(arrays)))

    def derivatives(function):
        function = around(function)
        return jax.grad(loss(function), every)(*arrays), jax.jvp(function, arrays, tangents)

    assert_trees_close(jax.jit(lambda: derivatives(ours))(), derivatives(naive))


@pytest.mark.parametrize("op", ["flash_attention", "grouped_matmul"])
def test_second_derivative_in_forward_mode_equals_autodiff(rng, op):
    ours, naive, arrays = OPS[op](rng)
    tangents, others = tangents_of(rng, arrays), tangents_of(rng, arrays)

    def second(function):
        return jax.jvp(lambda *x: jax.jvp(function, list(x), tangents)[1], arrays, others)

    assert_trees_close(jax.jit(lambda: second(ours))(), second(naive))


def test_forward_mode_under_shard_map_equals_the_whole(rng):
    q, k, v = (normal(rng, shape) for shape in ((2, 40, 4, 8), (2, 40, 1, 8), (2, 40, 1, 8)))
    tangents = tangents_of(rng, (q, k, v))
    mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    query, key = P("data", None, "tensor"), P("data")
    specs = {"in_specs": (query, key, key), "out_specs": query}
    sharded = jax.shard_map(flash_attention, mesh=mesh, **specs)
    got = jax.jit(lambda: jax.jvp(sharded, (q, k, v), tuple(tangents)))()
    assert_trees_close(got, jax.jvp(flash_attention, (q, k, v), tuple(tangents)))


def test_only_the_rule_that_is_needed_is_called(rng):
    calls = []

    def note(name, result):
        calls.append(name)
        return (result,)

    square = differentiable(
        lambda power, x: note("function", x**power),
        residuals=lambda operands, _: operands,
        push_forward=lambda power, xs, dx: note("forward", power * xs[0] ** (power - 1) * dx[0]),
        pull_back=lambda power, xs, dy: note("reverse", power * xs[0] ** (power - 1) * dy[0]),
        num_differentiable=1,
    )
    x = normal(rng, (3,))
    for run, want in (
        (lambda: square(2, x)[0], x**2),
        (lambda: jax.grad(lambda x: square(2, x)[0].sum())(x), 2 * x),
        (lambda: jax.jvp(lambda x: square(2, x)[0], (x,), (jnp.ones(3),))[1], 2 * x),
    ):
        chex.assert_trees_all_close(run(), want)
    assert calls == ["function", "function", "reverse", "function", "forward"]


def test_what_has_no_derivative_says_why():
    function = not_differentiable(lambda power, x: x**power, reason="op: no derivative, use other")
    assert function(2, 3.0) == 9
    for differentiate in (jax.grad, lambda f: lambda x: jax.jvp(f, (x,), (x,))):
        with pytest.raises(NotImplementedError, match=r"^op: no derivative, use other"):
            differentiate(functools.partial(function, 2))(3.0)


def on_gpu(op, **options):
    return functools.partial(op, **options, implementation="mosaic_gpu")


SHAPES = {
    flash_attention: [jax.ShapeDtypeStruct((1, 128, 1, 64), jnp.bfloat16)] * 3,
    mla_decode: [
        jax.ShapeDtypeStruct((1, 1, 16, 192), jnp.bfloat16),
        jax.ShapeDtypeStruct((4, 64, 192), jnp.bfloat16),
    ],
}


@pytest.mark.parametrize("op", [flash_attention, mla_decode], ids=lambda op: op.__name__)
@pytest.mark.parametrize("mode", ["jvp", "hessian-vector product"])
def test_kernels_refuse_forward_mode_with_the_reason(monkeypatch, op, mode):
    monkeypatch.setattr(hardware, "missing_gpu", lambda *_: None)

    def run(*arrays):
        if op is flash_attention:
            return on_gpu(op)(*arrays)
        table, lengths = jnp.zeros((1, 4), jnp.int32), jnp.array([200])
        return on_gpu(op, latent_dim=128, scale=0.1)(*arrays, table, lengths).out

    def differentiate(*arrays):
        if mode == "jvp":
            return jax.jvp(run, arrays, arrays)
        gradient = jax.grad(lambda *x: run(*x).astype(jnp.float32).sum())
        return jax.jvp(gradient, arrays, arrays)

    with pytest.raises(NotImplementedError) as refusal:
        lower_for_cuda(differentiate, *SHAPES[op])
    message = str(refusal.value)
    assert message.startswith(f"{op.__name__}: ") and "\n" not in message
    assert "'mosaic_gpu'" in message and "use implementation='xla'" in message
