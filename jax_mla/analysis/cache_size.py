"""What one token costs in the cache, against multi-head attention with the same heads."""

from __future__ import annotations

from jax_mla.config.model import DTYPE_BYTES, DeepSeekConfig


def cache_bytes_per_token(config: DeepSeekConfig) -> dict[str, int | float]:
    """Bytes over all layers in the config's dtype: `latent` (X = C + R), `mha` (N * (P + R + H)).

    Multi-head attention caches a whole key (P + R) and a whole value (H) for each head; `ratio` is
    mha / latent.
    """
    number = DTYPE_BYTES[config.dtype] * config.num_hidden_layers
    latent = number * config.cache_row_dim
    mha = number * config.num_attention_heads * (config.qk_head_dim + config.v_head_dim)
    return {"latent": latent, "mha": mha, "ratio": mha / latent}
