"""Learning rates at the steps where they turn."""

import math

import numpy as np
import pytest
from numerics import assert_close

from jax_mla.training import Recipe, cosine, warmup_stable_decay


def rates(schedule, num_steps):
    return np.array([float(schedule(step)) for step in range(num_steps)])


def test_cosine_rises_in_a_line_and_falls_in_half_a_cosine():
    got = rates(cosine(2.0, num_steps=14, warmup_steps=4, final=0.5), 15)
    fall = [0.5 + 1.5 * 0.5 * (1 + math.cos(math.pi * i / 10)) for i in range(11)]
    assert_close(got, np.array([0.5, 1.0, 1.5, 2.0, *fall]), "float32")


def test_wsd_rises_stays_and_falls_in_a_line():
    got = rates(warmup_stable_decay(2.0, num_steps=10, warmup_steps=2, decay_steps=4), 11)
    assert_close(got, np.array([1.0, 2, 2, 2, 2, 2, 2, 1.5, 1, 0.5, 0]), "float32")


def test_wsd_without_decay_and_warmup_is_constant():
    assert (rates(warmup_stable_decay(0.25, num_steps=5, decay_steps=0), 5) == 0.25).all()


def test_a_recipe_takes_a_hundredth_to_warm_up_and_a_fifth_to_decay():
    got = rates(Recipe(num_steps=200, schedule="wsd", learning_rate=1.0).rate, 200)
    assert got[0] == 0.5 and (got[1:161] == 1).all()
    assert_close(got[161:], 1 - np.arange(1, 40) / 40, "float32")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"warmup_steps": 11}, "warmup_steps=11 do not fit into num_steps=10"),
        ({"warmup_steps": -1}, "warmup_steps must be at least 0, got -1"),
        (
            {"schedule": "wsd", "warmup_steps": 6, "decay_steps": 5},
            "warmup_steps=6 and decay_steps=5 do not fit into num_steps=10",
        ),
        ({"schedule": "line"}, "schedule must be one of cosine, wsd, got 'line'"),
        ({"optimizer": "lion"}, "optimizer must be one of adamw, muon, got 'lion'"),
        ({"num_micro_batches": 0}, "num_micro_batches must be at least 1, got 0"),
        ({"learning_rate": float("nan")}, "learning_rate must be a finite number .* got nan"),
        ({"b2": 1.0}, "b2 must be at least 0 and below 1, got 1.0"),
        ({"clip_norm": 0.0}, "clip_norm must be a finite number above 0, got 0.0"),
        ({"precision": "float32"}, "precision must be a Precision, got 'float32'"),
        ({"eps": -1e-8}, "eps must be a finite number above 0, got -1e-08"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_cannot_be_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Recipe(num_steps=10, **options)
