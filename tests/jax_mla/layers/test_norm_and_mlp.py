"""RMSNorm and SwiGLU against their formulas."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from numerics import assert_close, normal

import jax_mla


@pytest.mark.parametrize("eps", [1e-6, 1e-2])
def test_rms_norm(eps, rng):
    norm = jax_mla.RMSNorm(24, eps=eps)
    norm.weight[...] = normal(rng, (24,))
    x = normal(rng, (2, 3, 24), scale=0.05)
    wide = np.asarray(x, np.float64)
    want = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + eps) * np.asarray(norm.weight[...])
    assert_close(norm(x), want, "float32")


def test_rms_norm_squares_in_float32():
    """The square of 300 overflows float16."""
    x = jnp.full((1, 8), 300.0, jnp.float16)
    got = jax_mla.RMSNorm(8)(x)
    assert got.dtype == jnp.float16
    assert_close(got, np.ones((1, 8)), "float16")


def test_rms_norm_of_another_width_is_refused():
    with pytest.raises(ValueError, match=r"x has shape \(2, 192\), the norm a weight of \(5,\)"):
        jax_mla.RMSNorm(5)(jnp.zeros((2, 192)))
    with pytest.raises(ValueError, match="dim must be an integer of at least 1, got 0"):
        jax_mla.RMSNorm(0)


def test_swiglu(rng):
    layer = jax_mla.SwiGLU(8, 20, rngs=nnx.Rngs(0), stddev=0.3)
    x = normal(rng, (2, 3, 8))
    wide = np.asarray(x, np.float64)
    gate, up, down = (
        np.asarray(w.array(), np.float64) for w in (layer.gate_proj, layer.up_proj, layer.down_proj)
    )
    gated = wide @ gate
    assert_close(layer(x), (gated / (1 + np.exp(-gated)) * (wide @ up)) @ down, "float32")
