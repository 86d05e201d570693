"""The same steps on meshes: equal numbers, and every array where the rules say."""

import dataclasses
import math
from pathlib import Path

import jax
import numpy as np
import pytest
from numerics import assert_close

import jax_mla
from jax_mla.sharding import layouts
from jax_mla.training import (
    Batch,
    Precision,
    Recipe,
    TokenRows,
    abstract_state,
    init_state,
    next_token_loss,
    place_batch,
    train,
    train_step,
)

NUM_STEPS = 20
RECIPE = Recipe(
    num_steps=100, learning_rate=1e-3, balance_loss=0.01, precision=Precision(compute="float32")
)
LAYOUTS = {
    "ddp": ({"data": 4}, layouts.ddp()),
    "zero1": ({"data": 4}, layouts.zero1()),
    "zero2": ({"data": 4}, layouts.zero2()),
    "zero3": ({"data": 2, "fsdp": 2}, layouts.zero3()),
    "tensor": ({"tensor": 2}, layouts.tensor_parallel()),
    "data x sequence": ({"data": 2, "sequence": 2}, layouts.context_parallel()),
    "data x expert, all-to-all": ({"data": 2, "expert": 2}, layouts.dp_attention_ep()),
    "data x tensor x expert": ({"data": 2, "tensor": 2, "expert": 2}, layouts.tensor_parallel()),
}
IN_THE_SUITE = {"data x tensor x expert"}  # a layout costs half a minute of compilation


def parametrized(names):
    marks = {name: () if name in IN_THE_SUITE else pytest.mark.slow for name in names}
    return [pytest.param(*LAYOUTS[name], marks=marks[name], id=name) for name in names]


@pytest.fixture(scope="module")
def batches():
    rng = np.random.default_rng(1)
    return [Batch(rng.integers(0, 256, (4, 16)).astype(np.int32)) for _ in range(NUM_STEPS)]


def run(config, batches, mesh=None, rules=None):
    state = init_state(jax.random.key(0), config, recipe=RECIPE, mesh=mesh, rules=rules)
    losses = []
    for batch in batches:
        batch = place_batch(batch, mesh, rules)
        state, metrics = train_step(state, config, batch, recipe=RECIPE, mesh=mesh, rules=rules)
        losses.append((metrics.loss, metrics.grad_norm))
    return state, np.array(losses)


@pytest.fixture(scope="module")
def on_one_device(config, batches):
    return run(config, batches)


@pytest.mark.parametrize(("axes", "rules"), parametrized(LAYOUTS))
def test_a_mesh_takes_the_same_steps(config, batches, on_one_device, axes, rules):
    mesh = jax_mla.make_mesh(**axes)
    state, losses = run(config, batches, mesh, rules)
    assert_close(losses[0], on_one_device[1][0], "float32")
    np.testing.assert_allclose(losses, on_one_device[1], rtol=1e-4)
    placed = jax_mla.param_shardings(config, mesh, rules)
    for x, sharding in zip(jax.tree.leaves(state.params), jax.tree.leaves(placed), strict=True):
        assert x.sharding.is_equivalent_to(sharding, x.ndim)


def shard_bytes(tree):
    """Bytes of the first device's part."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
    )


@pytest.mark.parametrize(
    ("rules", "splits_params"),
    [
        (layouts.ddp(), False),
        (layouts.zero1(), False),
        (layouts.zero2(), False),
        (layouts.zero3(), True),
    ],
    ids=["ddp", "zero1", "zero2", "zero3"],
)
def test_what_zero_splits(config, rules, splits_params):
    """All matrices have an axis to split; the bias of the router and norms stay whole."""
    mesh = jax_mla.make_mesh(data=8)
    like = abstract_state(config, recipe=RECIPE, mesh=mesh, rules=rules)
    whole = abstract_state(config, recipe=RECIPE, mesh=mesh, rules=jax_mla.sharding.layouts.ddp())
    all_params, all_moments = shard_bytes(whole.params), shard_bytes(whole.opt_state)
    vectors = 4 * (2 * (32 + 32 + 16 + 16) + 32 + 4)
    split = (all_params - vectors) / 8 + vectors
    assert shard_bytes(like.params) == (split if splits_params else all_params)
    small = shard_bytes(like.opt_state) < all_moments / 6
    assert small == (rules != jax_mla.sharding.layouts.ddp())


@pytest.mark.slow
def test_zero3_on_eight_devices_learns_as_much_as_one_device(config):
    """The same bytes of text, 150 steps, and the loss on text that was held out."""
    text = (Path(jax_mla.__file__).parent / "demo" / "held_out.txt").read_bytes()
    ids = np.frombuffer(text, np.uint8)
    sizes = {"batch_rows": 8, "row_tokens": 33, "vocab_size": 320}
    data, held_out = TokenRows([ids[:-4000]], **sizes), TokenRows([ids[-4000:]], **sizes)
    recipe = dataclasses.replace(RECIPE, num_steps=150, learning_rate=1e-2)

    def learn(**where):
        params = jax.device_get(train(config, recipe, data, **where).state.params)
        batches = [held_out.batch(i).tokens for i in range(held_out.num_rows // 8)]
        return np.mean([next_token_loss(params, config, tokens).loss for tokens in batches])

    alone = learn()
    assert alone < 3  # of ln(320) = 5.8 before
    assert abs(learn(mesh=jax_mla.make_mesh(data=8), rules=layouts.zero3()) / alone - 1) < 0.01
