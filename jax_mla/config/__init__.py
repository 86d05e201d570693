"""What a model is made of: the fields of a published config.json, presets, families. No jax."""

from jax_mla.config.model import DeepSeekConfig
from jax_mla.config.presets import kimi_k2, tiny, v2, v2_lite, v3
from jax_mla.config.rope import RopeScaling

__all__ = ["DeepSeekConfig", "RopeScaling", "kimi_k2", "tiny", "v2", "v2_lite", "v3"]
