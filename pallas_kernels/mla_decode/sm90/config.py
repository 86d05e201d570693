"""What the shapes decide about MLA decode on Hopper. Imports no Mosaic."""

import dataclasses

from pallas_kernels import hardware
from pallas_kernels.hardware import WGMMA_ROWS

DTYPES = ("bfloat16", "float16")
PAGE_SIZES = (64, 128)
BLOCK_KV = 64  # tokens that are multiplied at once; a page is one or two blocks
WARPGROUP = 128  # threads, over which the merge spreads a row
MAX_LATENT_DIM = 512  # a warpgroup holds 64 rows of half of it, 128 registers per thread
# Rows are copied in eights, the height of a tile in shared memory; other numbers are padded.
ROW_ALIGNMENT = 8
# Where a running maximum starts. Not -inf: -inf - -inf is NaN in a row that sees no key yet.
LOWEST = -1e30


@dataclasses.dataclass(frozen=True)
class Config:
    """Static options of the main kernel; NOTES.md has the reasons for the figures.

    Fields:
      is_paired: both computing warpgroups score, each one block of a pair.
      num_slots: blocks of keys and values in shared memory.
      compute_registers, memory_registers: per thread; two warpgroups compute, one copies.
    """

    num_queries: int
    num_heads: int
    latent_dim: int
    rope_dim: int
    scale: float
    causal: bool
    is_paired: bool
    num_slots: int
    compute_registers: int = 240
    memory_registers: int = 24

    @classmethod
    def of(cls, q, *, latent_dim: int, scale: float, causal: bool) -> "Config":
        _, T, N, X = q.shape
        rope_dim = X - latent_dim
        return cls(
            num_queries=T,
            num_heads=N,
            latent_dim=latent_dim,
            rope_dim=rope_dim,
            scale=scale,
            causal=causal,
            # One tile of rows waits for memory; several that share it wait for the tensor cores.
            is_paired=T * N > WGMMA_ROWS,
            num_slots=_num_slots(latent_dim, rope_dim),
        )

    @property
    def reuses_rope(self) -> bool:
        """Probabilities take the place of a block's rotary keys, which have been used by then."""
        return self.rope_dim == BLOCK_KV


@dataclasses.dataclass(frozen=True)
class CombineConfig:
    """Static options of the merge of partial results.

    Fields:
      rows: query rows of a request that one CTA merges.
      num_warpgroups: warpgroups of a CTA, among which the splits are divided.
    """

    rows: int
    num_warpgroups: int

    @classmethod
    def of(cls, num_requests: int, num_rows: int) -> "CombineConfig":
        # CTAs of eight rows if there is one for every multiprocessor: most have nothing to merge,
        # so there should be few. Else few requests have many splits: those are read side by side.
        if num_requests * num_rows >= 8 * hardware.H200_NUM_SMS:
            return cls(rows=8, num_warpgroups=1)
        return cls(rows=1, num_warpgroups=4)


def refusal(row_dim: int, dtype: str, page_size: int, latent_dim: int, scale: float) -> str | None:
    """Why the kernel does not do these sizes on any GPU, or None."""
    rope_dim = row_dim - latent_dim
    if dtype not in DTYPES:
        return f"the dtype must be one of {list(DTYPES)}, got {dtype}"
    if page_size not in PAGE_SIZES:
        return f"pages must have one of {list(PAGE_SIZES)} tokens, got {page_size}"
    if latent_dim % 64 or latent_dim > MAX_LATENT_DIM:
        return f"latent_dim must be a multiple of 64 up to {MAX_LATENT_DIM}, got {latent_dim}"
    if rope_dim % 16 or rope_dim == 0:
        return f"the rotary part must be a positive multiple of 16, got {rope_dim}"
    if _num_slots(latent_dim, rope_dim) < 2:
        return (
            f"rows of {latent_dim} + {rope_dim} need {_shared_bytes(latent_dim, rope_dim, 2)} bytes"
            f" of shared memory, which must be at most {hardware.SM90_SHARED_MEMORY_BYTES}"
        )
    if not scale > 0:
        return f"scale must be positive, got {scale}"
    return None


def _num_slots(latent_dim: int, rope_dim: int) -> int:
    """Blocks that fit; more than four would only add barriers."""
    most = hardware.SM90_SHARED_MEMORY_BYTES
    return next((n for n in (4, 3, 2) if _shared_bytes(latent_dim, rope_dim, n) <= most), 0)


def _shared_bytes(latent_dim: int, rope_dim: int, num_slots: int) -> int:
    """Queries, blocks, probabilities, row statistics; every array starts at a multiple of 1 KB."""
    arrays = (
        2 * WGMMA_ROWS * latent_dim,
        2 * WGMMA_ROWS * rope_dim,
        2 * num_slots * BLOCK_KV * latent_dim,
        2 * num_slots * BLOCK_KV * rope_dim,
        0 if rope_dim == BLOCK_KV else 2 * num_slots * WGMMA_ROWS * BLOCK_KV,
        4 * num_slots * 3 * WGMMA_ROWS,
        4 * WGMMA_ROWS,
    )
    barriers = 8 * (6 * num_slots + 2)
    return sum(-(-size // 1024) * 1024 for size in arrays) + barriers
