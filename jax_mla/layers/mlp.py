"""SwiGLU, the dense feed-forward layer."""

from __future__ import annotations

import functools

import jax
from flax import nnx
from jaxtyping import Array, Float

from jax_mla.checks.arrays import check_hidden
from jax_mla.layers.linear import Linear, RngsLike, as_rngs


class SwiGLU(nnx.Module):
    """Feed-forward layer with a gated linear unit.

    y = (silu(x @ gate_proj) * (x @ up_proj)) @ down_proj

    Args:
      hidden_size: D, width of input and output.
      intermediate_size: F, width between the projections.

    Source: Shazeer, arXiv 2002.05202.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        *,
        rngs: RngsLike,
        stddev: float = 0.02,
        dtype: str = "float32",
    ) -> None:
        self.hidden_size = hidden_size
        linear = functools.partial(Linear, rngs=as_rngs(rngs), stddev=stddev, dtype=dtype)
        into, out = (hidden_size, intermediate_size), (intermediate_size, hidden_size)
        self.gate_proj = linear("...D,DF->...F", into, ("embed", "mlp"))
        self.up_proj = linear("...D,DF->...F", into, ("embed", "mlp"))
        self.down_proj = linear("...F,FD->...D", out, ("mlp", "embed"))

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        check_hidden(x, self.hidden_size)
        return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))
