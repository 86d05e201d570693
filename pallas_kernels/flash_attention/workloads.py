"""Shapes of flash attention that tests, tuning and the benchmark share."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.flash_attention.api import flash_attention

Forward = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]  # q, k, v -> out


@dataclasses.dataclass(frozen=True)
class Workload:
    """Attention of S tokens, or of the last T to all S; num_documents per sequence."""

    B: int
    S: int
    N: int
    G: int
    K: int
    H: int
    causal: bool = True
    is_backward: bool = False
    num_documents: int = 1
    deterministic: bool = False
    dtype: str = "bfloat16"
    T: int | None = None

    @property
    def name(self) -> str:
        direction = "backward" if self.is_backward else "forward"
        direction += "-deterministic" if self.deterministic else ""
        mask = "causal" if self.causal else "full"
        packed = f"-packed{self.num_documents}" if self.num_documents > 1 else ""
        queries = f"-T{self.T}" if self.T else ""
        sizes = f"B{self.B}{queries}-S{self.S}{packed}-N{self.N}-G{self.G}-K{self.K}-H{self.H}"
        return f"{direction}-{mask}-{sizes}-{self.dtype}"

    def document_lengths(self) -> np.ndarray:
        """Tokens of each document, for every sequence: borders are drawn uniformly."""
        rng = np.random.default_rng(0)
        borders = np.sort(rng.choice(np.arange(1, self.S), self.num_documents - 1, replace=False))
        return np.diff(np.concatenate([[0], borders, [self.S]]))

    def arrays(self, seed: int = 0) -> tuple[jax.Array, ...]:
        """q, k, v, and the cotangent of out."""
        T, S, N, G, K, H = self.T or self.S, self.S, self.N, self.G, self.K, self.H
        shapes = [(T, N, K), (S, G, K), (S, G, H), (T, N, H)]
        keys = jax.random.split(jax.random.key(seed), len(shapes))
        return tuple(
            jax.random.normal(key, (self.B, *shape), self.dtype)
            for key, shape in zip(keys, shapes, strict=True)
        )

    def prepare(self, arrays, implementation: str | Forward | None) -> tuple:
        """Arguments of `function`: q, k, v, or the pullback and the cotangent."""
        q, k, v, dout = arrays
        if not self.is_backward:
            return q, k, v
        forward = functools.partial(self._forward, implementation)
        return jax.vjp(jax.jit(forward), q, k, v)[1], dout

    def function(self, implementation: str | Forward | None) -> Callable:
        """What the benchmark times; a backward pass is timed without the forward one."""
        if self.is_backward:
            return lambda pullback, dout: pullback(dout)
        return functools.partial(self._forward, implementation)

    def _forward(self, implementation, q, k, v):
        if callable(implementation):
            return implementation(q, k, v)
        segment_ids = None
        if self.num_documents > 1:
            ids = np.repeat(np.arange(self.num_documents, dtype=np.int32), self.document_lengths())
            segment_ids = jnp.broadcast_to(ids, (self.B, self.S))
        return flash_attention(
            q,
            k,
            v,
            causal=self.causal,
            segment_ids=segment_ids,
            deterministic=self.deterministic,
            implementation=implementation,
        )

    @property
    def flops(self) -> int:
        """Two matmuls forward, five backward; hidden pairs of a query and a key do not count."""
        columns = 3 * self.K + 2 * self.H if self.is_backward else self.K + self.H
        pairs = int(np.sum(self.document_lengths() ** 2))
        if self.T:  # the causal border hides half of the T by T pairs at the end
            pairs = self.T * (2 * self.S - self.T if self.causal else self.S)
        return 2 * self.B * self.N * pairs * columns // (2 if self.causal else 1)

    @property
    def bytes(self) -> int:
        """Inputs and outputs once: backward reads five tensors and writes three."""
        T, S = self.T or self.S, self.S
        q, k = T * self.N * self.K, S * self.G * self.K
        v, out = S * self.G * self.H, T * self.N * self.H
        numbers = 2 * (q + k + v) + 2 * out if self.is_backward else q + k + v + out
        return self.B * numbers * jnp.dtype(self.dtype).itemsize


def _sizes(S: int, **options) -> Workload:
    """At least 16k tokens."""
    return Workload(B=max(1, 16384 // S), S=S, H=128, **options)


# One after another for every shape, so that the two kinds of gradients stand side by side.
DIRECTIONS = (
    {"is_backward": False},
    {"is_backward": True},
    {"is_backward": True, "deterministic": True},
)
WORKLOADS = [
    _sizes(S, N=N, G=N, K=K, causal=causal, **direction)
    for K in (192, 128)
    for N in (16, 128)
    for causal in (True, False)
    for S in (1024, 4096, 16384, 32768)
    for direction in DIRECTIONS
    if S in (4096, 16384) or "deterministic" not in direction
]
WORKLOADS += [
    _sizes(32768, N=16, G=16, K=K, num_documents=16, **direction)
    for K in (192, 128)
    for direction in DIRECTIONS
]
# A chunk of a long prompt's prefill.
WORKLOADS += [Workload(B=1, T=2048, S=32768, N=16, G=16, K=K, H=128) for K in (192, 128)]
SMOKE = [
    _sizes(16384, N=16, G=16, K=K, **direction) for K in (192, 128) for direction in DIRECTIONS
]
QUICK = [
    Workload(B=16, S=256, N=6, G=6, K=48, H=32, is_backward=is_backward, dtype="float32")
    for is_backward in (False, True)
] + [Workload(B=1, S=2048, N=8, G=2, K=64, H=64, dtype="float32")]
