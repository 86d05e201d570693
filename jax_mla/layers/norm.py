"""RMSNorm."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jax_mla.checks.sizes import check_positive
from jax_mla.layers.linear import constant

# The norms of the two latents use this epsilon whatever the config's rms_norm_eps is.
LATENT_NORM_EPS = 1e-6


def rms_norm(
    x: Float[Array, "*B D"], weight: Float[Array, " D"], eps: float
) -> Float[Array, "*B D"]:
    """x / sqrt(mean(x ** 2) + eps) * weight, computed in float32, returned in x's dtype."""
    wide = x.astype(jnp.float32)
    normed = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    scale = weight.astype(x.dtype).reshape((1,) * (x.ndim - 1) + weight.shape)
    return normed.astype(x.dtype) * scale


class RMSNorm(nnx.Module):
    """Root-mean-square normalisation over the last axis, with a learned scale.

    y = x / sqrt(mean(x ** 2) + eps) * weight

    Args:
      dim: size of the last axis.
      eps: added to the mean square before the root.

    Raises:
      ValueError: dim is not positive, or the last axis of an x is not dim.

    Source: Zhang & Sennrich, arXiv 1910.07467.
    """

    def __init__(
        self, dim: int, *, eps: float = 1e-6, logical_axis: str = "norm", dtype: str = "float32"
    ) -> None:
        check_positive(dim=dim)
        self.eps = eps
        self.weight = constant(1.0, (dim,), (logical_axis,), dtype=dtype)

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        weight = self.weight[...]
        if x.shape[-1:] != weight.shape:
            raise ValueError(f"x has shape {x.shape}, the norm a weight of {weight.shape}")
        return rms_norm(x, weight, self.eps)
