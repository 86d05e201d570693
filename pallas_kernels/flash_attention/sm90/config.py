"""What the Hopper kernels are specialised on, and how they tile the problem. Imports no Mosaic."""

import dataclasses

from pallas_kernels.hardware import WGMMA_ROWS

TILE_ROWS = 2 * WGMMA_ROWS  # queries or keys that a CTA owns, half of them per consumer


@dataclasses.dataclass(frozen=True)
class Problem:
    """Sizes as in `flash_attention`, and what is known of the mask before it runs."""

    B: int
    T: int
    S: int
    N: int
    G: int
    K: int
    H: int
    causal: bool
    scale: float
    offset: int  # position of query 0
    has_lengths: bool = False  # so that keys may end anywhere, and a query may see none
    group_splits: int = 1  # CTAs that share a tile of keys, each with some of its query heads

    @property
    def group(self) -> int:
        """Query heads that share a key head."""
        return self.N // self.G

    @property
    def heads_per_split(self) -> int:
        """Query heads that one CTA multiplies with a tile of keys in the backward pass."""
        return self.group // self.group_splits

    def num_waves(self, num_rows: int, num_heads: int, num_sms: int) -> int:
        """Tiles that the busiest multiprocessor gets."""
        return -(-(-(-num_rows // TILE_ROWS) * self.B * num_heads) // num_sms)


@dataclasses.dataclass(frozen=True)
class Config:
    """How a kernel streams blocks past its tiles: keys and values, or queries and cotangents."""

    block: int  # rows per step
    num_stages: tuple[int, int]  # blocks in shared memory, for each of the two streams
    registers: int = 240  # per thread of a consumer
    memory_registers: int = 24  # per thread of the warpgroup that loads
    heads_at_once: int = 8  # heads that the whole GPU reads at a time, so that L2 can serve them
    sum_columns: int = 32  # width of dq's float32 tiles in shared memory


# By (K, H). NOTES.md says why.
FORWARD = {
    (64, 64): Config(block=128, num_stages=(4, 4)),
    (128, 128): Config(block=128, num_stages=(2, 2)),
    (192, 128): Config(block=128, num_stages=(2, 2)),
    (256, 256): Config(block=64, num_stages=(2, 2)),
}
# The dq kernel and the dk, dv kernel stream blocks of the same sizes.
BACKWARD = {
    (64, 64): Config(block=64, num_stages=(4, 4)),
    (128, 128): Config(block=64, num_stages=(3, 3)),
    (192, 128): Config(block=64, num_stages=(3, 3)),
    (256, 256): Config(block=64, num_stages=(2, 1)),
}
# dq, dk and dv in one kernel; for 256/256 registers do not suffice.
FUSED = {
    (64, 64): Config(block=128, num_stages=(3, 3)),
    (128, 128): Config(block=64, num_stages=(3, 3)),
    (192, 128): Config(block=64, num_stages=(2, 2), sum_columns=16),
}
# Columns of dk and dv together that fit in registers; wider ones take one launch each.
MAX_GRADIENT_COLUMNS = 320
HEAD_SIZES = tuple(FORWARD)


def choose_group_splits(problem: Problem, num_sms: int) -> int:
    """How many CTAs share one key head's query group in the backward pass.

    More CTAs, more partial sums: as few as keep the multiprocessors as busy as they can be, and one
    where there are enough tiles anyway.
    """
    if problem.num_waves(problem.S, problem.G, num_sms) > 1:
        return 1
    divisors = (n for n in range(1, problem.group + 1) if problem.group % n == 0)
    return min(divisors, key=lambda n: problem.num_waves(problem.S, problem.G * n, num_sms) / n)


def is_backward_fused(problem: Problem, deterministic: bool, num_sms: int) -> bool:
    """Whether one kernel computes all gradients, so that the bits of dq differ from run to run.

    Never if `deterministic`. Otherwise if, on the busiest multiprocessor, the matmul for dq takes
    less time inside the kernel of dk and dv than three matmuls in a kernel of its own, whose tiles
    are queries. No GPU has measured either: NOTES.md has the counts.
    """
    config = FUSED.get((problem.K, problem.H))
    if deterministic or config is None or problem.T < config.block:
        return False
    key_waves = problem.num_waves(problem.S, problem.G * problem.group_splits, num_sms)
    query_waves = problem.num_waves(problem.T, problem.N, num_sms)
    added = key_waves * problem.heads_per_split * problem.T * problem.K
    return added <= query_waves * problem.S * (2 * problem.K + problem.H)
