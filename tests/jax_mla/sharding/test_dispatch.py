"""How tokens reach their experts is an object that checks itself."""

import pytest

import jax_mla
from jax_mla.sharding import ExpertDispatch


@pytest.mark.parametrize(
    ("capacity", "method", "message"),
    [
        (0, "a2a", "must be a number above 0, got 0"),
        (-1.5, "a2a", "must be a number above 0, got -1.5"),
        (float("nan"), "a2a", "must be a number above 0, got nan"),
        (True, "a2a", "must be a number above 0, got True"),
        (1.5, "dense", "'a2a'.* got capacity=1.5 with method='dense'"),
        (1.5, "ragged", "'a2a'.* got capacity=1.5 with method='ragged'"),
        (None, "send", "method must be one of dense, a2a, ragged, got 'send'"),
    ],
)
def test_impossible_capacity_is_refused(capacity, method, message):
    with pytest.raises(ValueError, match=message):
        ExpertDispatch(method, capacity)


def test_a_dispatch_is_an_object():
    with pytest.raises(ValueError, match="dispatch must be an ExpertDispatch, got 'a2a'"):
        jax_mla.ShardingRules(dispatch="a2a")
