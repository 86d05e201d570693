"""Merging two attentions over disjoint keys into one over all of them."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from pallas_kernels.checks import require, require_shape


def merge_attention(
    out_a: Float[Array, "*rows H"],
    lse_a: Float32[Array, "*rows"],
    out_b: Float[Array, "*rows H"],
    lse_b: Float32[Array, "*rows"],
) -> tuple[Float[Array, "*rows H"], Float32[Array, "*rows"]]:
    """Returns the attention over the union of the keys of two partial attentions.

    lse = log(exp(lse_a) + exp(lse_b)); out = exp(lse_a - lse) * out_a + exp(lse_b - lse) * out_b.

    Differentiable in both modes. Computed in float32.

    Args:
      out_a: result over the first keys, normalised by them alone.
      lse_a: natural log of its sum of exponentials; -inf for a row without keys, whose out is
        ignored.
      out_b: result over the other keys.
      lse_b: as lse_a. Where both are -inf, out is 0 and lse -inf, and all gradients are 0, even
        where a later log or division made the cotangents NaN.

    Returns:
      out in out_a's dtype, and lse.

    Raises:
      ValueError: shapes disagree, or an lse is not float32; the message names both.

    Source: Milakov and Gimelshein, Online normalizer calculation for softmax, arXiv 1805.02867.
    """
    for name, x, want in (
        ("out_b", out_b, out_a.shape),
        ("lse_a", lse_a, out_a.shape[:-1]),
        ("lse_b", lse_b, out_a.shape[:-1]),
    ):
        require_shape("merge_attention", name, x, want, f"out_a {out_a.shape}")
    for name, x in (("lse_a", lse_a), ("lse_b", lse_b)):
        message = f"merge_attention: {name} must have dtype float32, got {x.dtype}"
        require(x.dtype == jnp.float32, message)
    return _merge(out_a, lse_a, out_b, lse_b)


@jax.jit
def _merge(out_a, lse_a, out_b, lse_b):
    highest = jax.lax.stop_gradient(jnp.maximum(lse_a, lse_b))
    highest = jnp.where(highest == -jnp.inf, 0, highest)  # -inf - -inf would be NaN
    weight_a, weight_b = jnp.exp(lse_a - highest), jnp.exp(lse_b - highest)
    total = weight_a + weight_b
    is_empty = total == 0
    total = jnp.where(is_empty, 1, total)

    def share(weight, lse, out):
        out = jnp.where((lse == -jnp.inf)[..., None], 0, out.astype(jnp.float32))
        return (weight / total)[..., None] * out

    out = share(weight_a, lse_a, out_a) + share(weight_b, lse_b, out_b)
    out = jnp.where(is_empty[..., None], 0, out)  # is 0 already; its cotangent may be NaN
    lse = jnp.where(is_empty, -jnp.inf, highest + jnp.log(total))
    return out.astype(out_a.dtype), lse
