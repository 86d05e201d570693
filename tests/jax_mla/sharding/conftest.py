"""Parameters and logits of the config of each module, on one device."""

import numpy as np
import pytest
from weights import random_params

import jax_mla


@pytest.fixture(scope="module")
def params(config):
    return random_params(config)


@pytest.fixture(scope="module")
def logits(params, config, tokens):
    return np.asarray(jax_mla.forward(params, config, tokens))
