"""The smallest models that can be cut: three dense layers, or one dense and two of experts."""

import dataclasses

import jax
import numpy as np
import pytest

import jax_mla

SMALL = dataclasses.replace(
    jax_mla.tiny(), hidden_size=32, intermediate_size=64, moe_intermediate_size=16,
    num_hidden_layers=3, num_attention_heads=2, q_lora_rank=16, kv_lora_rank=16,
    qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8, n_routed_experts=4, n_group=1,
    topk_group=1, initializer_range=0.1,
)  # fmt: skip


@pytest.fixture(scope="session")
def moe_config():
    return SMALL


@pytest.fixture(scope="session")
def dense_config():
    return dataclasses.replace(SMALL, n_routed_experts=None, tie_word_embeddings=True)


@pytest.fixture(scope="session")
def random_params():
    """Parameters of a config without compiling `init`; norms and the routers' bias vary too."""

    def draw(config):
        rng = np.random.default_rng(3)
        shapes = jax.eval_shape(lambda: jax_mla.init(jax.random.key(0), config))
        return jax.tree.map(lambda x: rng.normal(0, 0.3, x.shape).astype(x.dtype), shapes)

    return draw
