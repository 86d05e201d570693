"""What is decided before the Hopper kernels of flash attention run: tiles, splits, backward."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from numerics import normal

from pallas_kernels.flash_attention.sm90.config import (
    FORWARD,
    TILE_ROWS,
    Config,
    Problem,
    choose_group_splits,
    is_backward_fused,
)
from pallas_kernels.flash_attention.sm90.launch import make_masks
from pallas_kernels.flash_attention.sm90.tiles import Tile, key_rows, key_tiles, query_tiles


def visible(problem, options):
    """bool "B T S", written from the definition of the op."""
    p = problem.offset + np.arange(problem.T)[None, :, None]
    s = np.arange(problem.S)[None, None, :]
    seen = np.broadcast_to(s <= p if problem.causal else s >= 0, (problem.B, *(s <= p).shape[1:]))
    if options["lengths"] is not None:
        seen = seen & (s < options["lengths"][:, None, None])
    if (ids := options["segment_ids"]) is not None:
        seen = seen & (ids[:, problem.S - problem.T :, None] == ids[:, None, :])
    return seen


@pytest.mark.parametrize("direction", ["queries", "keys"])
@pytest.mark.parametrize("ids", [None, "sorted", "shuffled"])
@pytest.mark.parametrize("masks", ["causal", "full", "lengths"])
def test_tiles_cover_all_that_is_visible(rng, direction, ids, masks):
    """Every tile once; every block that is seen; without a mask only what is seen as a whole."""
    B, T, S, N, G, num_ctas = 3, 456, 768, 4, 2, 7
    options = {"segment_ids": None, "lengths": None}
    if masks == "lengths":
        options["lengths"] = np.array([768, 0, 300])
    if ids is not None:
        options["segment_ids"] = np.sort(rng.integers(0, 4, (B, S)), axis=1)
    if ids == "shuffled":
        options["segment_ids"] = rng.permuted(options["segment_ids"], axis=1)
    problem = Problem(B, T, S, N, G, 64, 64, masks != "full", 0.1, offset=S - T)
    config = Config(block=64, num_stages=(2, 2), heads_at_once=2)
    make = query_tiles if direction == "queries" else key_tiles
    tiles = make(problem, make_masks(B, T, S, **options), config, num_ctas)
    seen = visible(problem, options)
    seen = seen if direction == "queries" else seen.swapaxes(1, 2)
    num_heads, num_tiles = (N if direction == "queries" else G), -(-seen.shape[1] // TILE_ROWS)

    tiles = [Tile(*(int(x) for x in row)) for row in np.asarray(tiles)]
    places = {(tile.b, tile.head, tile.place) for tile in tiles}
    assert len(places) == len(tiles) == B * num_heads * num_tiles
    for tile in tiles:
        rows = seen[tile.b, tile.place * TILE_ROWS : (tile.place + 1) * TILE_ROWS]
        blocks = [rows[:, s : s + config.block] for s in range(0, rows.shape[1], config.block)]
        visited = [int(tile.block(i)) for i in range(tile.num_blocks)]
        assert len(set(visited)) == len(visited)
        assert {j for j, block in enumerate(blocks) if block.any()} <= set(visited)
        assert all(blocks[j].all() for j in visited[tile.num_masked :])
        if ids != "shuffled":
            assert tile.num_unmasked == sum(block.all() for block in blocks)
        if ids is None or (ids == "sorted" and masks != "lengths"):  # nothing in vain
            assert all(blocks[j].any() for j in visited)


def test_longest_tiles_come_first():
    problem = Problem(1, 2048, 2048, 8, 8, 64, 64, True, 0.1, offset=0)
    masks = make_masks(1, 2048, 2048, segment_ids=None, lengths=None)
    for make in (query_tiles, key_tiles):
        tiles = Tile(*make(problem, masks, FORWARD[64, 64], num_ctas=8).T)
        lengths = tiles.num_blocks
        assert (np.diff(lengths) <= 0).all() and lengths[0] > lengths[-1]


def problem_of(*, B=2, T=2112, S=2112, N=16, G=4, K=192, H=128):
    return Problem(B, T, S, N, G, K, H, False, 0.1, offset=S - T)


def test_gradients_are_fused_where_that_is_less_work():
    def is_fused(*, deterministic=False, **sizes):
        return is_backward_fused(problem_of(**sizes), deterministic, num_sms=132)

    assert is_fused() and is_fused(K=128) and is_fused(K=64, H=64)
    assert not is_fused(deterministic=True)
    assert not is_fused(K=256, H=256)
    assert is_fused(T=64) and not is_fused(T=64, K=64, H=64)  # whose blocks are 128 queries
    # One tile of keys for all of 16384 queries: tiles of queries keep more of the GPU busy.
    assert not is_fused(B=1, T=16384, S=128, N=4, G=4)
    assert is_fused(B=1, T=16384, S=16384, N=4, G=4)


def test_groups_are_split_where_there_are_too_few_tiles_of_keys():
    def splits(num_tiles, group):
        return choose_group_splits(
            problem_of(B=1, S=num_tiles * TILE_ROWS, N=group, G=1), num_sms=132
        )

    assert splits(132, 8) == splits(133, 8) == 1
    assert splits(128, 8) == 1  # two halves would take as long as the whole
    assert splits(66, 8) == 2 and splits(32, 16) == 4 and splits(1, 16) == 16
    assert splits(40, 9) == 3 and splits(1, 7) == 7
    assert splits(100, 8) == 8  # 7 turns of an eighth


def test_the_tile_in_which_keys_end_has_zeros_after_them(rng):
    x = normal(rng, (4, 200, 2, 8), "float32")
    masks = make_masks(4, 200, 200, None, np.array([0, 100, 128, 200]))
    problem = dataclasses.replace(problem_of(B=4, T=200, S=200), has_lengths=True)
    ((whole, last_tile),) = key_rows(problem, masks, x)
    assert whole is x and last_tile.shape == (4, TILE_ROWS, 2, 8)
    np.testing.assert_array_equal(last_tile[1, :100], x[1, :100])
    np.testing.assert_array_equal(last_tile[3, :72], x[3, 128:])
    assert not last_tile[::2].any() and not last_tile[1, 100:].any()
    assert not last_tile[3, 72:].any()


@pytest.mark.parametrize("dtype", ["uint8", "int8", "int16", "int32"])
def test_lengths_keep_their_value_beside_many_keys(dtype):
    """40000 keys are more than 8 or 16 bits can count."""
    masks = make_masks(2, 40000, 40000, None, jnp.array([0, 120], dtype))
    np.testing.assert_array_equal(masks.key_ends, [0, 120])
