"""What the small model of these tests begins with."""

import jax
import numpy as np
import pytest

import jax_mla


@pytest.fixture(scope="session")
def params(config):
    return jax_mla.init(jax.random.key(0), config)


@pytest.fixture(scope="session")
def tokens():
    return np.random.default_rng(0).integers(0, 256, (4, 14)).astype(np.int32)
