"""Cases of both attention ops, for the simulator and for GPUs: sizes, masks and poison by name."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from numerics import normal, poison

from pallas_kernels import MLADecodePlan, mla_decode_plan
from pallas_kernels.hardware import WGMMA_ROWS
from pallas_kernels.mla_decode.sm90.config import BLOCK_KV

GARBAGE = 2147480000  # FlashMLA's filling of page-table entries past the last used page


@dataclasses.dataclass(frozen=True)
class AttentionCase:
    """Attention of T queries at the end of S keys, and its gradients.

    Fields:
      T: None is S.
      lengths: of each sequence; or is_ragged, drawn at random after a first one of 0.
      num_documents: per sequence, with borders drawn at random.
      documents: (segment id, positions) in this order, instead of num_documents.
      scale: None is the op's default.
      num_sms: CTAs that share the tiles; None is the device's multiprocessors.
    """

    S: int
    T: int | None = None
    B: int = 2
    N: int = 2
    G: int = 2
    K: int = 128
    H: int = 128
    causal: bool = True
    lengths: tuple[int, ...] | None = None
    is_ragged: bool = False
    num_documents: int = 1
    documents: tuple[tuple[int, int], ...] = ()
    deterministic: bool = False
    scale: float | None = None
    dtype: str = "bfloat16"
    num_sms: int | None = None

    def __str__(self) -> str:
        flags = ["causal" if self.causal else "full"]
        flags += ["lengths" + "-".join(map(str, self.lengths))] if self.lengths else []
        flags += ["ragged"] * self.is_ragged + ["deterministic"] * self.deterministic
        flags += [f"packed{self.num_documents}"] if self.num_documents > 1 else []
        flags += ["documents"] if self.documents else []
        flags += [f"scale{self.scale}"] if self.scale is not None else []
        flags += [f"sms{self.num_sms}"] if self.num_sms is not None else []
        sizes = f"B{self.B}-T{self.T or self.S}-S{self.S}-N{self.N}-G{self.G}-K{self.K}-H{self.H}"
        return "-".join([sizes, *flags, self.dtype])

    def options(self, seed: int = 0) -> dict:
        """Keyword arguments of the op."""
        rng = np.random.default_rng(seed)
        options = dict(causal=self.causal, deterministic=self.deterministic, scale=self.scale)
        options |= {"lengths": None, "segment_ids": None}
        if self.lengths is not None:
            options["lengths"] = np.asarray(self.lengths, np.int32)
        if self.is_ragged:
            drawn = rng.integers(1, self.S + 1, self.B - 1)
            options["lengths"] = np.array([0, *drawn], np.int32)
        if self.documents:
            ids = np.repeat(*np.array(self.documents, np.int32).T)
            options["segment_ids"] = np.tile(ids, (self.B, 1))
        elif self.num_documents > 1:
            options["segment_ids"] = np.stack([self._drawn_ids(rng) for _ in range(self.B)])
        return options

    def _drawn_ids(self, rng: np.random.Generator) -> np.ndarray:
        borders = rng.choice(np.arange(1, self.S), self.num_documents - 1, replace=False)
        return np.searchsorted(np.sort(borders), np.arange(self.S), side="right").astype(np.int32)

    def arrays(self, seed: int = 0) -> tuple[tuple, tuple]:
        """q, k, v with NaN past the lengths, and cotangents of out and lse."""
        T, S = self.T or self.S, self.S
        shapes = ((T, self.N, self.K), (S, self.G, self.K), (S, self.G, self.H))
        *keys, last, lse_key = jax.random.split(jax.random.key(seed), 5)
        q, k, v, dout = (
            jax.random.normal(key, (self.B, *shape), self.dtype)
            for key, shape in zip((*keys, last), (*shapes, (T, self.N, self.H)), strict=True)
        )
        if (lengths := self.options(seed)["lengths"]) is not None:
            is_past = np.arange(S) >= lengths[:, None]
            k, v = poison(k, is_past), poison(v, is_past)
        return (q, k, v), (dout, jax.random.normal(lse_key, (self.B, T, self.N)))


@dataclasses.dataclass(frozen=True)
class DecodeCase:
    """A batch of decode requests, small enough that the simulator takes seconds.

    Fields:
      num_sms: multiprocessors that the plan splits the work over.
    """

    lengths: tuple[int, ...]
    T: int = 1
    N: int = 16
    C: int = 128
    R: int = 64
    page_size: int = 64
    causal: bool = True
    dtype: str = "bfloat16"
    num_sms: int = 2

    def __str__(self) -> str:
        lengths = "-".join(map(str, self.lengths))
        flags = "" if self.causal else "-full"
        flags += "" if self.dtype == "bfloat16" else f"-{self.dtype}"
        sizes = f"T{self.T}-N{self.N}-{self.C}+{self.R}-page{self.page_size}"
        return f"S{lengths}-{sizes}{flags}-sms{self.num_sms}"

    def arrays(self, rng: np.random.Generator) -> dict[str, jax.Array]:
        """Shuffled pages; NaN in every row that no request owns, garbage in unused entries."""
        used = [-(-length // self.page_size) for length in self.lengths]
        num_pages = sum(used) + 1  # one page is nobody's
        order = iter(rng.permutation(num_pages))
        table = np.full((len(used), max(used) + 1), GARBAGE)
        is_unread = np.ones((num_pages, self.page_size), bool)
        for b, length in enumerate(self.lengths):
            for j in range(used[b]):
                table[b, j] = next(order)
                is_unread[table[b, j], : length - j * self.page_size] = False
        X = self.C + self.R
        kv_pages = normal(rng, (num_pages, self.page_size, X), self.dtype)
        return dict(
            q=normal(rng, (len(used), self.T, self.N, X), self.dtype),
            kv_pages=poison(kv_pages, is_unread),
            page_table=jnp.asarray(table, jnp.int32),
            lengths=jnp.asarray(self.lengths, jnp.int32),
        )

    def plan(self) -> MLADecodePlan:
        return mla_decode_plan(
            jnp.asarray(self.lengths, jnp.int32),
            num_rows=self.T * self.N,
            page_size=self.page_size,
            num_sms=self.num_sms,
        )

    def paths(self) -> set[str]:
        """Which ways through the kernels this batch takes, by its plan."""
        plan = self.plan()
        splits = np.diff(plan.num_splits)
        found = {"split" if n > 1 else "whole" for n in splits}
        found |= {"empty"} if 0 in self.lengths else set()
        hidden = self.T - 1 if self.causal else 0
        if self.T * self.N > WGMMA_ROWS and max(self.lengths) - hidden >= 2 * BLOCK_KV:
            found |= {"paired"}
        found |= {"idle"} if np.any(plan.begin_request > plan.end_request) else set()
        return found | ({"combine"} if plan.num_parts > 1 else set())
