"""The smallest models that can be cut: three dense layers, or one dense and two of experts."""

import dataclasses

import jax
import numpy as np
import pytest

import jax_mla


@pytest.fixture(scope="session")
def moe_config(config):
    return dataclasses.replace(config, num_hidden_layers=3, first_k_dense_replace=1)


@pytest.fixture(scope="session")
def dense_config(moe_config):
    return dataclasses.replace(moe_config, n_routed_experts=None, tie_word_embeddings=True)


@pytest.fixture(scope="session")
def random_params():
    """Parameters of a config without compiling `init`; norms and the routers' bias vary too."""

    def draw(config):
        rng = np.random.default_rng(3)
        shapes = jax.eval_shape(lambda: jax_mla.init(jax.random.key(0), config))
        return jax.tree.map(lambda x: rng.normal(0, 0.3, x.shape).astype(x.dtype), shapes)

    return draw
