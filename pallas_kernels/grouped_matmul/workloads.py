"""Shapes of the grouped matmul that tests, tuning and the benchmark share."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import dispatch
from pallas_kernels.grouped_matmul.api import grouped_matmul


@dataclasses.dataclass(frozen=True)
class Workload:
    """M rows whose groups are drawn uniformly, forward or forward and backward."""

    M: int
    E: int
    K: int
    N: int
    is_backward: bool = False
    dtype: str = "bfloat16"

    @property
    def name(self) -> str:
        direction = "backward" if self.is_backward else "forward"
        return f"{direction}-M{self.M}-E{self.E}-K{self.K}-N{self.N}-{self.dtype}"

    def group_sizes(self) -> np.ndarray:
        return np.random.default_rng(0).multinomial(self.M, np.full(self.E, 1 / self.E))

    def arrays(self, seed: int = 0) -> tuple[jax.Array, ...]:
        """lhs, rhs, group_sizes, and the cotangent of the result."""
        keys = jax.random.split(jax.random.key(seed), 3)
        lhs = jax.random.normal(keys[0], (self.M, self.K), self.dtype)
        rhs = jax.random.normal(keys[1], (self.E, self.K, self.N), self.dtype) / self.K**0.5
        dout = jax.random.normal(keys[2], (self.M, self.N), self.dtype)
        return lhs, rhs, jnp.asarray(self.group_sizes(), jnp.int32), dout

    def prepare(self, arrays: tuple, implementation: str | None) -> tuple:
        """Arguments of `function`."""
        return arrays

    def function(self, implementation: dispatch.Name | None) -> Callable:
        """What the benchmark times."""

        def run(lhs, rhs, group_sizes, dout):
            def forward(lhs, rhs):
                return grouped_matmul(lhs, rhs, group_sizes, implementation=implementation)

            if not self.is_backward:
                return forward(lhs, rhs)
            return jax.vjp(forward, lhs, rhs)[1](dout)

        return run

    @property
    def flops(self) -> int:
        # A backward run keeps nothing of its forward pass, so that is not computed.
        return 2 * self.M * self.K * self.N * (2 if self.is_backward else 1)

    @property
    def bytes(self) -> int:
        weights = int(np.count_nonzero(self.group_sizes())) * self.K * self.N
        numbers = weights + self.M * (self.K + self.N)
        return numbers * (2 if self.is_backward else 1) * jnp.dtype(self.dtype).itemsize


WORKLOADS = [
    # DeepSeek-V3: decode of 128 tokens and of 4096, prefill of 4096 (8 experts per token).
    Workload(M=1024, E=256, K=7168, N=2048),
    Workload(M=32768, E=256, K=7168, N=2048),
    Workload(M=32768, E=256, K=2048, N=7168),
    # DeepSeek-V2-Lite in training: 8192 tokens, 6 experts each.
    Workload(M=49152, E=64, K=2048, N=1408),
    Workload(M=49152, E=64, K=2048, N=1408, is_backward=True),
]
SMOKE = [WORKLOADS[1]]
QUICK = [
    Workload(M=4, E=16, K=512, N=704, dtype="float32"),
    Workload(M=32, E=16, K=512, N=704, dtype="float32"),
    Workload(M=8192, E=8, K=192, N=96, dtype="float32"),
    Workload(M=8192, E=8, K=192, N=96, is_backward=True, dtype="float32"),
]
