"""Operations of one training step, from the config alone."""

from __future__ import annotations

from jax_mla.config.model import DeepSeekConfig


def flops_per_token(config: DeepSeekConfig, row_tokens: int) -> float:
    """Multiplications and additions of the forward and backward pass, by token of a row.

    6 for every weight that a token is multiplied by, and 6 * (P + R + H) a head and layer for each
    of the row_tokens / 2 tokens that a token sees on average. What remat computes again does not
    count: a rate from this number measures useful work (model FLOP/s, MFU over the device's peak).
    """
    D, N = config.hidden_size, config.num_attention_heads
    Q, C, R = config.q_lora_rank, config.kv_lora_rank, config.qk_rope_head_dim
    P, H = config.qk_nope_head_dim, config.v_head_dim
    query = D * N * (P + R) if Q is None else Q * (D + N * (P + R))
    attention = query + D * (C + R) + C * N * (P + H) + N * H * D
    weights = config.num_hidden_layers * attention + D * config.vocab_size
    weights += config.num_dense_layers * 3 * D * config.intermediate_size
    if config.num_moe_layers:
        experts, active, F = config.moe_sizes
        used = active + (config.n_shared_experts or 0)
        weights += config.num_moe_layers * (3 * D * F * used + D * experts)
    scores = config.num_hidden_layers * N * (P + R + H) * row_tokens / 2
    return 6.0 * (weights + scores)
