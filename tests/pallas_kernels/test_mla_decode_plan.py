"""The plan of a decode step: every page once, numbered splits, balance."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from numerics import unchecked

from pallas_kernels import mla_decode_plan
from pallas_kernels.hardware import WGMMA_ROWS
from pallas_kernels.mla_decode.plan import REQUEST_OVERHEAD_TOKENS

H200 = 132


def walk(plan, pages):
    """What a kernel does: (request, first page, end page, split) of each piece, part by part."""
    parts = []
    for i in range(len(plan.begin_request)):
        begin, end = int(plan.begin_request[i]), int(plan.end_request[i])
        parts.append([])
        for request in range(begin, end + 1):
            first = int(plan.begin_page[i]) if request == begin else 0
            last = int(plan.end_page[i]) if request == end else pages[request]
            split = int(plan.begin_split[i]) if request == begin else 0
            parts[-1].append((request, first, last, split))
    return parts


@given(
    # One batch size, so that the plan compiles once a size of the machine.
    lengths=st.lists(st.integers(0, 5000) | st.integers(0, 70), min_size=6, max_size=6),
    num_sms=st.sampled_from([8, H200]),
    num_rows=st.sampled_from([1, 256]),
    page_size=st.just(64),
)
@example(lengths=[0] * 6, num_sms=H200, num_rows=1, page_size=64)
@example(lengths=[10**6, 0, 0, 0, 0, 1], num_sms=H200, num_rows=1, page_size=64)
@example(lengths=[100, 0, 1, 17, 3000, 16], num_sms=1, num_rows=1, page_size=16)
def test_every_page_is_read_once_in_balance(lengths, num_sms, num_rows, page_size):
    plan = mla_decode_plan(
        np.array(lengths), num_rows=num_rows, page_size=page_size, num_sms=num_sms
    )
    plan = jax.tree.map(np.asarray, plan)
    pages = [max(-(-length // page_size), 1) for length in lengths]
    overhead = -(-REQUEST_OVERHEAD_TOKENS // page_size)
    num_parts = max(num_sms // -(-num_rows // WGMMA_ROWS), 1)
    share = -(-(sum(pages) + overhead * len(pages)) // num_parts)
    parts = walk(plan, pages)
    assert len(parts) == num_parts

    covered = [[] for _ in lengths]
    for part in parts:
        for request, first, last, split in part:
            assert first < last
            assert split == len(covered[request])
            covered[request].append((first, last))
        assert sum(last - first + overhead for _, first, last, _ in part) <= share + overhead
    for pieces, count in zip(covered, pages, strict=True):
        borders = [0, *(last for _, last in pieces)]
        assert [first for first, _ in pieces] == borders[:-1]
        assert borders[-1] == count

    want = np.cumsum([0, *map(len, covered)])
    np.testing.assert_array_equal(plan.num_splits, want)
    assert want[-1] <= plan.max_splits


def test_few_long_requests_are_split_and_many_short_ones_are_not():
    few = mla_decode_plan(np.full(2, 32768), num_rows=128, num_sms=H200)
    assert int(few.num_splits[-1]) >= 66
    many = mla_decode_plan(np.full(66 * 4, 640), num_rows=128, num_sms=H200)
    chex.assert_trees_all_equal(many.num_splits, jnp.arange(66 * 4 + 1))


def test_equal_requests_stay_whole_where_splitting_gains_nothing():
    """One each for 128 parts of 132, two each for 64 of 66: four parts idle, nothing to combine."""
    for num_rows in (64, 128):
        plan = mla_decode_plan(np.full(128, 4096), num_rows=num_rows, num_sms=H200)
        chex.assert_trees_all_equal(plan.num_splits, jnp.arange(129))


def test_jits_over_other_lengths_without_a_new_trace():
    @jax.jit
    @chex.assert_max_traces(n=1)
    def make(lengths):
        return mla_decode_plan(lengths, num_rows=16, num_sms=H200)

    for lengths in ([1, 2, 3], [1000, 0, 64]):
        got = make(jnp.array(lengths))
        want = mla_decode_plan(jnp.array(lengths), num_rows=16, num_sms=H200)
        chex.assert_trees_all_equal(got, want)
        assert (got.page_size, got.num_rows) == (64, 16)


@pytest.mark.parametrize(
    ("lengths", "sizes", "message"),
    [
        (np.array([1, -5]), {}, "lengths must not be negative, got -5"),
        (np.array([1.0]), {}, "lengths must have an integer dtype, got float64"),
        (np.array([[1]]), {}, r"lengths must have rank 1, got shape \(1, 1\)"),
        (np.array([], int), {}, "batch must be positive, got 0"),
        (np.array([1]), {"num_rows": 0}, "num_rows must be positive, got 0"),
        (np.array([1]), {"page_size": -1}, "page_size must be positive, got -1"),
        (np.array([1]), {"num_sms": 0}, "num_sms must be positive, got 0"),
    ],
)
def test_bad_input_is_refused(lengths, sizes, message):
    with pytest.raises(ValueError, match=message):
        unchecked(mla_decode_plan)(lengths, **{"num_rows": 16} | sizes)
