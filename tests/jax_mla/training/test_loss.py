"""The chunked loss: the same number as from all logits, and never all logits."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.extend.core import ClosedJaxpr, Jaxpr
from numerics import assert_close
from weights import random_params

import jax_mla
from jax_mla.layers.moe.router import Routing
from jax_mla.training import Precision, next_token_loss, sequence_balance


def losses_from_all_logits(params, config, tokens, segment_ids=None):
    """-log p of every next token, and log(sum(exp(logits))), both [B, T - 1]."""
    logits = jax_mla.forward(params, config, tokens, segment_ids=segment_ids)[:, :-1]
    nll = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.asarray(tokens)[:, 1:])
    return nll, jax.nn.logsumexp(logits, axis=-1)


def assert_trees_close(got, want, dtype=None):
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True
    ):
        try:
            assert_close(a, b, dtype)
        except AssertionError as error:
            raise AssertionError(f"{jax.tree_util.keystr(path)}: {error}") from None


@pytest.fixture(scope="module")
def wanted(params, config, tokens):
    """Loss plus half the z-loss, and its gradient, from all logits."""

    def whole(params):
        nll, lse = losses_from_all_logits(params, config, tokens)
        return nll.mean() + 0.5 * jnp.square(lse).mean()

    return jax.jit(jax.value_and_grad(whole))(params)


@pytest.mark.parametrize("chunk_tokens", [1, 12, 24, 1000], ids="chunk{}".format)
def test_chunks_change_neither_loss_nor_gradient(params, config, tokens, wanted, chunk_tokens):
    """Of 14 positions in 4 rows: one, three and five positions a chunk, and all of them."""

    def chunked(params):
        result = next_token_loss(params, config, jnp.asarray(tokens), chunk_tokens=chunk_tokens)
        return result.loss + 0.5 * result.z_loss

    loss, gradients = jax.jit(jax.value_and_grad(chunked))(params)
    assert_close(loss, wanted[0])
    assert_trees_close(gradients, wanted[1])


def shapes_in(jaxpr):
    """The shape of every intermediate of a program, also of the programs inside it."""
    for equation in jaxpr.eqns:
        yield from (var.aval.shape for var in equation.outvars)
        for inner in jax.tree.leaves(
            equation.params, is_leaf=lambda x: isinstance(x, ClosedJaxpr | Jaxpr)
        ):
            if isinstance(inner, ClosedJaxpr):
                yield from shapes_in(inner.jaxpr)
            elif isinstance(inner, Jaxpr):
                yield from shapes_in(inner)


def largest_with_vocabulary(loss, params, config):
    """Numbers in the largest array with an axis V, of a loss and its gradient; not the weights."""
    tables = {(config.vocab_size, config.hidden_size), (config.hidden_size, config.vocab_size)}
    shapes = shapes_in(jax.make_jaxpr(jax.value_and_grad(loss))(params).jaxpr)
    sizes = [math.prod(s) for s in shapes if config.vocab_size in s and s not in tables]
    return max(sizes)


@pytest.mark.parametrize(
    ("chunk_tokens", "most"), [(1, 4), (6, 4), (9, 8), (24, 20), (1000, 56)], ids=str
)
def test_a_chunk_has_a_position_of_every_row_and_no_more_tokens(params, config, chunk_tokens, most):
    """Of 14 positions in 4 rows, which are not cut into chunks that are larger than the others."""

    def loss(params):
        tokens = jnp.zeros((4, 14), jnp.int32)
        return next_token_loss(params, config, tokens, chunk_tokens=chunk_tokens).loss

    assert largest_with_vocabulary(loss, params, config) == most * config.vocab_size


def test_all_logits_never_exist(config):
    config = dataclasses.replace(config, vocab_size=3001, first_k_dense_replace=1)
    params = random_params(config)
    tokens = jnp.zeros((4, 64), jnp.int32)

    def chunked(params):
        return next_token_loss(params, config, tokens, chunk_tokens=16).loss

    def whole(params):
        return losses_from_all_logits(params, config, tokens)[0].mean()

    assert largest_with_vocabulary(chunked, params, config) == 16 * 3001
    assert largest_with_vocabulary(whole, params, config) >= 4 * 63 * 3001  # the test can fail

    def temporary_bytes(loss):
        compiled = jax.jit(jax.grad(loss)).lower(params).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary_bytes(whole) > 4 * 63 * 3001 * 4 > temporary_bytes(chunked)


def test_prompts_are_read_and_not_counted(params, config, tokens):
    mask = np.arange(14)[None, :] >= np.array([3, 14, 1, 0])[:, None]  # row 1 is prompt only
    nll, _ = losses_from_all_logits(params, config, tokens)
    got = next_token_loss(params, config, jnp.asarray(tokens), loss_mask=jnp.asarray(mask))
    assert got.num_tokens == mask[:, 1:].sum() == 11 + 0 + 13 + 13
    assert_close(got.loss, np.asarray(nll)[mask[:, 1:]].mean(), "float32")


def test_masks_and_segments_combine(params, config, tokens):
    mask, ids = jnp.asarray(tokens % 3 == 0), jnp.asarray(np.arange(14)[None] // 5 + 0 * tokens)
    nll, _ = losses_from_all_logits(params, config, tokens, segment_ids=ids)
    is_counted = mask[:, 1:] & (ids[:, 1:] == ids[:, :-1])
    got = next_token_loss(params, config, jnp.asarray(tokens), segment_ids=ids, loss_mask=mask)
    assert got.num_tokens == is_counted.sum()
    assert_close(got.loss, nll.mean(where=is_counted))


def test_nothing_to_count_is_no_loss_and_no_gradient(params, config, tokens):
    mask = jnp.zeros(tokens.shape, bool)

    def loss(params):
        return next_token_loss(params, config, jnp.asarray(tokens), loss_mask=mask).loss

    value, gradients = jax.device_get(jax.jit(jax.value_and_grad(loss))(params))
    assert value == 0 and not any(g.any() for g in jax.tree.leaves(gradients))


def random_routing(rng, shape=(3, 10), experts=8, active=2):
    scores = rng.uniform(0.1, 1, (*shape, experts)).astype(np.float32)
    index = np.argsort(-scores, axis=-1)[..., :active]
    weight = np.take_along_axis(scores, index, -1)
    return Routing(jnp.asarray(index), jnp.asarray(weight), jnp.asarray(scores))


def test_balance_is_the_papers_formula(rng):
    """DeepSeek-V3, equations 17 to 20, one expert and one token at a time."""
    routing = random_routing(rng)
    scores, index = np.asarray(routing.scores, np.float64), np.asarray(routing.expert_index)
    want = np.zeros(3)
    for row in range(3):
        for expert in range(8):
            f = sum(8 / (2 * 10) for t in range(10) if expert in index[row, t])
            p = np.mean([scores[row, t, expert] / scores[row, t].sum() for t in range(10)])
            want[row] += f * p
    assert_close(sequence_balance(routing), want, "float32")


def test_balance_is_1_when_even_and_more_when_all_go_to_one_pair():
    even = jnp.stack([jnp.arange(8) % 8, (jnp.arange(8) + 1) % 8], axis=-1)[None]
    scores = jnp.full((1, 8, 8), 0.5)
    assert_close(sequence_balance(Routing(even, even, scores)), np.ones(1), "float32")
    pair = jnp.broadcast_to(jnp.arange(2)[None, None], (1, 8, 2))
    on_pair = jnp.where(jnp.arange(8)[None, None] < 2, 0.9, 0.01) + jnp.zeros((1, 8, 8))
    assert sequence_balance(Routing(pair, pair, on_pair))[0] > 3.5


def test_balance_loss_reaches_the_router_alone_through_scores(params, config, tokens):
    def balance(params):
        return next_token_loss(params, config, jnp.asarray(tokens)).balance_loss

    value, gradients = jax.device_get(jax.jit(jax.value_and_grad(balance))(params))
    mlp = gradients["moe_layers"]["mlp"]
    assert value > 1 and mlp["gate"]["weight"].any() and not mlp["e_score_correction_bias"].any()
    assert not any(g.any() for g in jax.tree.leaves(mlp["experts"]))


def test_remat_changes_what_is_saved_and_not_the_gradient(params, config, tokens):
    def loss(params, remat):
        result = next_token_loss(params, config, jnp.asarray(tokens), remat=remat)
        return result.loss + result.balance_loss

    def saved_bytes(remat):
        backward = jax.eval_shape(lambda p: jax.vjp(lambda p: loss(p, remat), p)[1], params)
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(backward))

    assert saved_bytes("none") > saved_bytes("dots") > saved_bytes("full")
    none, *others = (
        jax.jit(jax.grad(functools.partial(loss, remat=remat)))(params)
        for remat in ("none", "dots", "full")
    )
    for gradients in others:
        assert_trees_close(gradients, none)


def test_bfloat16_rounds_the_loss_and_keeps_float32_gradients(params, config, tokens):
    def loss(params):
        return next_token_loss(params, config, jnp.asarray(tokens), precision=Precision()).loss

    half, gradients = jax.jit(jax.value_and_grad(loss))(params)
    whole = losses_from_all_logits(params, config, tokens)[0].mean()
    assert_close(half, whole, "bfloat16")
    assert half != whole
    assert {g.dtype.name for g in jax.tree.leaves(gradients)} == {"float32"}


@pytest.mark.parametrize(
    ("axis", "shape", "message"),
    [
        (
            "data",
            (6, 8),
            r"axis 'batch' .* \(6, 8\) cannot be split over 4 devices of mesh axis 'data'",
        ),
        (
            "sequence",
            (4, 12),
            r"\(4, 12\) cannot be split in 8 stripes over 4 devices of mesh axis 'sequence'",
        ),
    ],
    ids=["rows", "stripes"],
)
def test_what_a_mesh_does_not_divide_is_refused(params, config, axis, shape, message):
    layout = jax_mla.sharding.layouts.context_parallel()
    shardings = jax_mla.param_shardings(config, jax_mla.make_mesh(**{axis: 4}), layout)
    placed = jax.device_put(params, shardings)
    with pytest.raises(ValueError, match=message):
        next_token_loss(placed, config, np.zeros(shape, np.int32), rules=layout)


def test_what_cannot_be_is_refused(params, config):
    tokens = jnp.zeros((2, 4), jnp.int32)
    with pytest.raises(ValueError, match=r"at least 2 per row for a loss, got shape \(4, 1\)"):
        next_token_loss(params, config, jnp.zeros((4, 1), jnp.int32))
    with pytest.raises(
        ValueError, match=r"loss_mask must have the shape of tokens, \(2, 4\), got \(2, 3\)"
    ):
        next_token_loss(params, config, tokens, loss_mask=jnp.ones((2, 3), bool))
    with pytest.raises(ValueError, match="loss_mask must be bool, got dtype float32"):
        next_token_loss(params, config, tokens, loss_mask=jnp.ones((2, 4)))
    with pytest.raises(ValueError, match="segment_ids must be integers, got dtype float32"):
        next_token_loss(params, config, tokens, segment_ids=jnp.ones((2, 4)))
    with pytest.raises(ValueError, match="chunk_tokens must be at least 1, got 0"):
        next_token_loss(params, config, tokens, chunk_tokens=0)
    with pytest.raises(ValueError, match="remat must be one of none, full, dots, got 'some'"):
        next_token_loss(params, config, tokens, remat="some")
    with pytest.raises(ValueError, match=r"compute must be one of .*, got 'float8'"):
        Precision(compute="float8")
    with pytest.raises(ValueError, match=r"param 'float16' cannot hold.*take param 'float32'"):
        Precision(param="float16", compute="float16")
