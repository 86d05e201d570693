"""Sampling: frequencies match probabilities, and each option keeps the tokens it should."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_mla import SamplingOptions, sample

P = np.asarray([0.4, 0.25, 0.15, 0.1, 0.06, 0.04])
LOGITS = jnp.log(jnp.asarray(P, jnp.float32))
DRAWS = 4000


def keys(num, seed=0):
    return jax.random.split(jax.random.key(seed), num)


def frequencies(**options):
    logits = jnp.broadcast_to(LOGITS[None], (DRAWS, len(P)))
    tokens = jax.jit(lambda keys: sample(logits, keys, **options))(keys(DRAWS))
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
    drawn = sample(logits, keys(500), top_p=top_p)
    assert set(np.asarray(drawn).tolist()) == kept


def test_options_may_differ_by_row():
    logits = jnp.broadcast_to(LOGITS[None], (3, len(P)))
    options = {"temperature": jnp.asarray([0.0, 1.0, 1.0]), "top_k": jnp.asarray([6, 1, 2])}
    drawn = np.stack([sample(logits, keys(3, i), **options) for i in range(40)])
    assert (drawn[:, :2] == 0).all()
    assert set(drawn[:, 2].tolist()) == {0, 1}


def test_rows_draw_independently():
    logits = jnp.zeros((64, 50))
    assert len(set(np.asarray(sample(logits, keys(64))).tolist())) > 20


OFF = {"top_k": 50, "top_p": 1.0, "min_p": 0.0}


def test_a_row_depends_on_nothing_but_itself(rng):
    """Alone, without any option: the same token as among others that have all of them."""
    logits = jnp.asarray(rng.normal(size=(8, 50)) * 6, jnp.float32)
    options = {
        name: jnp.where(jnp.arange(8) == 5, off, on)
        for (name, off), on in zip(OFF.items(), (3, 0.4, 0.5), strict=True)
    }
    among = np.stack([sample(logits, keys(8, i), **options) for i in range(50)])
    alone = np.stack([sample(logits[5:6], keys(8, i)[5:6]) for i in range(50)])
    np.testing.assert_array_equal(among[:, 5], alone[:, 0])
    assert len(set(alone[:, 0].tolist())) > 3


@pytest.mark.parametrize("name", OFF)
def test_options_that_are_off_change_no_bit(name):
    # Of 1,000 tokens the last 900 are worth less than one rounding of their sum.
    logits = jnp.broadcast_to(jnp.where(jnp.arange(1000) < 100, 0.0, -20.0), (2000, 1000))
    off = 1000 if name == "top_k" else OFF[name]
    want, got = (sample(logits, keys(2000), temperature=4.0, **o) for o in ({}, {name: off}))
    np.testing.assert_array_equal(got, want)
    assert (np.asarray(want) >= 100).any()


def test_keys_of_the_old_kind_draw_the_same():
    logits = jnp.zeros((9, 50))
    raw = jax.random.key_data(keys(9))
    np.testing.assert_array_equal(sample(logits, raw), sample(logits, keys(9)))


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((jnp.zeros(5), keys(5)), {}, r"logits must be Float\[B V\], none of them 0, .* \(5,\)"),
        ((jnp.zeros((0, 5)), keys(1)), {}, r"none of them 0, got shape \(0, 5\)"),
        (
            (jnp.zeros((3, 5)), jax.random.key(0)),
            {},
            r"keys must be 3 .*, one per row .* shape \(\)",
        ),
        ((jnp.zeros((3, 5)), keys(2)), {}, r"keys must be 3 jax.random keys or .* shape \(2,\)"),
        (
            (jnp.zeros((3, 5)), jax.random.PRNGKey(0)),
            {},
            r"keys must be 3 .* uint32 of shape \(2,\)",
        ),
        (
            (jnp.zeros((3, 5)), 7),
            {},
            "keys must be 3 jax.random keys or a list of 3 seeds, one per row of logits, got 7",
        ),
        (
            (jnp.zeros((3, 5)), keys(3)),
            {"top_p": jnp.ones(2)},
            r"top_p must be a number or 3 of them, one per row, got shape \(2,\)",
        ),
    ],
)
def test_wrong_shapes_are_refused(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        sample(*arguments, **options)


def test_options_are_checked_when_they_are_made():
    assert SamplingOptions() == SamplingOptions(temperature=0.0, top_k=None, top_p=None, min_p=None)
    with pytest.raises(ValueError, match=r"top_p must be above 0 and at most 1, got 1\.5"):
        SamplingOptions(temperature=1.0, top_p=1.5)


def test_options_as_sample_takes_them():
    assert SamplingOptions(top_k=3).arrays() == {}
    arrays = SamplingOptions(0.5, top_k=10**12, min_p=np.float64(0.25)).arrays()
    assert {name: (x.item(), x.dtype.name) for name, x in arrays.items()} == {
        "temperature": (0.5, "float32"),
        "top_k": (2**31 - 1, "int32"),
        "min_p": (0.25, "float32"),
    }
