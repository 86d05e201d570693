"""Shapes of MLA decode that tests, tuning and the benchmark share."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import dispatch
from pallas_kernels.mla_decode.api import mla_decode
from pallas_kernels.mla_decode.plan import mla_decode_plan


@dataclasses.dataclass(frozen=True)
class Workload:
    """One decode step; lengths are all S, or drawn from normal(S, S / 2)."""

    B: int
    T: int
    N: int
    S: int
    is_ragged: bool = False
    C: int = 512
    R: int = 64
    page_size: int = 64
    dtype: str = "bfloat16"

    @property
    def name(self) -> str:
        return f"B{self.B}-T{self.T}-N{self.N}-S{self.S}{'-ragged' * self.is_ragged}-{self.dtype}"

    def lengths(self) -> np.ndarray:
        if not self.is_ragged:
            return np.full(self.B, self.S)
        drawn = np.random.default_rng(0).normal(self.S, self.S / 2, self.B)
        return np.clip(drawn, self.T, 2 * self.S).astype(int)

    def arrays(self) -> tuple[jax.Array, ...]:
        """q, kv_pages, page_table, lengths; pages shuffled, values FlashMLA's normal / 10."""
        rng, lengths = np.random.default_rng(0), self.lengths()
        max_pages = -(-int(lengths.max()) // self.page_size)
        pages = rng.permutation(self.B * max_pages).reshape(self.B, max_pages)
        keys, width = jax.random.split(jax.random.key(0)), self.C + self.R
        q = jax.random.normal(keys[0], (self.B, self.T, self.N, width), self.dtype)
        kv = jax.random.normal(keys[1], (pages.size, self.page_size, width), self.dtype)
        return q / 10, kv / 10, jnp.asarray(pages, jnp.int32), jnp.asarray(lengths, jnp.int32)

    def function(self, implementation: dispatch.Name | None):
        """What the benchmark times; one plan serves many layers, so it is not part of it."""
        plan = mla_decode_plan(
            jnp.asarray(self.lengths()), num_rows=self.T * self.N, page_size=self.page_size
        )

        def run(q, kv_pages, page_table, lengths):
            return mla_decode(
                q,
                kv_pages,
                page_table,
                lengths,
                latent_dim=self.C,
                scale=(self.C + self.R) ** -0.5,
                plan=plan,
                implementation=implementation,
            )

        return run

    @property
    def flops(self) -> int:
        return 2 * self.T * self.N * int(self.lengths().sum()) * (2 * self.C + self.R)

    @property
    def bytes(self) -> int:
        width = self.C + self.R
        numbers = int(self.lengths().sum()) * width + self.B * self.T * self.N * (width + self.C)
        return numbers * jnp.dtype(self.dtype).itemsize


# FlashMLA's own table of shapes.
WORKLOADS = [
    Workload(B=128, T=T, N=N, S=S, is_ragged=is_ragged)
    for N in (16, 64, 128)
    for T in (1, 2)
    for S in (4096, 8192, 16384, 32768)
    for is_ragged in (False, True)
]
QUICK = [
    Workload(B=1, T=1, N=16, S=256, dtype="float32"),
    Workload(B=8, T=1, N=16, S=256, dtype="float32"),
    Workload(B=8, T=2, N=16, S=300, is_ragged=True),
]
