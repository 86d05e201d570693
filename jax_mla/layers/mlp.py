"""SwiGLU, the dense feed-forward layer."""

from __future__ import annotations

import jax
from flax import nnx
from jaxtyping import Array, Float

from jax_mla.layers.linear import project, weight


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
        rngs: nnx.Rngs,
        stddev: float = 0.02,
        dtype: str = "float32",
    ):
        into, out = (hidden_size, intermediate_size), (intermediate_size, hidden_size)
        self.gate_proj = weight(rngs, into, ("embed", "mlp"), stddev=stddev, dtype=dtype)
        self.up_proj = weight(rngs, into, ("embed", "mlp"), stddev=stddev, dtype=dtype)
        self.down_proj = weight(rngs, out, ("mlp", "embed"), stddev=stddev, dtype=dtype)

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        gate = project("...D,DF->...F", x, self.gate_proj[...])
        up = project("...D,DF->...F", x, self.up_proj[...])
        return project("...F,FD->...D", jax.nn.silu(gate) * up, self.down_proj[...])
