"""Optimizer steps of a pipeline are those of one device."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numerics import assert_close

import jax_mla
from jax_mla.training import Batch, Precision, Recipe, init_state, train_step
from jax_mla.training.pipeline import Pipeline, gpipe, join_state, pipeline_train_step, split_state
from jax_mla.training.pipeline.step import norm_and_finiteness

NUM_STEPS = 20
RECIPE = Recipe(
    num_steps=100,
    learning_rate=1e-3,
    balance_loss=0.01,
    clip_norm=0.1,
    num_micro_batches=2,
    precision=Precision(compute="float32"),
)


@pytest.fixture(scope="module")
def batches():
    """With padding, and a row of nothing else."""
    rng = np.random.default_rng(1)
    ids = np.where(np.arange(16)[None] < np.array([[16], [11], [5], [0]]), 0, -1).astype(np.int32)
    return [Batch(rng.integers(0, 256, (4, 16)).astype(np.int32), ids) for _ in range(NUM_STEPS)]


def compared(params, config, pipeline, batches, recipe=RECIPE, **options):
    """Both runs from one state, step by step; their last states."""
    state = init_state(jax.random.key(0), config, recipe=recipe, params=params)
    states = split_state(state, pipeline, recipe=recipe)
    for step, batch in enumerate(batches):
        state, want = train_step(state, config, batch, recipe=recipe)
        states, got = pipeline_train_step(states, pipeline, batch, recipe=recipe, **options)
        for name in ("loss", "z_loss", "balance_loss", "grad_norm"):
            a, b = getattr(got, name), getattr(want, name)
            np.testing.assert_allclose(a, b, rtol=1e-5 if step == 0 else 1e-4, err_msg=name)
        assert (got.num_tokens, got.learning_rate) == (want.num_tokens, want.learning_rate)
        assert not got.is_skipped
        if step == 0:
            assert want.grad_norm > recipe.clip_norm
            if want.load is not None:
                np.testing.assert_array_equal(got.load, want.load)
            first = join_state(states, pipeline, recipe=recipe)
            first_moments = jax.device_get((first, state))
    return states, state, first_moments


def moments(state):
    """Adam's first moments; after one step the gradients, clipped, times 1 - b1."""
    leaves = jax.tree_util.tree_leaves_with_path(state.opt_state)
    return {k: x for path, x in leaves if ".mu" in (k := jax.tree_util.keystr(path))}


def assert_same_steps(params, config, pipeline, batches, **options):
    states, state, (first, want_first) = compared(params, config, pipeline, batches, **options)
    joined, want = jax.device_get(
        (join_state(states, pipeline, recipe=options.get("recipe", RECIPE)), state)
    )
    assert jax.tree.structure(joined) == jax.tree.structure(want)
    got_moments, want_moments = (moments(s) for s in (first, want_first))
    assert len(want_moments) > 10
    for name, moment in want_moments.items():
        assert_close(got_moments[name], moment, "float32")
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(joined.params),
        jax.tree.leaves(want.params),
        strict=True,
    ):
        error = np.linalg.norm(a - b) / np.linalg.norm(b)
        assert error < 1e-4, (jax.tree_util.keystr(path), error)
    return states, joined


def test_twenty_steps_in_two_stages_of_two_devices(moe_config, random_params, batches):
    """Gradients of every weight, clipping by the norm of all stages, the routers' bias."""
    config = dataclasses.replace(moe_config, num_hidden_layers=2)
    pipeline, params = Pipeline(config, jax_mla.make_mesh(stage=2, data=2)), random_params(config)
    states, joined = assert_same_steps(params, config, pipeline, batches)
    before, after = (
        p["moe_layers"]["mlp"]["e_score_correction_bias"] for p in (params, joined.params)
    )
    moved = np.abs(after - before) / RECIPE.router_bias_rate
    assert moved.max() > 0.9 and np.allclose(moved, np.round(moved), atol=1e-3)
    assert [int(state.step) for state in states] == [NUM_STEPS] * 2
    # The state of the pipeline goes on as that of one device.
    state, metrics = train_step(
        jax.tree.map(jnp.asarray, joined), config, batches[0], recipe=RECIPE
    )
    assert np.isfinite(metrics.loss) and state.step == NUM_STEPS + 1


def test_the_norm_is_of_all_stages_and_a_tied_embedding_counts_once(dense_config):
    pipeline = Pipeline(dense_config, jax_mla.make_mesh(stage=3))
    three, four = jnp.full((1, 1), 3.0), jnp.full((1,), 4.0)
    for last, is_scaled, norm, is_finite in (
        (four, True, 5, True),
        (four * jnp.inf, True, np.inf, False),
        (four * jnp.inf, False, np.inf, True),
    ):
        tied = {"embed_tokens": {"weight": three}}
        gradients = (tied, {"w": three * 0}, tied | {"b": last})
        placed = [jax.device_put(g, pipeline.sharding(stage)) for stage, g in enumerate(gradients)]
        got = norm_and_finiteness(placed, pipeline, is_scaled=is_scaled)
        assert (got[0], got[1]) == (norm, is_finite)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("axes", "rules"),
    [
        ({"stage": 3, "data": 2}, jax_mla.sharding.layouts.zero1()),
        ({"stage": 2, "fsdp": 2}, jax_mla.sharding.layouts.zero3()),
        ({"stage": 2, "tensor": 2, "expert": 2}, jax_mla.sharding.layouts.tensor_parallel()),
    ],
    ids=["zero1", "zero3", "tensor-expert"],
)
def test_twenty_steps_in_other_layouts(moe_config, random_params, batches, axes, rules):
    pipeline, params = (
        Pipeline(moe_config, jax_mla.make_mesh(**axes), rules),
        random_params(moe_config),
    )
    states, _ = assert_same_steps(params, moe_config, pipeline, batches, schedule=gpipe)
    for stage, state in enumerate(states):
        placed = jax.tree.leaves(pipeline.param_shardings(stage, rules))
        for x, sharding in zip(jax.tree.leaves(state.params), placed, strict=True):
            assert x.sharding.is_equivalent_to(sharding, x.ndim)


@pytest.mark.slow
def test_a_tied_embedding_stays_one(dense_config, random_params, batches):
    pipeline, params = (
        Pipeline(dense_config, jax_mla.make_mesh(stage=3)),
        random_params(dense_config),
    )
    states, _ = assert_same_steps(params, dense_config, pipeline, batches[:5])
    first, last = (states[i].params["embed_tokens"]["weight"] for i in (0, -1))
    np.testing.assert_array_equal(first, last)


def test_narrow_weights_stay_narrow(dense_config, random_params, batches):
    """Clipped by the norm of all stages, and joined again."""
    config = dataclasses.replace(dense_config, num_hidden_layers=2)
    recipe = dataclasses.replace(RECIPE, precision=Precision("bfloat16", "float32"))
    pipeline = Pipeline(config, jax_mla.make_mesh(stage=2))
    state = init_state(jax.random.key(0), config, recipe=recipe, params=random_params(config))
    dtypes = [x.dtype for x in jax.tree.leaves(state)]
    states = split_state(state, pipeline, recipe=recipe)
    states, got = pipeline_train_step(states, pipeline, batches[0], recipe=recipe)
    joined = join_state(states, pipeline, recipe=recipe)
    assert [x.dtype for x in jax.tree.leaves(joined)] == dtypes
    assert got.grad_norm > recipe.clip_norm and got.grad_norm.dtype == "float32"
    squares = [
        np.square(x.astype(np.float64)).sum() for x in moments(jax.device_get(joined)).values()
    ]
    clipped = np.sqrt(np.sum(squares)) / (1 - recipe.b1)
    assert_close(clipped, np.array(recipe.clip_norm), "bfloat16")


@pytest.mark.slow
def test_an_overflow_in_one_stage_skips_the_step_in_all(moe_config, batches):
    recipe = dataclasses.replace(RECIPE, precision=Precision(compute="float16"))
    pipeline = Pipeline(moe_config, jax_mla.make_mesh(stage=3))
    state = init_state(jax.random.key(0), moe_config, recipe=recipe)
    state = dataclasses.replace(state, loss_scale=state.loss_scale.replace(scale=jnp.float32(2e9)))
    before = jax.device_get(state.params)
    states = split_state(state, pipeline, recipe=recipe)
    states, metrics = pipeline_train_step(states, pipeline, batches[0], recipe=recipe)
    assert metrics.is_skipped and np.isfinite(metrics.loss)
    assert (metrics.num_skipped, metrics.loss_scale) == (1, 2e9)
    joined = join_state(states, pipeline, recipe=recipe)
    jax.tree.map(np.testing.assert_array_equal, joined.params, before)
    assert [(s.step, s.num_skipped, s.loss_scale.scale) for s in states] == [(1, 1, 1e9)] * 3
    small = [s.loss_scale.replace(scale=jnp.float32(1024)) for s in states]
    states = tuple(
        dataclasses.replace(s, loss_scale=scale) for s, scale in zip(states, small, strict=True)
    )
    states, metrics = pipeline_train_step(states, pipeline, batches[0], recipe=recipe)
    assert not metrics.is_skipped and [s.step for s in states] == [2] * 3
    assert (metrics.num_skipped, metrics.loss_scale) == (1, 1024)
    state = init_state(jax.random.key(0), moe_config, recipe=RECIPE)
    _, want = train_step(state, moe_config, batches[0], recipe=RECIPE)
    assert_close(metrics.grad_norm, want.grad_norm, "bfloat16")  # the scale is divided out
