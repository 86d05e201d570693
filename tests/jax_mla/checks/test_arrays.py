"""What the host can read of an array, by one rule in both packages."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_mla.checks.arrays import concrete
from pallas_kernels.checks import host_values


@pytest.fixture(params=[concrete, host_values], ids=lambda function: function.__name__)
def readable(request):
    return request.param


def of_several_hosts(monkeypatch, is_replicated):
    array = jnp.arange(3)
    kind = type(array)
    monkeypatch.setattr(kind, "is_fully_addressable", property(lambda self: False))
    monkeypatch.setattr(kind, "is_fully_replicated", property(lambda self: is_replicated))
    return array


def test_arrays_lists_and_numbers_are_read(readable):
    for x in (jnp.arange(3), np.arange(3), [0, 1, 2]):
        np.testing.assert_array_equal(readable(x), [0, 1, 2])
    assert readable(3) == 3


def test_traced_arrays_are_not_read(readable):
    def check(x):
        assert readable(x) is None
        return x

    jax.jit(check)(jnp.arange(3))
    jax.vmap(check)(jnp.arange(3))


@pytest.mark.parametrize("is_replicated", [False, True])
def test_of_several_hosts_only_replicated_arrays_are_read(readable, is_replicated, monkeypatch):
    values = readable(of_several_hosts(monkeypatch, is_replicated))
    monkeypatch.undo()
    if is_replicated:
        np.testing.assert_array_equal(values, [0, 1, 2])
    else:
        assert values is None
