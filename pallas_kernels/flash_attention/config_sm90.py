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

    @property
    def group(self) -> int:
        """Query heads that share a key head."""
        return self.N // self.G


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


def is_backward_fused(problem: Problem, deterministic: bool, num_sms: int) -> bool:
    """Whether one kernel computes all gradients, so that the bits of dq differ from run to run.

    Where that is allowed, what is counted speaks for it if every multiprocessor gets a tile of
    keys; with fewer tiles, a kernel of its own for dq keeps more of them busy. No GPU has measured
    either: NOTES.md has the counts.
    """
    config = FUSED.get((problem.K, problem.H))
    if deterministic or config is None:
        return False
    num_tiles = -(-problem.S // TILE) * problem.B * problem.G
    return num_tiles >= num_sms and problem.T >= config.block
