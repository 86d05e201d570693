"""Where a stage's programs leave what they give, and which of them wait for other devices."""

import dataclasses

import jax
import numpy as np
import pytest

import jax_mla
from jax_mla.training import Batch, Precision, Recipe
from jax_mla.training.pipeline import Pipeline, programs, split_params

COLLECTIVES = ("all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter")
RECIPE = Recipe(num_steps=1, precision=Precision(compute="float32"))


@pytest.fixture(scope="module")
def last_stage(moe_config, random_params):
    """The static arguments, parameters and gradients of one layer of experts on four devices,
    gradients split as in ZeRO-2 and experts over a mesh axis; and a micro-batch there."""
    config = dataclasses.replace(moe_config, num_hidden_layers=2)
    rules = dataclasses.replace(jax_mla.sharding.layouts.zero2(), expert="expert")
    pipeline = Pipeline(config, jax_mla.make_mesh(stage=2, data=2, expert=2), rules)
    _, params = split_params(random_params(config), pipeline)
    static = {"pipeline": pipeline, "stage": 1, "recipe": RECIPE}
    batch = Batch(np.random.default_rng(0).integers(0, 256, (2, 8)).astype(np.int32))
    x = np.random.default_rng(1).normal(size=(2, 8, config.hidden_size)).astype(np.float32)
    x = jax.device_put(x, pipeline.sharding(1, "batch", "sequence", None))
    batch = jax.device_put(batch, pipeline.sharding(1, "batch", "sequence"))
    return static, params, programs.no_gradients(params, **static), x, batch


def collectives(program, *args, **static):
    text = program.lower(*args, **static).compile().as_text()
    return {name for name in COLLECTIVES if name in text}


def test_only_programs_that_are_waited_for_have_collectives(last_stage):
    """On CPUs of several processes; see `exchange.settled`."""
    static, params, gradients, x, batch = last_stage
    pipeline = static["pipeline"]
    _, sums = programs.forward(params, x, batch, **static)
    even = programs.evened(sums, pipeline.config, 2)
    assert all(a.sharding.is_fully_replicated for a in jax.tree.leaves((sums, even)))
    scale = jax.device_put(np.float32(2), pipeline.sharding(1))
    for program, *args in (
        (programs.added_up, [sums, sums]),
        (programs.evened, sums, pipeline.config, 2),
        (programs.unscaled, gradients, params, scale),
    ):
        assert collectives(program, *args) == set(), program
    assert collectives(programs.no_gradients, params, **static) == set()
    assert collectives(programs.square_sum_and_finiteness, gradients) == {"all-reduce"}


def test_gradients_of_hidden_states_lie_as_these(last_stage):
    static, params, gradients, x, batch = last_stage
    placed = gradients["lm_head"]["weight"].sharding
    numbers = np.int32(14), np.int32(2), np.float32(1)
    gradients, of_x = programs.backward(params, gradients, x, batch, None, *numbers, **static)
    assert of_x.sharding.is_equivalent_to(x.sharding, 3)
    assert gradients["lm_head"]["weight"].sharding == placed
