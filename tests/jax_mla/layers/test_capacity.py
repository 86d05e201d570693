"""Padding is invisible to the capacity of a dispatch: neither results nor dropped counts change."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from layouts import MESH_LAYOUTS
from numerics import assert_close, normal

import jax_mla
from jax_mla.layers.moe.exchange import admitted

CONFIG = dataclasses.replace(jax_mla.tiny(), num_attention_heads=4, num_hidden_layers=3)
CAPACITY = 0.5
# Tokens sharded over the devices of the experts, and tokens that these devices hold together.
LAYOUTS = {
    "split": MESH_LAYOUTS["dp_attention_ep_8"].dispatching("a2a", CAPACITY),
    "replicated": MESH_LAYOUTS["data_expert"].dispatching("a2a", CAPACITY),
}


@pytest.fixture(params=LAYOUTS)
def run(request):
    """Output, gradient and dropped count of a layer for tokens x, of which some are valid."""
    layout = LAYOUTS[request.param]
    place = layout.placement()
    graphdef, weights = nnx.split(jax_mla.MoE(CONFIG, rngs=nnx.Rngs(0), placement=place))

    @jax.jit
    def run(weights, x, valid):
        layer = nnx.merge(graphdef, weights)

        def objective(x):
            y = layer(x, valid=valid)
            return jnp.where(valid[..., None], jnp.sin(y), 0).sum(), y

        dx, y = jax.grad(objective, has_aux=True)(x)
        return y, dx, layer.route(x, valid).num_dropped

    def placed(x, valid):
        return run(*layout.replicate((weights, x, jnp.asarray(valid))))

    return placed


def test_padding_changes_neither_results_nor_what_is_dropped(run, rng):
    """Before, between and after the tokens, in rows of different lengths."""
    lengths = np.asarray([7, 3, 5, 1, 6, 4, 2, 7])
    # Like tokens choose like experts, for which there is no room.
    x = np.repeat(normal(rng, (8, 2, CONFIG.hidden_size)), [4, 3], axis=1)
    is_token = np.arange(7)[None] < lengths[:, None]
    want_y, want_dx, want_dropped = run(jnp.asarray(x), is_token)
    assert want_dropped > 0
    for columns in (np.arange(7) + 9, np.arange(7), np.asarray([0, 3, 4, 8, 9, 14, 19])):
        padded = normal(rng, (8, 20, CONFIG.hidden_size))
        padded = np.array(padded)
        padded[:, columns] = x
        valid = np.zeros((8, 20), bool)
        valid[:, columns] = is_token
        y, dx, num_dropped = run(jnp.asarray(padded), valid)
        assert num_dropped == want_dropped
        assert_close(y[valid], want_y[is_token], "float32")
        assert_close(dx[valid], want_dx[is_token], "float32")


def test_a_batch_of_padding_drops_nothing(run, rng):
    x = normal(rng, (8, 4, CONFIG.hidden_size))
    y, dx, num_dropped = run(x, np.zeros((8, 4), bool))
    assert num_dropped == 0 and np.isfinite(y).all() and np.isfinite(dx).all()


def test_as_many_rows_are_admitted_as_a_host_would_count():
    """Exactly, where the product is a whole number in Python and would not be in float32."""
    for capacity, num_devices in ((0.1, 1), (1.1, 8), (0.7, 4), (1e9, 8)):
        for num_tokens in range(101):
            want = min(int(np.ceil(capacity * num_tokens * 2 / num_devices)), 200)
            assert admitted(num_tokens, (100, 2), num_devices, capacity) == want
