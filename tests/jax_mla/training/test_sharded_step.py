"""The same steps on meshes: equal numbers, and every array where the rules say."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest
from layouts import MESH_LAYOUTS, shard_bytes, slow_unless
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
# A layout costs half a minute of compilation.
NAMES = slow_unless(
    ["data_tensor_expert"],
    [
        "ddp", "zero1", "zero2", "zero3", "data_tensor", "context", "dp_attention_ep",
        "data_tensor_expert",
    ],
)  # fmt: skip


@pytest.fixture(scope="module")
def config(config):
    """Both kinds of layer, and as many heads as devices of `tensor`."""
    return dataclasses.replace(
        config, num_hidden_layers=2, first_k_dense_replace=1, num_attention_heads=4
    )


@pytest.fixture(scope="module")
def batches():
    rng = np.random.default_rng(1)
    return [Batch(rng.integers(0, 256, (8, 16)).astype(np.int32)) for _ in range(NUM_STEPS)]


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


@pytest.mark.parametrize("layout", NAMES)
def test_a_mesh_takes_the_same_steps(config, batches, on_one_device, layout):
    mesh, rules = MESH_LAYOUTS[layout].mesh(), MESH_LAYOUTS[layout].rules
    state, losses = run(config, batches, mesh, rules)
    assert_close(losses[0], on_one_device[1][0], "float32")
    np.testing.assert_allclose(losses, on_one_device[1], rtol=1e-4)
    placed = jax_mla.param_shardings(config, mesh, rules)
    for x, sharding in zip(jax.tree.leaves(state.params), jax.tree.leaves(placed), strict=True):
        assert x.sharding.is_equivalent_to(sharding, x.ndim)


@pytest.mark.parametrize("stage", ["ddp", "zero1", "zero2", "zero3"])
def test_what_zero_splits(config, stage):
    """All matrices have an axis to split; the bias of the router and norms stay whole."""
    like, whole = (
        abstract_state(config, recipe=RECIPE, mesh=layout.mesh(), rules=layout.rules)
        for layout in (MESH_LAYOUTS[stage], MESH_LAYOUTS["ddp"])
    )
    all_params, all_moments = shard_bytes(whole.params), shard_bytes(whole.opt_state)
    vectors = 4 * (2 * (32 + 32 + 16 + 16) + 32 + 4)
    split = (all_params - vectors) / 8 + vectors
    assert shard_bytes(like.params) == (split if stage == "zero3" else all_params)
    is_small = shard_bytes(like.opt_state) < all_moments / 6
    assert is_small == (stage != "ddp")


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
