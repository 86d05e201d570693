"""The golden logits notice each of the mistakes that a port of this model makes most easily."""

import jax
import numpy as np
import pytest
from golden_sets import GOLDEN, read_golden

import jax_mla
from jax_mla.config.model import DeepSeekConfig
from jax_mla.layers.mla import module as mla
from jax_mla.layers.moe import module as moe
from jax_mla.params import split_abstract

BOUND = 5e-5  # of test_golden.py


def drop_mscale(patch):
    patch.setattr(DeepSeekConfig, "softmax_scale", property(lambda c: c.qk_head_dim**-0.5))


def swap_rope_layout(patch):
    rotate = mla.rotate
    patch.setattr(mla, "rotate", lambda *x, interleaved: rotate(*x, interleaved=not interleaved))


def turn_rope_backwards(patch):
    rotate = mla.rotate
    patch.setattr(mla, "rotate", lambda x, cos, sin, **options: rotate(x, cos, -sin, **options))


def drop_correction_bias(patch):
    route = moe.route
    patch.setattr(moe, "route", lambda logits, bias, config: route(logits, bias * 0, config))


def drop_inner_norm_eps(patch):
    patch.setattr(mla, "LATENT_NORM_EPS", 0.0)


NOTICED_BY = {
    drop_mscale: "v3_yarn_mscale",
    swap_rope_layout: "v3_half_noq_bias",
    turn_rope_backwards: "v2_lite",
    drop_correction_bias: "v3",
    drop_inner_norm_eps: "v3_yarn_mscale",
}


@pytest.fixture
def forget():
    """Nothing traced without the mistake is used in the test, nor what is traced with it after."""
    _forget()
    yield
    _forget()


def _forget():
    split_abstract.cache_clear()
    jax.clear_caches()


@pytest.mark.parametrize("mistake", NOTICED_BY, ids=lambda mistake: mistake.__name__)
def test_a_mistake_is_noticed(mistake, monkeypatch, forget):
    mistake(monkeypatch)
    name = NOTICED_BY[mistake]
    golden, (params, config) = read_golden(name), jax_mla.load(GOLDEN / name, dtype="float32")
    logits = jax_mla.forward(params, config, golden["input_ids"])
    assert np.abs(np.asarray(logits) - golden["logits"]).max() > 2 * BOUND
