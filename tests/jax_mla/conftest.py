"""The smallest model that has every part, for tests that train it, cut it or spread it."""

import dataclasses

import pytest

import jax_mla


@pytest.fixture(scope="session")
def config():
    """One dense block and one mixture of four experts."""
    return dataclasses.replace(
        jax_mla.tiny(), hidden_size=32, intermediate_size=64, moe_intermediate_size=16,
        num_hidden_layers=2, num_attention_heads=2, q_lora_rank=16, kv_lora_rank=16,
        qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8, n_routed_experts=4, n_group=1,
        topk_group=1, initializer_range=0.1,
    )  # fmt: skip
