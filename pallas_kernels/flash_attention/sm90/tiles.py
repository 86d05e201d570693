"""Which blocks of keys a tile of queries must meet, and which of them need no mask.

The kernels walk a list of tiles that XLA computes here before they start: blocks that a length, the
causal border or a segment excludes entirely are neither loaded nor computed.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int32

from pallas_kernels.flash_attention.sm90.config import TILE_ROWS, Config, Problem


class Rows(NamedTuple):
    """Keys or values, plus a zero-padded copy of the last partial tile when lengths are given.

    Arrays, or in a kernel the Refs of them.
    """

    whole: Any  # "B S G K"
    last_tile: Any = None  # "B TILE_ROWS G K", zeros from the end on


class Masks(NamedTuple):
    """What hides keys besides the causal border: arrays, or in a kernel the Refs of them."""

    key_ends: Any  # int32 "B": keys from here on are hidden
    query_ids: Any  # int32 "B T", segments; or None
    key_ids: Any  # int32 "B S", segments; or None


def key_rows(problem: Problem, masks: Masks, *arrays: Array) -> list[Rows]:
    """Keys and values "B S G K" in the form in which the kernels load their blocks.

    Rows past a length may hold NaN, and 0 * NaN is NaN: none may reach a matmul. Blocks past it are
    never loaded. The tile in which keys end is copied with zeros after the end, because a copy of
    everything would cost a pass over it.
    """
    if not problem.has_lengths:
        return [Rows(x) for x in arrays]
    ends = masks.key_ends[:, None]
    row = ends // TILE_ROWS * TILE_ROWS + jnp.arange(TILE_ROWS)[None, :]
    row = jnp.where(row < ends, row, problem.S)
    b = jnp.arange(problem.B)[:, None]
    return [Rows(x, x.at[b, row].get(mode="fill", fill_value=0)) for x in arrays]


Scalar = jax.Array | int  # int32


class Tile(NamedTuple):
    """A tile of rows and the blocks that it meets; blocks that need no mask come last.

    The blocks are a range along the sequence, which starts at `first`: num_before masked ones, then
    a run of num_unmasked, then the other masked ones.
    """

    b: Scalar
    head: Scalar
    place: Scalar  # index of the tile along the sequence
    first: Scalar
    num_before: Scalar
    num_unmasked: Scalar
    num_masked: Scalar  # before and after the run

    @property
    def num_blocks(self) -> Scalar:
        return self.num_masked + self.num_unmasked

    def block(self, index: Scalar) -> Scalar:
        """The block that the tile meets in its step `index`."""
        unmasked = self.first + self.num_before + index - self.num_masked
        return jnp.where(index < self.num_masked, self.masked_block(index), unmasked)

    def masked_block(self, index: Scalar) -> Scalar:
        """`block` for the steps before `num_masked`."""
        is_after_run = index >= self.num_before
        return self.first + index + jnp.where(is_after_run, self.num_unmasked, 0)


def query_tiles(
    problem: Problem, masks: Masks, config: Config, num_ctas: int
) -> Int32[Array, "num_tiles 7"]:
    """Tiles of queries, which meet blocks of keys, as rows of Tile's fields."""
    runs = _runs(*_visible(problem, masks, TILE_ROWS, config.block))
    return _deal(runs, problem.N, config.heads_at_once, num_ctas, is_last_longest=True)


def key_tiles(
    problem: Problem, masks: Masks, config: Config, num_ctas: int
) -> Int32[Array, "num_tiles 7"]:
    """Tiles of keys, which meet blocks of queries; `head` counts the splits of all groups."""
    some, every = _visible(problem, masks, config.block, TILE_ROWS)
    runs = _runs(jnp.swapaxes(some, 1, 2), jnp.swapaxes(every, 1, 2))
    num_heads = problem.G * problem.group_splits
    return _deal(runs, num_heads, config.heads_at_once, num_ctas, is_last_longest=False)


def _visible(
    problem: Problem, masks: Masks, block_t: int, block_s: int
) -> tuple[Bool[Array, "B I J"], Bool[Array, "B I J"]]:
    """Whether any query of block I sees any key of block J, and whether all see all."""
    num_tiles, num_blocks = -(-problem.T // block_t), -(-problem.S // block_s)
    first_key = block_s * jnp.arange(num_blocks)[None, None, :]
    last_key = first_key + block_s - 1
    first_query = block_t * jnp.arange(num_tiles)[None, :, None]
    last_query = jnp.minimum(first_query + block_t, problem.T) - 1
    key_ends = masks.key_ends[:, None, None]
    some, every = first_key < key_ends, last_key < key_ends
    if problem.causal:
        some = some & (first_key <= last_query + problem.offset)
        every = every & (last_key <= first_query + problem.offset)
    if masks.query_ids is not None:
        # Intervals of ids that do not overlap exclude a block. If ids are not sorted, a block may
        # pass this test although the mask then hides all of it.
        query_low, query_high = _extremes(masks.query_ids, num_tiles, block_t)
        key_low, key_high = _extremes(masks.key_ids, num_blocks, block_s)
        query_low, query_high = query_low[:, :, None], query_high[:, :, None]
        key_low, key_high = key_low[:, None, :], key_high[:, None, :]
        some = some & (query_low <= key_high) & (key_low <= query_high)
        every = every & (query_low == key_high) & (key_low == query_high)
    shape = (problem.B, num_tiles, num_blocks)
    return jnp.broadcast_to(some, shape), jnp.broadcast_to(every, shape)


def _extremes(
    ids: Int32[Array, "B rows"], num_blocks: int, block: int
) -> tuple[Int32[Array, "B num_blocks"], Int32[Array, "B num_blocks"]]:
    """Smallest and largest id of every block."""
    blocks = ids[:, : num_blocks * block].reshape(len(ids), num_blocks, block)
    return blocks.min(-1), blocks.max(-1)


def _runs(some: Bool[Array, "B I J"], every: Bool[Array, "B I J"]) -> Int32[Array, "B I 4"]:
    """The last four fields of Tile, from the first run of True in `every`."""
    size = some.shape[-1]
    j = jnp.arange(size)[None, None, :]
    end = jnp.max(jnp.where(some, j + 1, 0), -1)
    first = jnp.minimum(jnp.min(jnp.where(some, j, size), -1), end)
    run_begin = jnp.min(jnp.where(every, j, size), -1)
    run_end = jnp.min(jnp.where(~every & (j > run_begin[..., None]), j, size), -1)
    run_begin = jnp.minimum(run_begin, end)
    num_unmasked = jnp.minimum(run_end, end) - run_begin
    num_masked = end - first - num_unmasked
    visits = [first, run_begin - first, num_unmasked, num_masked]
    return jnp.stack(visits, -1).astype(jnp.int32)


def _deal(
    runs: Int32[Array, "B I 4"],
    num_heads: int,
    heads_at_once: int,
    num_ctas: int,
    is_last_longest: bool,
) -> Int32[Array, "num_tiles 7"]:
    """Tiles of all heads in the order in which CTAs take turns to get them.

    The longest tiles under a causal border come first, so that all CTAs end at about the same time.
    All tiles of `heads_at_once` heads come before those of the next ones, so that what they read
    stays in L2. Every second round deals backwards.
    """
    B, num_places, _ = runs.shape
    wave = math.gcd(B * num_heads, heads_at_once)
    total = B * num_heads * num_places
    index = jnp.arange(total)
    turn, cta = index // num_ctas, index % num_ctas
    is_backwards = (turn % 2 == 1) & ((turn + 1) * num_ctas <= total)
    index = jnp.where(is_backwards, turn * num_ctas + num_ctas - 1 - cta, index)
    rest = index % (wave * num_places)
    head = index // (wave * num_places) * wave + rest % wave
    place = rest // wave
    if is_last_longest:
        place = num_places - 1 - place
    b, head = head // num_heads, head % num_heads
    fields = jnp.stack([b, head, place], -1).astype(jnp.int32)
    return jnp.concatenate([fields, runs[b, place]], -1)
