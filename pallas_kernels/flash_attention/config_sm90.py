"""What the Hopper kernels are specialised on, and how they cut the work. Imports no Mosaic."""

import dataclasses

ROWS = 64  # of a wgmma: what one warpgroup owns of a tile
TILE = 2 * ROWS  # queries or keys that a block of threads owns


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
    group_parts: int = 1  # that the query heads of a key head are cut into, for its gradients

    @property
    def group(self) -> int:
        """Query heads that share a key head."""
        return self.N // self.G

    @property
    def part(self) -> int:
        """Query heads that a tile of keys meets in the backward pass."""
        return self.group // self.group_parts

    def num_waves(self, num_rows: int, num_heads: int, num_sms: int) -> int:
        """Tiles that the busiest multiprocessor gets."""
        return -(-(-(-num_rows // TILE) * self.B * num_heads) // num_sms)


@dataclasses.dataclass(frozen=True)
class Config:
    """How a kernel streams blocks past its tiles: keys and values, or queries and cotangents."""

    block: int  # rows of a step
    num_stages: tuple[int, int]  # blocks in shared memory of the two streams
    registers: int = 240  # of a thread that multiplies
    memory_registers: int = 24  # of one that loads
    heads_at_once: int = 8  # heads that the whole GPU reads at a time, so that L2 can serve them
    sum_columns: int = 32  # of dq, float32, that lie side by side in shared memory


# By (K, H). NOTES.md says why.
FORWARD = {
    (64, 64): Config(block=128, num_stages=(4, 4)),
    (128, 128): Config(block=128, num_stages=(2, 2)),
    (192, 128): Config(block=128, num_stages=(2, 2)),
    (256, 256): Config(block=64, num_stages=(2, 2)),
}
BACKWARD_QUERIES = {
    (64, 64): Config(block=64, num_stages=(4, 4)),
    (128, 128): Config(block=64, num_stages=(3, 3)),
    (192, 128): Config(block=64, num_stages=(3, 3)),
    (256, 256): Config(block=64, num_stages=(2, 1)),
}
BACKWARD_KEYS = {
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
# dk and dv of a tile, if they fit in registers together; wider ones take a launch each.
MAX_GRADIENT_COLUMNS = 320
HEAD_SIZES = tuple(FORWARD)


def group_parts(problem: Problem, num_sms: int) -> int:
    """Parts of a group of query heads, each with tiles of keys of its own: more tiles, more sums.

    As few as keep the multiprocessors as busy as they can be; one where tiles suffice anyway.
    """
    if problem.num_waves(problem.S, problem.G, num_sms) > 1:
        return 1
    divisors = (n for n in range(1, problem.group + 1) if problem.group % n == 0)
    return min(divisors, key=lambda n: problem.num_waves(problem.S, problem.G * n, num_sms) / n)


def is_backward_fused(problem: Problem, deterministic: bool, num_sms: int) -> bool:
    """Whether one kernel computes all gradients, so that the bits of dq differ from run to run.

    Where that is allowed, it is if the products for dq take the busiest multiprocessor less time
    in the kernel of dk and dv than the three of a kernel of their own, whose tiles are of queries.
    No GPU has measured either: NOTES.md has the counts.
    """
    config = FUSED.get((problem.K, problem.H))
    if deterministic or config is None or problem.T < config.block:
        return False
    key_waves = problem.num_waves(problem.S, problem.G * problem.group_parts, num_sms)
    query_waves = problem.num_waves(problem.T, problem.N, num_sms)
    added = key_waves * problem.part * problem.T * problem.K
    return added <= query_waves * problem.S * (2 * problem.K + problem.H)
