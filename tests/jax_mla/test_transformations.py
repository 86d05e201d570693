"""Every public function under jit, vmap, scan and grad, with the config's statics and a caller's.

A list, a seed or a config that is not traced decides what is compiled, wherever the call stands.
"""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from weights import random_params

import jax_mla
from jax_mla.training import next_token_loss

BATCH, TOKENS = 2, 5
LENGTHS = np.asarray([5, 3])
SEGMENTS = np.asarray([[0, 0, 1, 1, 1], [0, 1, 1, 1, -1]])


@pytest.fixture(scope="module")
def params(config):
    return random_params(config)


@pytest.fixture(scope="module")
def tokens():
    return jnp.asarray(np.random.default_rng(0).integers(0, 256, (3, BATCH, TOKENS)), jnp.int32)


def dense_cache(config):
    return jax_mla.LatentCache.empty(config, batch=BATCH, max_tokens=64)


def paged_cache(config):
    return jax_mla.PagedLatentCache.empty(config, batch=BATCH, num_pages=4, page_size=16)


def prefill(cache_of, **options):
    def call(params, config, tokens):
        return jax_mla.prefill(params, config, tokens, cache_of(config), **options)

    return call


def decode_step(cache_of, num_new=None, **options):
    def call(params, config, tokens):
        _, cache = jax_mla.prefill(params, config, tokens, cache_of(config), lengths=LENGTHS)
        token = tokens[:, 0] if num_new is None else tokens[:, :num_new]
        return jax_mla.decode_step(params, config, token, cache, **options)

    return call


def generate(**options):
    def call(params, config, tokens):
        return jax_mla.generate(params, config, tokens, max_new_tokens=3, **options)

    return call


def sample(**options):
    def call(params, config, tokens):
        keys = jax.random.split(jax.random.key(tokens[0, 0]), BATCH)
        return jax_mla.sample(jax.nn.one_hot(tokens[:, 0], 256) * 8, keys, **options)

    return call


def of_call(function, **options):
    return lambda params, config, tokens: function(params, config, tokens, **options)


DRAWN = {"temperature": 1.0, "top_k": 9, "top_p": 0.9, "min_p": 0.01}
PACKED = {"segment_ids": SEGMENTS, "positions": np.tile(np.arange(TOKENS), (BATCH, 1))}
CALLS = {
    "init": lambda params, config, tokens: jax_mla.init(jax.random.key(tokens[0, 0]), config),
    "bind": lambda params, config, tokens: jax_mla.bind(params, config)(tokens),
    "forward": of_call(jax_mla.forward),
    "forward, packed": of_call(jax_mla.forward, **PACKED),
    "forward, form": of_call(jax_mla.forward, form="absorbed"),
    "forward_trace": of_call(jax_mla.forward_trace, **PACKED),
    "prefill": prefill(dense_cache),
    "prefill, paged": prefill(paged_cache, lengths=LENGTHS, form="absorbed"),
    "decode_step": decode_step(dense_cache),
    "decode_step, paged": decode_step(paged_cache, num_new=2, form="expanded"),
    "generate": generate(),  # stops at the config's ids
    "generate, own ids": generate(eos_token_ids=(3, 4), lengths=LENGTHS),
    "generate, one id": generate(eos_token_ids=np.int64(3), lengths=LENGTHS.tolist()),
    "generate, no ids": generate(eos_token_ids=(), lengths=jnp.asarray(LENGTHS)),
    "generate, drawn": generate(key=3, **DRAWN),
    "generate, seeds": generate(key=[1, 2], **DRAWN),
    "generate, keys": lambda params, config, tokens: generate(
        key=jax.vmap(jax.random.key)(tokens[:, 0]), temperature=1.0
    )(params, config, tokens),
    "sample": sample(),
    "sample, all options": sample(**DRAWN),
    "sample, by row": sample(top_k=np.asarray([1, 5]), top_p=jnp.asarray([1.0, 0.5])),
    "loss": of_call(next_token_loss),
    "loss, packed": of_call(next_token_loss, segment_ids=SEGMENTS, loss_mask=SEGMENTS >= 0),
}


def under(name, call):
    """The call for each of several batches of tokens, by a transformation."""
    if name == "jit":
        return lambda params, batches: [jax.jit(call)(params, tokens) for tokens in batches]
    if name == "vmap":
        return jax.vmap(call, (None, 0))
    return lambda params, batches: jax.lax.scan(
        lambda params, tokens: (params, call(params, tokens)), params, batches
    )[1]


@pytest.mark.parametrize("transformation", ["jit", "vmap", "scan"])
@pytest.mark.parametrize("name", CALLS)
def test_traces(name, transformation, params, config, tokens):
    """Results have the structure, shapes and dtypes of those outside, for each of the batches."""

    def call(params, tokens):
        return CALLS[name](params, config, tokens)

    want = jax.eval_shape(call, params, tokens[0])
    got = jax.eval_shape(under(transformation, call), params, tokens)
    if transformation == "jit":
        assert got == [want] * len(tokens)
    else:
        stack = lambda x: jax.ShapeDtypeStruct((len(tokens), *x.shape), x.dtype)  # noqa: E731
        chex.assert_trees_all_equal_shapes_and_dtypes(got, jax.tree.map(stack, want))


@pytest.mark.parametrize("name", ["forward, packed", "decode_step", "generate, seeds"])
def test_values_inside_are_those_outside(name, params, config, tokens):
    def call(params, tokens):
        return CALLS[name](params, config, tokens)

    want = [call(params, of_one) for of_one in tokens]
    inside = jax.jit(under("scan", lambda p, t: under("vmap", call)(p, t[None])))(params, tokens)
    for i, of_one in enumerate(want):
        got = jax.tree.map(lambda leaf, i=i: leaf[i, 0], inside)
        chex.assert_trees_all_close(got, of_one, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["bind", "forward, packed", "forward_trace", "prefill", "loss"])
def test_has_gradients(name, params, config, tokens):
    def total(params):
        out = CALLS[name](params, config, tokens[0])
        return sum(x.sum() for x in jax.tree.leaves(out) if jnp.issubdtype(x.dtype, jnp.floating))

    gradients = jax.eval_shape(jax.grad(total), params)
    assert jax.tree.structure(gradients) == jax.tree.structure(params)


def test_a_config_may_be_a_static_argument(params, config, tokens):
    jitted = jax.jit(jax_mla.generate, static_argnums=1, static_argnames="max_new_tokens")
    for of_config in (config, dataclasses.replace(config, eos_token_id=(7,))):
        shapes = jax.eval_shape(jitted, params, of_config, tokens[0], max_new_tokens=3)
        assert shapes.tokens.shape == (BATCH, 3)
