"""Flash attention on a GPU, forward and backward; and the same body, small, without a kernel."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_tools import flash_attention_matrix as matrix
from kernel_tools.cases import AttentionCase as Case
from numerics import normal

from pallas_kernels import hardware
from pallas_kernels.flash_attention.sm90.config import (
    FUSED,
    Problem,
    choose_group_splits,
    is_backward_fused,
)

HEADS = ((64, 64), (128, 128), (192, 128), (256, 256))
SHAPES = [
    # Lengths around the borders of tiles, and long ones.
    *(Case(129, K=K, H=H, causal=causal) for K, H in HEADS for causal in (True, False)),
    *(Case(S, B=1, K=192, H=128) for S in (1, 4096)),
    *(Case(16384, B=1, K=K, H=H) for K, H in HEADS),
    # More tiles than multiprocessors, also of keys.
    *(Case(1000, B=5, N=8, G=4, K=K, H=H) for K, H in HEADS),
    *(Case(900, T=333, B=9, K=K, H=H) for K, H in HEADS),
    *(Case(700, B=12, K=K, H=H, is_ragged=True) for K, H in HEADS),
    *(Case(1000, B=9, K=K, H=H, num_documents=7) for K, H in HEADS),
    *(Case(500, B=17, K=K, H=H, dtype="float16") for K, H in HEADS),
    # Fewer: groups of heads whole and split, one query, several masks at once.
    *(Case(700, B=B, N=8, G=G, K=K, H=H) for B, G, K, H in ((2, 1, 128, 128), (3, 2, 192, 128))),
    Case(700, N=6, G=2, K=64, H=64),
    Case(900, T=1, K=192, H=128),
    Case(700, B=4, is_ragged=True, causal=False),
    Case(2000, B=3, K=192, H=128, num_documents=5, is_ragged=True),
    # Scores of tens and hundreds: a query sees few keys, and which these are changes often.
    *(Case(700, K=K, H=H, scale=5.0) for K, H in HEADS),
]
CASES = [*SHAPES, *(dataclasses.replace(case, deterministic=True) for case in SHAPES)]


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernel_equals_float32(case):
    matrix.check_attention("mosaic_gpu", case)


@pytest.mark.gpu
@pytest.mark.parametrize(("K", "H"), HEADS)
def test_deterministic_gradients_are_the_same_bits_every_time(K, H):
    case = Case(4096, N=8, G=2, K=K, H=H, deterministic=True)
    arrays, options = case.arrays(), case.options()
    first, *others = [matrix.attend("mosaic_gpu", options, *arrays) for _ in range(3)]
    for other in others:
        jax.tree.map(np.testing.assert_array_equal, first, other)


def backward(case):
    """On an H200: are gradients fused, how many splits has a group, have CTAs many tiles."""
    T = case.T or case.S
    sizes = case.B, T, case.S, case.N, case.G, case.K, case.H
    problem = Problem(*sizes, case.causal, 0.1, offset=case.S - T)
    splits = choose_group_splits(problem, hardware.H200_NUM_SMS)
    problem = dataclasses.replace(problem, group_splits=splits)
    is_fused = is_backward_fused(problem, case.deterministic, hardware.H200_NUM_SMS)
    num_tiles = problem.num_waves(case.S, case.G * splits, hardware.H200_NUM_SMS)
    return is_fused, splits, num_tiles > 1


@pytest.mark.parametrize("K, H", HEADS)
def test_cases_take_every_way_through_the_gradients(K, H):
    ways = {backward(case) for case in CASES if (case.K, case.H) == (K, H)}
    for is_fused in {False, (K, H) in FUSED}:
        assert {is_many for fused, _, is_many in ways if fused == is_fused} == {True, False}
    assert (K, H) == (256, 256) or {splits for _, splits, _ in ways} > {1}


def test_cases_split_groups_into_single_heads_and_into_several():
    """Pairs of query heads per group, and splits."""
    found = {(case.N // case.G, backward(case)[1]) for case in CASES}
    assert {(8, 8), (4, 2), (3, 3), (2, 1)} <= found


SMALL = functools.partial(Case, K=24, H=16)


@pytest.mark.parametrize(
    "case",
    [
        SMALL(40, T=30, B=3, N=4, G=2, is_ragged=True),
        SMALL(40, num_documents=3, causal=False, scale=5.0, dtype="float16"),
    ],
    ids=str,
)
def test_xla_passes_its_own_bounds(case):
    matrix.check_attention("xla", case)


@pytest.mark.parametrize("name", matrix.FACTOR)
@pytest.mark.parametrize(
    "fault",
    [
        lambda x: 1.1 * x,
        lambda x: x.at[3, 1].set(jnp.nan),
        lambda x: x.at[3].set(0),
    ],
    ids=["all", "nan", "row"],
)
def test_planted_faults_are_found(monkeypatch, rng, name, fault):
    """Results made up: float32's, and with an error that is usual and one that is not.

    A row of zeros adds 1 / sqrt(9000) to the error of all, less than is usual.
    """
    right = {key: normal(rng, (9000, 8)) for key in matrix.FACTOR}
    usual = {key: x * (1 + 0.02 * normal(rng, x.shape)) for key, x in right.items()}

    def attend(implementation, options, inputs, cotangents, run=None):
        if inputs[0].dtype == jnp.float32:
            return right
        return usual | {name: fault(usual[name])} if implementation == "faulty" else usual

    monkeypatch.setattr(matrix, "attend", attend)
    matrix.check_attention("right", SMALL(33))
    with pytest.raises(AssertionError, match=f"{name} has a relative RMS error"):
        matrix.check_attention("faulty", SMALL(33))
