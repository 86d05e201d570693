"""Layers used one by one: their caches, what they are made from, and what they refuse."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from numerics import assert_close, normal

import jax_mla
from jax_mla.training import expert_load, trainable_mask, update_router_bias

D = 32


def cache_of(config, kind, num_layers=1, max_tokens=64):
    config = dataclasses.replace(config, num_hidden_layers=num_layers)
    if kind == "paged":
        return jax_mla.PagedLatentCache.empty(config, 2 * max_tokens // 8, 8, batch=2)
    return jax_mla.LatentCache.empty(config, 2, max_tokens)


def mla_steps(config, kind):
    mla = jax_mla.MLA(config, rngs=0)
    cache = cache_of(config, kind)
    return mla, cache, lambda x, cache: mla.prefill(x, cache), mla.decode


def gqa_steps(config, kind):
    gqa = jax_mla.GroupedQueryAttention(D, 4, 2, 8, rngs=0, stddev=0.3)
    return gqa, jax_mla.KeyValueCache.empty(2, 64, 2, 8), gqa.extend, gqa.extend


@pytest.mark.parametrize(
    ("steps", "kind"),
    [(mla_steps, "dense"), (mla_steps, "paged"), (gqa_steps, "dense")],
    ids=["mla", "mla_paged", "gqa"],
)
def test_a_cache_counts_what_a_layer_appended(steps, kind, config, rng):
    """Of MLA and of grouped queries alike; positions count on from there without being asked."""
    layer, cache, prefill, decode = steps(config, kind)
    x = normal(rng, (2, 9, D))
    parts = []
    for step, begin, end in ((prefill, 0, 4), (decode, 4, 5), (prefill, 5, 7), (decode, 7, 9)):
        y, cache = step(x[:, begin:end], cache)
        parts.append(y)
        assert cache.lengths.tolist() == [end, end]
    assert_close(jnp.concatenate(parts, axis=1), layer(x), "float32")


def test_a_ragged_prompt_counts_its_own_tokens(config, rng):
    mla, x = jax_mla.MLA(config, rngs=0), normal(rng, (2, 6, D))
    _, cache = mla.prefill(x[:, :5], cache_of(config, "dense"), num_new=np.asarray([5, 2]))
    assert cache.lengths.tolist() == [5, 2]
    got, cache = mla.decode(jnp.stack([x[0, 5:6], x[1, 2:3]]), cache)
    want = mla(x)
    assert_close(got[:, 0], jnp.stack([want[0, 5], want[1, 2]]), "float32")
    assert cache.lengths.tolist() == [6, 3]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, x, c: m.decode(x[:, :1], c, 2), "layer must be from 0 to 1, those of the cache"),
        (lambda m, x, c: m.prefill(x[:1], c), "the cache must hold 1 sequences"),
        (lambda m, x, c: m.prefill(x, c), "room for 64 tokens, got 65"),
        (lambda m, x, c: m.decode(x, c), "room for 64 tokens, got 65"),
    ],
    ids=["layer", "batch", "prefill", "decode"],
)
def test_a_cache_without_room_is_refused(call, message, config, rng):
    with pytest.raises(ValueError, match=message):
        call(
            jax_mla.MLA(config, rngs=0),
            normal(rng, (2, 65, D)),
            cache_of(config, "dense", num_layers=2),
        )


def layers(config):
    return {
        "MLA": jax_mla.MLA(config, rngs=0),
        "MoE": jax_mla.MoE(config, rngs=0),
        "SwiGLU": jax_mla.SwiGLU(D, 64, rngs=0),
        "GroupedQueryAttention": jax_mla.GroupedQueryAttention(D, 4, 2, 8, rngs=0),
    }


def test_wrong_widths_are_refused_by_name(config):
    with_cache = {
        "MLA": lambda mla, x: mla.decode(x, cache_of(config, "dense")),
        "MoE": lambda moe, x: moe.route(x),
        "GroupedQueryAttention": lambda gqa, x: gqa.extend(
            x, jax_mla.KeyValueCache.empty(2, 8, 2, 8)
        ),
    }
    for name, layer in layers(config).items():
        axes = "... D" if name in ("MoE", "SwiGLU") else "B T D"
        wrong = [jnp.zeros((2, 3, 31)), jnp.zeros((2, 3, D), jnp.int32)]
        wrong += [] if axes == "... D" else [jnp.zeros((3, D))]
        for x in wrong:
            message = f"x must be Float[{axes}] with D = 32, got shape {x.shape} of dtype {x.dtype}"
            for call in (lambda layer, x: layer(x), with_cache.get(name)):
                if call is not None:
                    with pytest.raises(ValueError, match=re.escape(message)):
                        call(layer, x)


def test_a_seed_is_a_key(config):
    """Of layers, of whole models and of training, as of `generate`."""
    same = (
        (jax_mla.MLA(config, rngs=3), jax_mla.MLA(config, rngs=nnx.Rngs(3))),
        (jax_mla.MoE(config, rngs=3), jax_mla.MoE(config, rngs=jax.random.key(3))),
        (jax_mla.SwiGLU(8, 8, rngs=3), jax_mla.SwiGLU(8, 8, rngs=nnx.Rngs(3))),
        (
            jax_mla.Block(config, kind="dense", rngs=3),
            jax_mla.Block(config, kind="dense", rngs=nnx.Rngs(3)),
        ),
    )
    for pair in same:
        weights = (nnx.to_pure_dict(nnx.state(layer)) for layer in pair)
        jax.tree.map(np.testing.assert_array_equal, *weights)
    gate, up = (getattr(same[2][0], name).array() for name in ("gate_proj", "up_proj"))
    assert (gate != up).any()
    params = jax_mla.init(np.int64(3), config)
    for key in (jax.random.key(3), jax.random.PRNGKey(3)):
        jax.tree.map(np.testing.assert_array_equal, params, jax_mla.init(key, config))
    logits = jnp.zeros((2, 50))
    keys = jnp.stack([jax.random.key(1), jax.random.key(2)])
    np.testing.assert_array_equal(jax_mla.sample(logits, [1, 2]), jax_mla.sample(logits, keys))


@pytest.mark.parametrize("key", [-1, 2**32, 1.5, True, "0", None])
def test_what_is_no_seed_is_refused(key, config):
    message = re.escape(f"a jax.random key or a seed from 0 to 2**32 - 1, got {key!r}")
    for make in (lambda: jax_mla.init(key, config), lambda: jax_mla.SwiGLU(8, 8, rngs=key)):
        with pytest.raises(ValueError, match=message):
            make()


def test_an_optimizer_of_a_layer_leaves_the_router_bias_alone(config, rng):
    """It is no nnx.Param; its own rule moves it, of a single layer too."""
    moe, x = jax_mla.MoE(config, rngs=0), normal(rng, (2, 8, D))
    assert "e_score_correction_bias" not in nnx.to_pure_dict(nnx.state(moe, nnx.Param))
    state = nnx.to_pure_dict(nnx.state(moe))
    load = expert_load(moe.route(x).expert_index, config)
    new = update_router_bias(state, load, 0.5)
    want = 0.5 * np.sign(load.mean() - np.asarray(load, np.float32))
    np.testing.assert_array_equal(new["e_score_correction_bias"], want)
    assert want.any() and new["experts"] is state["experts"]
    with pytest.raises(ValueError, match=r"load has shape \(3,\), the router bias \(4,\)"):
        update_router_bias(state, load[:3], 0.5)


def test_weight_decay_of_ones_own_leaves_the_router_bias_alone(config):
    params = jax_mla.init(0, config)
    bias = jnp.full_like(params["moe_layers"]["mlp"]["e_score_correction_bias"], 2.0)
    params["moe_layers"]["mlp"]["e_score_correction_bias"] = bias
    mask = trainable_mask(params)
    assert [leaf for leaf in jax.tree.leaves(mask) if not leaf] == [False]
    optimizer = optax.masked(optax.adamw(0.1, weight_decay=0.5), trainable_mask)
    gradients = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(gradients, optimizer.init(params), params)
    new = optax.apply_updates(params, updates)
    np.testing.assert_array_equal(new["moe_layers"]["mlp"]["e_score_correction_bias"], bias)
    assert (new["lm_head"]["weight"] != params["lm_head"]["weight"]).any()
