"""What `generate` adds by itself, padding of prompts and rows that have ended, pushes nothing out.

Eight devices have an expert and two sequences each, and a capacity bounds what they send.
"""

import dataclasses

import jax
import numpy as np
import pytest

import jax_mla
from jax_mla.sharding import ExpertDispatch, layouts

CONFIG = dataclasses.replace(jax_mla.tiny(), initializer_range=0.1, num_hidden_layers=2)
BATCH, STEPS = 16, 6


@pytest.fixture(scope="module")
def params():
    return jax_mla.init(jax.random.key(0), CONFIG)


@pytest.fixture(scope="module")
def prompts():
    """The first sequence of every device is the same prompt."""
    tokens = np.random.default_rng(0).integers(0, 256, (BATCH, 9))
    tokens[::2] = tokens[0]
    return tokens


@pytest.fixture(scope="module")
def end(params, prompts):
    """What the first sequence of every device writes first: there it ends."""
    return int(np.asarray(jax_mla.forward(params, CONFIG, prompts[:1]))[0, -1].argmax())


def generate(params, tokens, end, capacity):
    rules = dataclasses.replace(layouts.dp_attention_ep(), dispatch=ExpertDispatch("a2a", capacity))
    shardings = jax_mla.param_shardings(CONFIG, jax_mla.make_mesh(expert=8), rules)
    placed = jax.device_put(params, shardings)
    options = {"max_new_tokens": STEPS, "eos_token_ids": (end,), "rules": rules}
    return np.asarray(jax_mla.generate(placed, CONFIG, tokens, **options).tokens)


@pytest.fixture(scope="module")
def unlimited(params, prompts, end):
    tokens = generate(params, prompts, end, None)
    assert (tokens[::2, 1:] == CONFIG.pad_token_id).all()
    assert (tokens[1::2, 0] != end).sum() >= 6
    return tokens


@pytest.fixture(scope="module")
def limited(params, prompts, end):
    """Room for 16 of the 128 tokens of a device's prompts, and for 1 of its 2 tokens of a step."""
    return generate(params, prompts, end, 0.5)


def test_padding_takes_up_no_capacity(unlimited, limited):
    """Of the second sequence the 9 tokens come after 55 of padding."""
    np.testing.assert_array_equal(limited[:, 0], unlimited[:, 0])


def test_rows_that_have_ended_take_up_no_capacity(unlimited, limited):
    np.testing.assert_array_equal(limited[:, 1:], unlimited[:, 1:])
