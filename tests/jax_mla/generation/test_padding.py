"""What `generate` adds by itself, padding of prompts and rows that have ended, pushes nothing out.

Eight devices have an expert and two sequences each, and a capacity bounds what they send.
"""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from weights import random_params

import jax_mla
from jax_mla.sharding import ExpertDispatch, layouts

CONFIG = dataclasses.replace(jax_mla.tiny(), initializer_range=0.1, num_hidden_layers=2)
BATCH, STEPS = 16, 6
UNLIMITED = layouts.dp_attention_ep()
# Each expert takes 3 of the 18 tokens of a device's prompts, and 1 of one token or two.
LIMITED = dataclasses.replace(UNLIMITED, dispatch=ExpertDispatch("a2a", 0.5))


@pytest.fixture(scope="module")
def params():
    params = random_params(CONFIG)
    shardings = jax_mla.param_shardings(CONFIG, jax_mla.make_mesh(expert=8), UNLIMITED)
    return jax.device_put(params, shardings)


@pytest.fixture(scope="module")
def prompts():
    """The first sequence of every device is the same prompt."""
    tokens = np.random.default_rng(0).integers(0, 256, (BATCH, 9))
    tokens[::2] = tokens[0]
    return tokens


@pytest.fixture(scope="module")
def prefilled(params, prompts):
    """Logits and cache of prompts that are not padded, by the rules."""

    @functools.cache
    def prefill(rules):
        cache = jax_mla.LatentCache.empty(CONFIG, BATCH, 9 + STEPS)
        return jax_mla.prefill(params, CONFIG, prompts, cache, rules=rules)

    return prefill


@pytest.fixture(scope="module")
def end(prefilled):
    """What the first sequence of every device writes first: there it ends."""
    first = np.asarray(prefilled(LIMITED)[0])[::2].argmax(axis=-1)
    assert (first == first[0]).all()
    return int(first[0])


@pytest.fixture(scope="module")
def limited(params, prompts, end):
    options = {"max_new_tokens": STEPS, "eos_token_ids": (end,), "rules": LIMITED}
    return np.asarray(jax_mla.generate(params, CONFIG, prompts, **options).tokens)


def test_padding_takes_up_no_capacity(prefilled, limited):
    """Of the second sequence the 9 tokens come after 55 of padding."""
    logits, without = np.asarray(prefilled(LIMITED)[0]), np.asarray(prefilled(UNLIMITED)[0])
    assert (np.abs(logits - without).max(axis=-1) > 0.1).sum() > BATCH // 2  # some were dropped
    np.testing.assert_array_equal(limited[:, 0], logits.argmax(axis=-1))


def test_rows_that_have_ended_take_up_no_capacity(params, prefilled, limited, end):
    """Alone on its device, a token finds room with each of its experts."""
    logits, cache = prefilled(LIMITED)
    written = []
    for _ in range(STEPS):
        written.append(np.asarray(logits).argmax(axis=-1))
        logits, cache = jax_mla.decode_step(params, CONFIG, written[-1], cache, rules=UNLIMITED)
    want = np.stack(written, axis=1)
    is_after_end = np.cumsum(want == end, axis=1) - (want == end) > 0
    want = np.where(is_after_end, CONFIG.pad_token_id, want)
    assert (want[::2, 1:] == CONFIG.pad_token_id).all() and (want[1::2, 0] != end).sum() >= 6
    np.testing.assert_array_equal(limited, want)
