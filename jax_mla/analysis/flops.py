"""Operations of one training step, from the config alone."""

from __future__ import annotations

from jax_mla.config.leaves import Leaf, leaves_of
from jax_mla.config.model import DeepSeekConfig


def flops_per_token(config: DeepSeekConfig, row_tokens: int) -> float:
    """Multiplications and additions of the forward and backward pass, per token of a row.

    6 for every weight that a token is multiplied by, and 6 * (P + R + H) per head and layer for
    each of the row_tokens / 2 tokens that a token attends to on average. What remat computes again
    does not count: a rate from this number measures useful work (model FLOP/s, MFU over the
    device's peak).
    """
    weights = sum(_multiplied(leaf, config) for leaf in leaves_of(config))
    per_head = config.qk_head_dim + config.v_head_dim
    heads = config.num_hidden_layers * config.num_attention_heads
    return 6.0 * (weights + heads * per_head * row_tokens / 2)


def _multiplied(leaf: Leaf, config: DeepSeekConfig) -> int:
    """How many numbers of a leaf each token is multiplied by."""
    is_head = leaf.type.part == "head" or (
        leaf.type.part == "embedding" and config.tie_word_embeddings
    )
    if leaf.type.kind != "matrix" and not is_head:
        return 0
    if "expert" not in leaf.axes:
        return leaf.size
    experts, active, _ = config.moe_sizes
    return leaf.size // experts * active
