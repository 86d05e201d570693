"""Shapes of MLA decode that tests, tuning and the benchmark share."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import dispatch
from pallas_kernels.mla_decode.api import mla_decode
from pallas_kernels.mla_decode.plan import mla_decode_plan


@dataclasses.dataclass(frozen=True)
class Workload:
    """One decode step; lengths are all S, or drawn from normal(S, S / 2), or those listed."""

    B: int
    T: int
    N: int
    S: int
    is_ragged: bool = False
    listed: tuple[int, ...] = ()
    C: int = 512
    R: int = 64
    page_size: int = 64
    dtype: str = "bfloat16"

    @property
    def name(self) -> str:
        kind = "-listed" if self.listed else "-ragged" if self.is_ragged else ""
        return f"B{self.B}-T{self.T}-N{self.N}-S{self.S}{kind}-{self.dtype}"

    def lengths(self) -> np.ndarray:
        if self.listed:
            return np.array(self.listed)
        if not self.is_ragged:
            return np.full(self.B, self.S)
        drawn = np.random.default_rng(0).normal(self.S, self.S / 2, self.B)
        return np.clip(drawn, self.T, 2 * self.S).astype(int)

    def arrays(self, seed: int = 0) -> tuple:
        """q, kv_pages, page_table, lengths, plan: shuffled pages, values FlashMLA's normal / 10.

        One plan serves the layers of a step, so making it is not part of what is timed.
        """
        lengths = self.lengths()
        used = -(-lengths // self.page_size)
        pages = np.random.default_rng(seed).permutation(used.sum())
        table = np.zeros((self.B, used.max()), np.int32)
        table[np.arange(used.max()) < used[:, None]] = pages
        keys, width = jax.random.split(jax.random.key(seed)), self.C + self.R
        q = jax.random.normal(keys[0], (self.B, self.T, self.N, width), self.dtype)
        kv = jax.random.normal(keys[1], (pages.size, self.page_size, width), self.dtype)
        lengths = jnp.asarray(lengths, jnp.int32)
        plan = mla_decode_plan(lengths, num_rows=self.T * self.N, page_size=self.page_size)
        return q / 10, kv / 10, jnp.asarray(table), lengths, plan

    def prepare(self, arrays: tuple, implementation: str | None) -> tuple:
        """Arguments of `function`."""
        return arrays

    def function(self, implementation: dispatch.Name | None) -> Callable:
        """What the benchmark times: the whole op, including the merge of split requests."""

        def run(q, kv_pages, page_table, lengths, plan):
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
        """FlashMLA's count, in which keys hidden by causality count too."""
        return 2 * self.T * self.N * int(self.lengths().sum()) * (2 * self.C + self.R)

    @property
    def bytes(self) -> int:
        """FlashMLA's count: queries, outputs, and every cached token once."""
        width = self.C + self.R
        numbers = int(self.lengths().sum()) * width + self.B * self.T * self.N * (width + self.C)
        return numbers * jnp.dtype(self.dtype).itemsize


# The example of an irregular step in ThunderMLA's announcement.
IRREGULAR = Workload(B=4, T=4, N=16, S=45118, listed=(4641, 45118, 1730, 1696))
# FlashMLA's own table of shapes, and the irregular one.
WORKLOADS = [
    Workload(B=128, T=T, N=N, S=S, is_ragged=is_ragged)
    for N in (16, 64, 128)
    for T in (1, 2)
    for S in (4096, 8192, 16384, 32768)
    for is_ragged in (False, True)
] + [IRREGULAR]
SMOKE = [Workload(B=128, T=1, N=N, S=4096) for N in (16, 128)] + [IRREGULAR]
QUICK = [
    Workload(B=1, T=1, N=16, S=256, dtype="float32"),
    Workload(B=8, T=1, N=16, S=256, dtype="float32"),
    Workload(B=8, T=2, N=16, S=300, is_ragged=True),
]
