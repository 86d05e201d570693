"""Rotary embedding against complex numbers, and its stretched frequencies."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from numerics import assert_close, normal

import jax_mla
from jax_mla.config import RopeScaling
from jax_mla.layers.rope import inverse_frequencies, rope_tables, rotate

R, THETA = 16, 10000.0


@pytest.mark.parametrize("interleaved", [True, False], ids=["interleaved", "half"])
@pytest.mark.parametrize("heads", [(), (3,)], ids=["shared", "heads"])
def test_rotation_is_a_complex_product(interleaved, heads, rng):
    positions = np.asarray([[0, 1, 5, 1000], [7, 7, 2, 163839]])
    x = normal(rng, (2, 4, *heads, R))
    got = rotate(x, *rope_tables(jnp.asarray(positions), R, THETA), interleaved=interleaved)
    wide = np.asarray(x, np.float64)
    first = wide[..., 0::2] if interleaved else wide[..., : R // 2]
    second = wide[..., 1::2] if interleaved else wide[..., R // 2 :]
    # The angle is a float32 product, as in the reference: its rounding grows with the position.
    angle = positions[..., None].astype(np.float32) * inverse_frequencies(R, THETA)
    angle = angle.reshape(2, 4, *(1 for _ in heads), R // 2).astype(np.float64)
    z = (first + 1j * second) * np.exp(1j * angle)
    assert_close(got, np.concatenate([z.real, z.imag], axis=-1), "float32")


def test_scores_depend_on_distance_only(rng):
    q, k = normal(rng, (1, 1, R)), normal(rng, (1, 1, R))

    def score(i, j):
        turned = [
            rotate(x, *rope_tables(jnp.asarray([[p]]), R, THETA), interleaved=True)
            for x, p in ((q, i), (k, j))
        ]
        return float(jnp.sum(turned[0] * turned[1]))

    assert score(9, 4) == pytest.approx(score(105, 100), abs=1e-4)
    assert score(9, 4) != pytest.approx(score(9, 5), abs=1e-2)


def test_yarn_keeps_fast_frequencies_and_stretches_slow_ones():
    yarn = jax_mla.v3().rope_scaling
    plain, stretched = inverse_frequencies(64, THETA), inverse_frequencies(64, THETA, yarn)
    assert stretched[0] == plain[0]
    assert stretched[-1] == pytest.approx(plain[-1] / yarn.factor)
    # beta_fast=32 and beta_slow=1 rotations in 4096 tokens: indices 10.5, 22.5, rounded out.
    is_mixed = (stretched < plain * 0.9999) & (stretched > plain / yarn.factor * 1.0001)
    assert np.flatnonzero(is_mixed).tolist() == list(range(11, 23))


def test_yarn_ramp_of_kimi_k2_is_a_step():
    yarn = jax_mla.kimi_k2().rope_scaling
    plain = inverse_frequencies(64, 50000.0)
    ratio = plain / inverse_frequencies(64, 50000.0, yarn)
    assert set(np.round(ratio).tolist()) == {1.0, 32.0}


def test_cos_and_sin_are_scaled_when_the_mscales_differ():
    yarn = RopeScaling("yarn", 8.0, 16, mscale=1.3, mscale_all_dim=0.6)
    cos, sin = rope_tables(jnp.zeros((1, 1), jnp.int32), R, THETA, yarn)
    want = (0.13 * np.log(8) + 1) / (0.06 * np.log(8) + 1)
    assert_close(cos, np.full((1, 1, R // 2), want), "float32")
    assert not sin.any()
    equal = dataclasses.replace(yarn, mscale=0.6)
    assert equal.cos_sin_factor == 1.0


def test_longrope_divides_each_frequency():
    short = tuple(float(i + 1) for i in range(R // 2))
    scaling = RopeScaling("longrope", 1.0, 32768, short_factor=short)
    got = inverse_frequencies(R, THETA, scaling)
    assert_close(got, inverse_frequencies(R, THETA) / np.asarray(short), "float32")
