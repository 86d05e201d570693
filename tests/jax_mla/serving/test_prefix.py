"""Pages and the prefix cache alone."""

import pytest

from jax_mla.serving.pages import PagePool
from jax_mla.serving.prefix import PrefixCache


def filled(*runs, size=4, **options):
    """A cache with a chain of pages 0, 1, ... that hold these runs of tokens."""
    cache = PrefixCache(size, **options)
    parent = cache.root()
    for page, run in enumerate(runs):
        parent = cache.register(page, parent, run)
    return cache


def match(cache, tokens, **salt):
    found = cache.match(tokens, cache.root(**salt))
    return found.pages, found.partial, found.num_partial


def test_allocation_is_all_or_nothing():
    pool = PagePool(4)
    assert pool.allocate(3) == [0, 1, 2]
    assert pool.allocate(2) is None and pool.num_free == 1 and pool.references == [1, 1, 1, 0]
    assert pool.allocate(1) == [3] and pool.num_used == 4


def test_the_longest_free_page_is_reused_first_and_leaves_before_parents():
    reused = []
    pool = PagePool(4, reused.append)
    pool.allocate(4)
    pool.release([2, 0])
    pool.release([1])
    reused.clear()
    assert pool.allocate(3) == [0, 2, 1] and reused == [0, 2, 1]


def test_a_free_page_can_be_held_as_it_is():
    reused = []
    pool = PagePool(2, reused.append)
    pool.release(pool.allocate(2))
    reused.clear()
    pool.hold([1, 1])
    assert pool.num_free == 1 and pool.references == [0, 2] and reused == []
    pool.release([1])
    assert pool.num_free == 1


def test_a_free_page_cannot_be_released():
    pool = PagePool(2)
    with pytest.raises(ValueError, match="page 1 is free"):
        pool.release([1])


def test_matches_full_pages_and_leaves_the_last_token():
    cache = filled((1, 2, 3, 4), (5, 6, 7, 8))
    assert match(cache, [1, 2, 3, 4, 5, 6, 7, 8, 9]) == ([0, 1], None, 0)
    assert match(cache, [1, 2, 3, 4, 5, 6, 7, 8]) == ([0], 1, 3)
    assert match(cache, [1, 2, 3, 4]) == ([], 0, 3)
    assert match(cache, [1]) == ([], None, 0)
    assert match(cache, [2, 2, 3, 4, 5]) == ([], None, 0)


def test_the_best_of_partial_matches_is_copied():
    cache = filled((1, 2, 3, 4), (5, 6, 7, 8))
    parent = cache.match([1, 2, 3, 4, 0], cache.root()).keys[0]
    cache.register(7, parent, (5, 6, 9, 9))
    assert match(cache, [1, 2, 3, 4, 5, 6, 9, 1, 1]) == ([0], 7, 3)


def test_equal_pages_are_registered_once():
    cache = filled((1, 2, 3, 4))
    key = cache.register(5, cache.root(), (1, 2, 3, 4))
    assert 5 not in cache and cache.match([1, 2, 3, 4, 0], cache.root()).keys == [key]


def test_a_forgotten_page_is_not_found():
    cache = filled((1, 2, 3, 4), (5, 6, 7, 8))
    cache.forget(0)
    cache.forget(0)
    assert match(cache, [1, 2, 3, 4, 5, 6, 7, 8, 9]) == ([], None, 0)
    cache.register(3, cache.root(), (1, 2, 3, 4))
    assert match(cache, [1, 2, 3, 4, 5, 6, 7, 8, 9]) == ([3, 1], None, 0)
    cache.check()


def test_salts_do_not_mix():
    """An adapter that is called like a user's salt is another thing."""
    cache = PrefixCache(2)
    cache.register(0, cache.root(cache_salt="a"), (1, 2))
    assert match(cache, [1, 2, 3], cache_salt="a") == ([0], None, 0)
    for salt in ({}, {"cache_salt": "b"}, {"adapter": "a"}, {"adapter": "a", "cache_salt": ""}):
        assert match(cache, [1, 2, 3], **salt) == ([], None, 0)


def test_equal_keys_of_other_tokens_are_no_match():
    cache = filled((1, 2, 3, 4), digest=lambda content: b"always")
    assert match(cache, [9, 9, 9, 9, 9]) == ([], None, 0)
    assert match(cache, [1, 2, 3, 9, 9])[0] == []


def test_a_broken_cache_is_found():
    cache = filled((1, 2, 3, 4))
    cache.check()
    cache.register(1, cache.root(), (1, 2, 3))
    with pytest.raises(RuntimeError, match="page 1 is not found"):
        cache.check()
