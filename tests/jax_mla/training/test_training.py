"""The loss, the router-bias rule, and that a few steps learn."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from numerics import assert_close
from weights import random_params

import jax_mla
from jax_mla.training import expert_load, next_token_loss, update_router_bias

CONFIG = dataclasses.replace(
    jax_mla.tiny(), num_hidden_layers=1, first_k_dense_replace=0, hidden_size=64
)


def test_loss_is_the_mean_negative_log_likelihood():
    params = random_params(dataclasses.replace(CONFIG, initializer_range=0.1))
    tokens = np.random.default_rng(0).integers(0, 256, (2, 12))
    logits = np.asarray(jax_mla.forward(params, CONFIG, tokens), np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    losses = -np.take_along_axis(log_p[:, :-1], tokens[:, 1:, None], axis=-1)[..., 0]
    got = next_token_loss(params, CONFIG, jnp.asarray(tokens))
    assert_close(got.loss, losses.mean(), "float32")
    assert got.load.shape == (1, 8) and got.load.sum() == 2 * 12 * CONFIG.num_experts_per_tok


def test_the_step_between_segments_does_not_count():
    params = random_params(dataclasses.replace(CONFIG, initializer_range=0.1))
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 256, (1, 12)))
    ids = jnp.asarray([[0] * 5 + [1] * 7])
    packed = next_token_loss(params, CONFIG, tokens, segment_ids=ids).loss
    parts = [next_token_loss(params, CONFIG, part).loss for part in (tokens[:, :5], tokens[:, 5:])]
    assert_close(packed, (4 * parts[0] + 6 * parts[1]) / 10, "float32")


def test_load_counts_tokens():
    index = jnp.asarray([[[[0, 1], [1, 2], [1, 7]]]])
    assert expert_load(index, CONFIG).tolist() == [[1, 3, 1, 0, 0, 0, 0, 1]]


def test_bias_moves_against_the_load():
    params = random_params(CONFIG)
    load = jnp.asarray([[10, 2, 6, 6, 6, 6, 6, 6]])  # mean 6
    new = update_router_bias(params, load, 0.5)
    bias = new["moe_layers"]["mlp"]["e_score_correction_bias"]
    assert bias.tolist() == [[-0.5, 0.5, 0, 0, 0, 0, 0, 0]]
    before, after = params["moe_layers"]["self_attn"], new["moe_layers"]["self_attn"]
    assert all(a is b for a, b in zip(*map(jax.tree.leaves, (before, after)), strict=True))


@pytest.mark.parametrize(
    ("without", "load", "message"),
    [
        ("moe_layers", (1, 8), "no e_score_correction_bias to update"),
        ("", (1, 7), r"load has shape \(1, 7\), the router bias \(1, 8\)"),
    ],
    ids=["dense", "shape"],
)
def test_a_bias_that_is_not_there_is_refused(without, load, message):
    params = random_params(CONFIG)
    params = {key: value for key, value in params.items() if key != without}
    with pytest.raises(ValueError, match=message):
        update_router_bias(params, jnp.zeros(load, jnp.int32), 0.5)


def test_bias_has_no_gradient():
    params = random_params(dataclasses.replace(CONFIG, initializer_range=0.1))
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 256, (1, 12)))
    gradients = jax.grad(lambda p: next_token_loss(p, CONFIG, tokens).loss)(params)
    mlp = gradients["moe_layers"]["mlp"]
    assert not mlp["e_score_correction_bias"].any() and mlp["gate"]["weight"].any()


def test_a_few_steps_learn_a_repeated_text():
    text = np.frombuffer(b"in the beginning was the word. " * 20, np.uint8)
    tokens = jnp.asarray(text[:128].reshape(2, 64).astype(np.int32))
    optimizer = optax.adam(3e-3)

    @jax.jit
    def step(params, state):
        def loss_of(params):
            result = next_token_loss(params, CONFIG, tokens)
            return result.loss, result.load

        (loss, load), gradients = jax.value_and_grad(loss_of, has_aux=True)(params)
        updates, state = optimizer.update(gradients, state)
        params = update_router_bias(optax.apply_updates(params, updates), load, 0.001)
        return params, state, loss

    params = random_params(CONFIG)
    state, losses = optimizer.init(params), []
    for _ in range(100):
        params, state, loss = step(params, state)
        losses.append(float(loss))
    assert losses[0] > 5 and losses[-1] < 1
