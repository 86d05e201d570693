"""Published architectures by name."""

from __future__ import annotations

import dataclasses

from jax_mla.config.model import DeepSeekConfig
from jax_mla.config.rope import RopeScaling


def _yarn(factor: float, original: int, mscale: float, beta_fast: float = 32.0) -> RopeScaling:
    return RopeScaling("yarn", factor, original, beta_fast, 1.0, mscale, mscale)


def tiny() -> DeepSeekConfig:
    """The bundled model: DeepSeek-V3 in miniature, with a vocabulary of bytes."""
    return DeepSeekConfig(
        vocab_size=320, hidden_size=192, intermediate_size=512, moe_intermediate_size=96,
        num_hidden_layers=5, num_attention_heads=6, q_lora_rank=96, kv_lora_rank=64,
        qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32, n_routed_experts=8,
        n_shared_experts=1, num_experts_per_tok=2, first_k_dense_replace=1, n_group=4,
        topk_group=2, routed_scaling_factor=2.5, max_position_embeddings=4096,
        rope_scaling=_yarn(8.0, 512, 1.0), bos_token_id=256, eos_token_id=(257,), pad_token_id=258,
    )  # fmt: skip


def v2_lite() -> DeepSeekConfig:
    """DeepSeek-V2-Lite: 15.7 B parameters, 2.4 B active."""
    return DeepSeekConfig(
        model_type="deepseek_v2", vocab_size=102400, hidden_size=2048, intermediate_size=10944,
        moe_intermediate_size=1408, num_hidden_layers=27, num_attention_heads=16, q_lora_rank=None,
        kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128,
        n_routed_experts=64, n_shared_experts=2, num_experts_per_tok=6, first_k_dense_replace=1,
        n_group=1, topk_group=1, topk_method="greedy", scoring_func="softmax",
        norm_topk_prob=False, rope_scaling=_yarn(40.0, 4096, 0.707),
        max_position_embeddings=163840, bos_token_id=100000, eos_token_id=(100001,),
        dtype="bfloat16",
    )  # fmt: skip


def v2() -> DeepSeekConfig:
    """DeepSeek-V2: 236 B parameters, 21 B active."""
    return dataclasses.replace(
        v2_lite(), hidden_size=5120, intermediate_size=12288, moe_intermediate_size=1536,
        num_hidden_layers=60, num_attention_heads=128, q_lora_rank=1536, n_routed_experts=160,
        n_group=8, topk_group=3, topk_method="group_limited_greedy", routed_scaling_factor=16.0,
    )  # fmt: skip


def v3() -> DeepSeekConfig:
    """DeepSeek-V3 and R1: 671 B parameters, 37 B active; multi-token prediction not counted."""
    return DeepSeekConfig(
        vocab_size=129280, hidden_size=7168, intermediate_size=18432, moe_intermediate_size=2048,
        num_hidden_layers=61, num_attention_heads=128, q_lora_rank=1536, kv_lora_rank=512,
        qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, n_routed_experts=256,
        n_shared_experts=1, num_experts_per_tok=8, first_k_dense_replace=3, n_group=8,
        topk_group=4, routed_scaling_factor=2.5, rope_scaling=_yarn(40.0, 4096, 1.0),
        max_position_embeddings=163840, num_nextn_predict_layers=1, bos_token_id=0,
        eos_token_id=(1,), dtype="bfloat16",
    )  # fmt: skip


def kimi_k2() -> DeepSeekConfig:
    """Kimi K2 (Instruct): 1.03 T parameters, 32 B active."""
    return dataclasses.replace(
        v3(), model_type="kimi_k2", vocab_size=163840, num_attention_heads=64,
        n_routed_experts=384, first_k_dense_replace=1, n_group=1, topk_group=1,
        routed_scaling_factor=2.827, rope_theta=50000.0,
        rope_scaling=_yarn(32.0, 4096, 1.0, beta_fast=1.0), max_position_embeddings=131072,
        num_nextn_predict_layers=0, bos_token_id=163584, eos_token_id=(163585,),
        pad_token_id=163839,
    )  # fmt: skip
