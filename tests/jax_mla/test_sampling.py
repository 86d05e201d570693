"""Sampling: frequencies match probabilities, and each option keeps the tokens it should."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_mla import sample

P = np.asarray([0.4, 0.25, 0.15, 0.1, 0.06, 0.04])
LOGITS = jnp.log(jnp.asarray(P, jnp.float32))
DRAWS = 4000


def frequencies(**options):
    logits = jnp.broadcast_to(LOGITS[None], (DRAWS, len(P)))
    tokens = jax.jit(lambda key: sample(logits, key, **options))(jax.random.key(0))
    return np.bincount(np.asarray(tokens), minlength=len(P)) / DRAWS


def renormalised(keep, temperature=1.0):
    p = P ** (1 / temperature) * np.asarray(keep)
    return p / p.sum()


@pytest.mark.parametrize(
    ("options", "want"),
    [
        ({}, P),
        ({"temperature": 0.5}, renormalised([1] * 6, 0.5)),
        ({"temperature": 0.0}, [1, 0, 0, 0, 0, 0]),
        ({"top_k": 1}, [1, 0, 0, 0, 0, 0]),
        ({"top_k": 3}, renormalised([1, 1, 1, 0, 0, 0])),
        ({"top_k": 99}, P),
        ({"top_p": 0.6}, renormalised([1, 1, 0, 0, 0, 0])),  # 0.4 < 0.6 <= 0.65
        ({"top_p": 0.7}, renormalised([1, 1, 1, 0, 0, 0])),
        ({"top_p": 0.01}, [1, 0, 0, 0, 0, 0]),
        ({"top_p": 1.0}, P),
        ({"min_p": 0.3}, renormalised([1, 1, 1, 0, 0, 0])),  # at least 0.12
        ({"min_p": 1.0}, [1, 0, 0, 0, 0, 0]),
        # top_p judges what top_k has left: 0.4 / 0.8 and 0.25 / 0.8 reach 0.75.
        ({"top_k": 3, "top_p": 0.75}, renormalised([1, 1, 0, 0, 0, 0])),
        ({"top_k": 4, "top_p": 0.95, "min_p": 0.5}, renormalised([1, 1, 0, 0, 0, 0])),
    ],
    ids=str,
)
def test_frequencies(options, want):
    got = frequencies(**options)
    # Five standard deviations of a frequency over 4000 draws are at most 0.04.
    np.testing.assert_allclose(got, want, atol=0.04)
    assert (got[np.asarray(want) == 0] == 0).all()


@pytest.mark.parametrize(
    ("weights", "top_p", "kept"),
    [
        ([1, 1, 1, 1], 0.5, {0, 1}),
        ([1, 2, 1, 1], 0.6, {0, 1}),
        ([1, 1, 1, 1], 1.0, {0, 1, 2, 3}),
    ],
)
def test_top_p_keeps_the_smallest_set_among_equals(weights, top_p, kept):
    logits = jnp.broadcast_to(jnp.log(jnp.asarray(weights, jnp.float32))[None], (500, 4))
    drawn = sample(logits, jax.random.key(0), top_p=top_p)
    assert set(np.asarray(drawn).tolist()) == kept


def test_options_may_differ_by_row():
    logits = jnp.broadcast_to(LOGITS[None], (3, len(P)))
    options = {"temperature": jnp.asarray([0.0, 1.0, 1.0]), "top_k": jnp.asarray([6, 1, 2])}
    drawn = np.stack([sample(logits, jax.random.key(i), **options) for i in range(40)])
    assert (drawn[:, :2] == 0).all()
    assert set(drawn[:, 2].tolist()) == {0, 1}


def test_rows_draw_independently():
    logits = jnp.zeros((64, 50))
    assert len(set(np.asarray(sample(logits, jax.random.key(0))).tolist())) > 20
