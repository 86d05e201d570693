"""Padding in training batches: whatever stands there, and however much, nothing else changes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numerics import assert_close, assert_same_bits
from weights import random_params

from jax_mla.training import (
    Batch,
    Precision,
    Recipe,
    expert_load,
    init_state,
    next_token_loss,
    train_step,
)

RECIPE = Recipe(num_steps=100, z_loss=0.1, balance_loss=0.1, precision=Precision(compute="float32"))
LENGTH = 9


@pytest.fixture(scope="module")
def first_step(config):
    """The state after one step from seed 0 and its metrics, of a batch."""

    def step(batch):
        params = random_params(config)
        state = init_state(jax.random.key(0), config, recipe=RECIPE, params=params)
        return train_step(state, config, batch, recipe=RECIPE)

    return step


def padded(tokens, fill):
    """Nine tokens a row, five of padding after them; and a row of nothing else."""
    rows = np.full((5, 14), fill, np.int32)
    rows[:4, :LENGTH] = tokens[:, :LENGTH]
    is_real = (np.arange(14)[None] < LENGTH) & (np.arange(5)[:, None] < 4)
    return Batch(jnp.asarray(rows), jnp.asarray(np.where(is_real, 0, -1).astype(np.int32)))


def moments(state):
    """Adam's first moments after one step: the gradients, clipped, times 1 - b1."""
    leaves = jax.tree_util.tree_leaves_with_path(state.opt_state)
    return {k: x for path, x in leaves if ".mu" in (k := jax.tree_util.keystr(path))}


def test_a_padded_batch_trains_as_the_batch_without_its_padding(first_step, tokens):
    state, metrics = first_step(padded(tokens, 7))
    want_state, want = first_step(Batch(jnp.asarray(tokens[:, :LENGTH])))
    assert metrics.num_tokens == want.num_tokens == 4 * (LENGTH - 1)
    np.testing.assert_array_equal(metrics.load, want.load)
    assert metrics.load.sum() == 4 * LENGTH * 2
    for name in ("loss", "z_loss", "balance_loss", "grad_norm"):
        assert_close(getattr(metrics, name), getattr(want, name), "float32")
    num_leaves = len(jax.tree.leaves(want_state.params))
    assert len(moments(want_state)) == num_leaves - 1  # all but the router's bias
    for name, moment in moments(want_state).items():
        assert_close(moments(state)[name], moment, "float32")
    bias = [s.params["moe_layers"]["mlp"]["e_score_correction_bias"] for s in (state, want_state)]
    assert bias[0].any()
    np.testing.assert_array_equal(*bias)


def test_what_stands_in_the_padding_changes_no_bit(first_step, tokens):
    assert_same_bits(first_step(padded(tokens, 7)), first_step(padded(tokens, 200)))


def test_a_batch_of_padding_moves_nothing(config, params, tokens):
    ids = np.full_like(tokens, -1)
    loss = next_token_loss(params, config, tokens, segment_ids=ids)
    assert (loss.loss, loss.z_loss, loss.balance_loss, loss.num_tokens) == (0, 0, 0, 0)
    assert not loss.load.any()


def test_load_leaves_padding_out(config):
    index = jnp.asarray([[[0, 1], [-1, -1], [1, 3]]])
    assert expert_load(index, config).tolist() == [1, 2, 0, 1]


def test_padding_may_be_anywhere_and_a_segment_in_one_place(config, params, tokens):
    ids = np.tile([-1, -1, 4, 4, 4, -1, 2, 2, 2, 2, 2, -1, -1, -1], (4, 1))
    loss = next_token_loss(params, config, tokens, segment_ids=ids)
    assert loss.num_tokens == 4 * (2 + 4)
    ids[2, 11:] = 4
    message = "must follow each other, got segment id 4 of row 2 again after another id"
    with pytest.raises(ValueError, match=message):
        next_token_loss(params, config, tokens, segment_ids=ids)
    with pytest.raises(ValueError, match=message):
        next_token_loss(params, config, tokens, segment_ids=jnp.asarray(ids))


@pytest.mark.parametrize("compute", ["float32", pytest.param("float16", marks=pytest.mark.slow)])
def test_a_step_promotes_no_dtypes_by_itself(config, params, tokens, compute):
    recipe = dataclasses.replace(
        RECIPE, num_micro_batches=2, precision=Precision(compute=compute), schedule="wsd"
    )
    batch = padded(tokens, 7)
    batch = jax.tree.map(lambda x: x[:4], batch)
    with jax.numpy_dtype_promotion("strict"):
        state = init_state(jax.random.key(0), config, recipe=recipe)
        _, metrics = train_step(state, config, batch, recipe=recipe)
        loss = next_token_loss(params, config, batch.tokens, segment_ids=batch.segment_ids)
    assert np.isfinite(metrics.loss) and np.isfinite(loss.loss)
