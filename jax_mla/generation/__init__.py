"""Generation: sampling from logits, and the loop that writes tokens."""

from jax_mla.generation.loop import Generated, generate
from jax_mla.generation.sampling import SamplingOptions, sample

__all__ = ["Generated", "SamplingOptions", "generate", "sample"]
