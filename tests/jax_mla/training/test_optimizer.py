"""Which weights an optimizer decays, moves, and leaves alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numerics import assert_close
from weights import random_params

from jax_mla.training import Recipe, make_optimizer
from jax_mla.training.optimizer import kinds

RECIPE = Recipe(num_steps=10, warmup_steps=0, learning_rate=0.5, weight_decay=0.2)


@pytest.fixture(scope="module")
def config(config):
    """Weights of every kind."""
    return dataclasses.replace(config, num_hidden_layers=2, first_k_dense_replace=1)


def named(tree):
    return {jax.tree_util.keystr(p): x for p, x in jax.tree_util.tree_leaves_with_path(tree)}


def updates_of(recipe, params, gradients):
    optimizer = make_optimizer(recipe)
    update = jax.jit(lambda p, g: optimizer.update(g, optimizer.init(p), p)[0])
    return jax.device_get(update(params, gradients))


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_without_gradients_only_matrices_and_tables_decay(config, name):
    config = dataclasses.replace(config, attention_bias=True)
    params = jax.tree.map(lambda x: np.asarray(x) + 1, random_params(config))
    recipe = dataclasses.replace(RECIPE, optimizer=name)
    updates = named(updates_of(recipe, params, jax.tree.map(np.zeros_like, params)))
    still = {name for name, update in updates.items() if not update.any()}
    assert still == {name for name in updates if "norm" in name or "bias" in name}
    assert len(still) == 16  # 9 norms, 3 biases in each of two blocks, the router's bias
    for name, param in named(params).items():
        if name not in still:
            assert_close(updates[name], -0.5 * 0.2 * param)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_the_routers_bias_is_fixed_and_has_no_state(params, name):
    recipe = dataclasses.replace(RECIPE, optimizer=name)
    gradients = jax.tree.map(np.ones_like, params)
    updates = named(updates_of(recipe, params, gradients))
    fixed = [name for name, update in updates.items() if not update.any()]
    assert fixed == ["['moe_layers']['mlp']['e_score_correction_bias']"]
    state = jax.eval_shape(make_optimizer(recipe).init, params)
    assert not any("e_score" in path for path in named(state))


def first_state(optimizer, gradients, params):
    """The optimizer's, after one update."""
    update = jax.jit(lambda g, p: optimizer.update(g, optimizer.init(p), p)[1])
    return jax.device_get(update(gradients, params))


def test_gradients_are_clipped_to_the_global_norm(params):
    """Adam forgets the size of a gradient, so its first moment is what shows it."""

    def first_moments(clip_norm):
        recipe = dataclasses.replace(RECIPE, clip_norm=clip_norm)
        optimizer = make_optimizer(recipe)
        gradients = jax.tree.map(np.ones_like, params)
        state = first_state(optimizer, gradients, params)
        return [x for path, x in named(state).items() if ".mu" in path]

    norm = np.sqrt(sum(x.size for x in jax.tree.leaves(params)))
    for moment in first_moments(0.25):
        assert_close(moment, np.full(moment.shape, 0.1 * 0.25 / norm), "float32")
    for moment in first_moments(None):
        assert_close(moment, np.full(moment.shape, 0.1), "float32")


def test_the_norm_that_clips_is_float32_where_gradients_are_not(params):
    """The largest leaf has a square sum of 1, so that bfloat16 would lose every other one."""
    params = jax.tree.map(lambda x: np.asarray(x).astype(jnp.bfloat16), params)
    largest = max(x.size for x in jax.tree.leaves(params))
    gradients = jax.tree.map(
        lambda x: np.full_like(x, ((1 if x.size == largest else 0.0035) / x.size) ** 0.5), params
    )
    optimizer = make_optimizer(dataclasses.replace(RECIPE, clip_norm=0.25))
    state = first_state(optimizer, gradients, params)
    moments = [np.float64(x) / 0.1 for path, x in named(state).items() if ".mu" in path]
    assert_close(np.sqrt(sum(np.square(x).sum() for x in moments)), np.array(0.25), "bfloat16")


def test_muon_makes_every_matrix_orthogonal_by_itself(params, rng):
    """All singular values of an update are near one size: each layer's, each expert's, and of a
    projection with heads over all of them."""
    recipe = dataclasses.replace(RECIPE, optimizer="muon", weight_decay=0.0)
    gradients = jax.tree.map(
        lambda x: np.float32(rng.standard_normal(x.shape) * np.linspace(1, 9, x.shape[-1])), params
    )
    updates = updates_of(recipe, params, gradients)["moe_layers"]

    def spread(matrix, columns):
        values = np.linalg.svd(np.asarray(matrix).reshape(-1, columns), compute_uv=False)
        return values.max() / values.min()

    attention, experts = updates["self_attn"], updates["mlp"]["experts"]
    assert spread(experts["up_proj"]["weight"][0, 3], 16) < 3
    assert spread(attention["o_proj"]["weight"][0], 32) < 3  # (heads, head_dim) -> embed
    assert spread(attention["k_b_proj"]["weight"][0], 16) < 3  # (heads, head_dim) <- latent
    assert spread(attention["q_b_proj"]["weight"][0], 32) < 3  # latent -> (heads, head_dim)
    gradient = gradients["moe_layers"]["self_attn"]["q_b_proj"]["weight"][0]
    assert spread(gradient, 32) > 6  # the test can fail


def test_kinds_of_weight(params):
    found = named(kinds(params))
    assert found["['embed_tokens']['weight']"] == found["['lm_head']['weight']"] == "table"
    assert found["['norm']['weight']"] == "vector"
    assert found["['moe_layers']['mlp']['gate']['weight']"] == "matrix"
    assert found["['moe_layers']['self_attn']['kv_a_layernorm']['weight']"] == "vector"
