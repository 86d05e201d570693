"""Shapes of flash attention that tests, tuning and the benchmark share."""

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.flash_attention.api import flash_attention


@dataclasses.dataclass(frozen=True)
class Workload:
    """Self-attention of S tokens, forward or forward and backward."""

    B: int
    S: int
    N: int
    G: int
    K: int
    H: int
    causal: bool = True
    is_backward: bool = False
    dtype: str = "bfloat16"

    @property
    def name(self) -> str:
        direction = "backward" if self.is_backward else "forward"
        mask = "causal" if self.causal else "full"
        sizes = f"B{self.B}-S{self.S}-N{self.N}-G{self.G}-K{self.K}-H{self.H}"
        return f"{direction}-{mask}-{sizes}-{self.dtype}"

    def arrays(self) -> tuple[jax.Array, ...]:
        """q, k, v, and the cotangent of out."""
        shapes = [(self.N, self.K), (self.G, self.K), (self.G, self.H), (self.N, self.H)]
        keys = jax.random.split(jax.random.key(0), len(shapes))
        return tuple(
            jax.random.normal(key, (self.B, self.S, *shape), self.dtype)
            for key, shape in zip(keys, shapes, strict=True)
        )

    def function(self, implementation: dispatch.Name | None):
        """What the benchmark times."""

        def forward(q, k, v):
            return flash_attention(q, k, v, causal=self.causal, implementation=implementation)

        def run(q, k, v, dout):
            if not self.is_backward:
                return forward(q, k, v)
            return jax.vjp(forward, q, k, v)[1](dout)

        return run

    @property
    def flops(self) -> int:
        """Two matmuls forward; a backward run has those, to get lse, and five of its own."""
        columns = 4 * self.K + 3 * self.H if self.is_backward else self.K + self.H
        return 2 * self.B * self.N * self.S * self.S * columns // (2 if self.causal else 1)

    @property
    def bytes(self) -> int:
        tensors = self.N * (self.K + self.H) + self.G * (self.K + self.H)
        passes = 3 if self.is_backward else 1
        return passes * self.B * self.S * tensors * jnp.dtype(self.dtype).itemsize


WORKLOADS = [
    Workload(B=1, S=S, N=N, G=N, K=K, H=128, causal=causal, is_backward=is_backward)
    for is_backward in (False, True)
    for K in (192, 128)
    for N in (16, 128)
    for causal in (True, False)
    for S in (1024, 4096, 16384, 32768)
]
QUICK = [
    Workload(B=16, S=256, N=6, G=6, K=48, H=32, is_backward=is_backward, dtype="float32")
    for is_backward in (False, True)
] + [Workload(B=1, S=2048, N=8, G=2, K=64, H=64, dtype="float32")]
