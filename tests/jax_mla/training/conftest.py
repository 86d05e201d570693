"""What the small model of these tests begins with."""

import dataclasses

import numpy as np
import pytest
from weights import random_params


@pytest.fixture(scope="session")
def config(config):
    """One mixture of experts: a dense layer in front would only be compiled along."""
    return dataclasses.replace(config, num_hidden_layers=1, first_k_dense_replace=0)


@pytest.fixture(scope="module")  # modules have configs of their own
def params(config):
    return random_params(config)


@pytest.fixture(scope="session")
def tokens():
    return np.random.default_rng(0).integers(0, 256, (4, 14)).astype(np.int32)
