"""Which blocks of keys a tile of queries must meet, and which of them need no mask.

The kernels walk a list of tiles that is made here, in front of them: what a length, the causal
border or a segment excludes as a whole is neither loaded nor computed.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32

from pallas_kernels.flash_attention.config_sm90 import TILE, Config, Problem


class Rows(NamedTuple):
    """Keys or values; if they end before the array does, the tile of the end once more."""

    whole: Array  # "B S G K"
    last_tile: Array | None = None  # "B TILE G K", zeros from the end on


class Masks(NamedTuple):
    """What hides keys besides the causal border."""

    key_ends: Int32[Array, "B"]  # keys from here on are hidden
    query_ids: Int32[Array, "B T"] | None  # segments
    key_ids: Int32[Array, "B S"] | None


def key_rows(problem: Problem, masks: Masks, *arrays: Array) -> list[Rows]:
    """Keys and values "B S G K" as blocks of them are loaded.

    Rows behind a length may hold NaN, and 0 * NaN is NaN: none may reach a matmul. Blocks behind
    are never loaded; of the tile in which keys end this makes a copy with zeros, for a copy of
    everything would cost a pass over it.
    """
    if not problem.has_lengths:
        return [Rows(x) for x in arrays]
    ends = masks.key_ends[:, None]
    row = ends // TILE * TILE + jnp.arange(TILE)[None, :]
    row = jnp.where(row < ends, row, problem.S)
    b = jnp.arange(problem.B)[:, None]
    return [Rows(x, x.at[b, row].get(mode="fill", fill_value=0)) for x in arrays]


Scalar = jax.Array | int  # int32


class Tile(NamedTuple):
    """A tile of rows and the blocks that it meets; one run of them needs no mask and comes last."""

    b: Scalar
    head: Scalar
    place: Scalar  # along the sequence
    first: Scalar  # block
    num_before: Scalar  # masked blocks in front of the run
    num_unmasked: Scalar
    num_masked: Scalar  # all of them, in front of the run and behind it

    @property
    def num_blocks(self) -> Scalar:
        return self.num_masked + self.num_unmasked

    def block(self, index) -> Scalar:
        """The block that step `index` meets."""
        unmasked = self.first + self.num_before + index - self.num_masked
        return jnp.where(index < self.num_masked, self.masked_block(index), unmasked)

    def masked_block(self, index) -> Scalar:
        """`block` for the steps before `num_masked`."""
        is_behind = index >= self.num_before
        return self.first + index + jnp.where(is_behind, self.num_unmasked, 0)


def query_tiles(
    problem: Problem, masks: Masks, config: Config, num_ctas: int
) -> Int32[Array, "num_tiles 7"]:
    """Tiles of queries, which meet blocks of keys, as rows of Tile's fields."""
    runs = _runs(*_visible(problem, masks, TILE, config.block))
    return _deal(runs, problem.N, config.heads_at_once, num_ctas, is_last_longest=True)


def key_tiles(
    problem: Problem, masks: Masks, config: Config, num_ctas: int
) -> Int32[Array, "num_tiles 7"]:
    """Tiles of keys, which meet blocks of queries; `head` numbers the parts of all groups."""
    some, every = _visible(problem, masks, config.block, TILE)
    runs = _runs(jnp.swapaxes(some, 1, 2), jnp.swapaxes(every, 1, 2))
    num_heads = problem.G * problem.group_parts
    return _deal(runs, num_heads, config.heads_at_once, num_ctas, is_last_longest=False)


def _visible(problem, masks, block_t, block_s) -> tuple[jax.Array, jax.Array]:
    """bool "B I J" twice: does any query of the tile see a key of the block; do all see all."""
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
        # Intervals of ids that do not meet exclude a block. If ids are not sorted the test may let
        # a block pass of which the mask then leaves nothing.
        query_low, query_high = _extremes(masks.query_ids, num_tiles, block_t)
        key_low, key_high = _extremes(masks.key_ids, num_blocks, block_s)
        query_low, query_high = query_low[:, :, None], query_high[:, :, None]
        key_low, key_high = key_low[:, None, :], key_high[:, None, :]
        some = some & (query_low <= key_high) & (key_low <= query_high)
        every = every & (query_low == key_high) & (key_low == query_high)
    shape = (problem.B, num_tiles, num_blocks)
    return jnp.broadcast_to(some, shape), jnp.broadcast_to(every, shape)


def _extremes(ids, num_blocks, block):
    """Smallest and largest id of every block."""
    blocks = ids[:, : num_blocks * block].reshape(len(ids), num_blocks, block)
    return blocks.min(-1), blocks.max(-1)


def _runs(some, every):
    """ "B rows 4": the last fields of Tile, from the first run of True in `every`."""
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


def _deal(runs, num_heads, heads_at_once, num_ctas, is_last_longest):
    """Tiles of all heads, to be dealt out to the CTAs in turn.

    The longest under a causal border come first, for the work to end evenly, but all tiles of
    `heads_at_once` heads come before those of the next ones, for what they read to stay in L2.
    Every second round deals backwards.
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
