"""Generation: sampling from logits, and the loop that writes tokens."""

from jax_mla.generation.loop import Generated, generate
from jax_mla.generation.sampling import sample

__all__ = ["Generated", "generate", "sample"]
