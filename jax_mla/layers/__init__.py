"""The parts of a model: small Flax modules that declare weights and call pure functions."""

from jax_mla.layers.block import Block
from jax_mla.layers.gqa import GroupedQueryAttention, KeyValueCache
from jax_mla.layers.linear import Linear
from jax_mla.layers.mla import MLA
from jax_mla.layers.mlp import SwiGLU
from jax_mla.layers.moe import MoE
from jax_mla.layers.norm import RMSNorm

__all__ = [
    "MLA",
    "Block",
    "GroupedQueryAttention",
    "KeyValueCache",
    "Linear",
    "MoE",
    "RMSNorm",
    "SwiGLU",
]
