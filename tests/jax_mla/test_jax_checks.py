"""What JAX offers to check and to ship programs: no tracer leaks, and a batch may be left open."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from numerics import assert_close

import jax_mla
from jax_mla.training import Batch, Recipe, init_state, next_token_loss, place_batch, train_step


@pytest.fixture(scope="module")
def params(config):
    return jax_mla.init(0, config)


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(0).integers(0, 256, (3, 16), np.int32)


def slow(function):
    return pytest.param(function, marks=pytest.mark.slow)


def prefill(params, config, tokens):
    cache = jax_mla.LatentCache.empty(config, tokens.shape[0], 32)
    return jax_mla.prefill(params, config, tokens, cache)


def decode(params, config, tokens):
    _, cache = prefill(params, config, tokens)
    return jax_mla.decode_step(params, config, tokens[:, 0], cache)[0]


def gradient(params, config, tokens):
    return jax.grad(lambda params: next_token_loss(params, config, tokens).loss)(params)


def step(params, config, tokens):
    recipe = Recipe(num_steps=3, remat="full")
    state = init_state(0, config, recipe=recipe, params=params)
    return train_step(state, config, place_batch(Batch(tokens), None), recipe=recipe)


@pytest.mark.parametrize("function", [jax_mla.forward, prefill, decode, gradient, slow(step)])
def test_no_tracer_is_kept(function, config, params, tokens):
    """A tracer that outlives its trace is memory that grows with every compilation."""
    jax.clear_caches()  # what is compiled already is not traced again
    with jax.checking_leaks():
        result = jax.block_until_ready(function(params, config, tokens))
    leaves = [x for x in jax.tree.leaves(result) if jnp.issubdtype(x.dtype, jnp.floating)]
    assert leaves and all(jnp.isfinite(x).all() for x in leaves)


def test_a_kept_tracer_is_found():
    kept = []
    with jax.checking_leaks(), pytest.raises(Exception, match="Leaked"):
        jax.jit(lambda x: kept.append(x) or x)(1.0)


def logits(params, config, tokens):
    return prefill(params, config, tokens)[0]


def loss(params, config, tokens):
    return next_token_loss(params, config, tokens).loss


def generated(params, config, tokens):
    return jax_mla.generate(params, config, tokens, max_new_tokens=3).tokens


@pytest.mark.parametrize(
    "function", [jax_mla.forward, logits, slow(decode), slow(loss), slow(generated)]
)
def test_an_exported_program_takes_every_batch(function, config, params, tokens):
    (batch,) = export.symbolic_shape("batch")
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    program = jax.jit(lambda params, tokens: function(params, config, tokens))
    exported = export.export(program)(shapes, jax.ShapeDtypeStruct((batch, 16), jnp.int32))
    for rows in (tokens, tokens[:1]):
        got, want = exported.call(params, rows), program(params, rows)
        if function is generated:
            np.testing.assert_array_equal(got, want)
        else:
            assert_close(got, want, "float32")
