"""Multi-head latent attention."""

from jax_mla.layers.mla.module import MLA

__all__ = ["MLA"]
