"""Mixture of experts."""

from jax_mla.layers.moe.module import MoE

__all__ = ["MoE"]
