"""Flash attention on a GPU, forward and backward; and the same body, small, without a kernel."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_tools import flash_attention_matrix as matrix
from kernel_tools.flash_attention_matrix import Case
from numerics import normal

from pallas_kernels.flash_attention.config_sm90 import Problem, is_backward_fused

HEADS = ((64, 64), (128, 128), (192, 128), (256, 256))
CASES = [
    # Lengths around the borders of tiles, and long ones.
    *(Case(129, K=K, H=H, causal=causal) for K, H in HEADS for causal in (True, False)),
    *(Case(1000, K=K, H=H) for K, H in HEADS),
    *(Case(S, B=1, K=192, H=128) for S in (1, 4096, 16384)),
    Case(16384, B=1),
    # Groups of heads, chunks of a prefill, ragged batches, packed documents, float16.
    *(Case(700, N=8, G=G, K=K, H=H) for G, K, H in ((1, 128, 128), (2, 192, 128))),
    *(Case(900, T=T, K=192, H=128) for T in (1, 333)),
    *(Case(700, B=4, K=K, H=H, is_ragged=True) for K, H in HEADS),
    Case(700, B=4, is_ragged=True, causal=False),
    *(Case(2000, K=K, H=H, num_documents=7) for K, H in ((128, 128), (192, 128))),
    Case(2000, B=3, K=192, H=128, num_documents=5, is_ragged=True),
    *(Case(500, K=K, H=H, dtype="float16") for K, H in ((128, 128), (192, 128))),
    *(Case(700, K=K, H=H, deterministic=True) for K, H in HEADS),
]

# Enough tiles of keys for one kernel to compute all gradients; the cases above have fewer.
FUSED_HEADS = HEADS[:3]
FUSED_CASES = [
    *(Case(129, B=33, K=K, H=H, causal=causal) for K, H in FUSED_HEADS for causal in (True, False)),
    *(Case(1000, B=5, N=8, G=4, K=K, H=H) for K, H in FUSED_HEADS),
    *(Case(900, T=333, B=9, K=K, H=H) for K, H in FUSED_HEADS),
    *(Case(700, B=12, K=K, H=H, is_ragged=True) for K, H in FUSED_HEADS),
    *(Case(1000, B=9, K=K, H=H, num_documents=7) for K, H in FUSED_HEADS),
    *(Case(500, B=17, K=K, H=H, dtype="float16") for K, H in FUSED_HEADS),
    *(Case(16384, B=1, K=K, H=H) for K, H in FUSED_HEADS),
]


@pytest.mark.gpu
@pytest.mark.parametrize("case", [*CASES, *FUSED_CASES], ids=str)
def test_kernel_equals_float32(case):
    matrix.check_attention("mosaic_gpu", case)


@pytest.mark.gpu
@pytest.mark.parametrize(("K", "H"), HEADS)
def test_deterministic_gradients_are_the_same_bits_every_time(K, H):
    case = Case(4096, N=8, G=2, K=K, H=H, deterministic=True)
    inputs, cotangents = matrix.make_arrays(case, {}, seed=0)
    run = functools.partial(matrix.attend, "mosaic_gpu", case.options(np.random.default_rng(0)))
    first, *others = [run(inputs, cotangents) for _ in range(3)]
    for other in others:
        jax.tree.map(np.testing.assert_array_equal, first, other)


@pytest.mark.parametrize("case", FUSED_CASES, ids=str)
def test_these_cases_are_fused_on_an_h200(case):
    T = case.T or case.S
    sizes = case.B, T, case.S, case.N, case.G, case.K, case.H
    problem = Problem(*sizes, case.causal, 0.1, offset=case.S - T)
    assert is_backward_fused(problem, case.deterministic, num_sms=132)


SMALL = functools.partial(Case, K=24, H=16)


@pytest.mark.parametrize(
    "case",
    [
        SMALL(40, T=30, B=3, N=4, G=2, is_ragged=True),
        SMALL(40, num_documents=3, causal=False, dtype="float16"),
    ],
    ids=str,
)
def test_xla_passes_its_own_bounds(case):
    matrix.check_attention("xla", case)


@pytest.mark.parametrize("name", matrix.FACTOR)
@pytest.mark.parametrize(
    "fault", [lambda x: 1.1 * x, lambda x: x.at[3].set(jnp.nan)], ids=["all", "nan"]
)
def test_planted_faults_are_found(monkeypatch, rng, name, fault):
    """Results made up: float32's, and with an error that is usual and one that is not."""
    right = {key: normal(rng, (50,)) for key in matrix.FACTOR}
    usual = {key: x * (1 + 0.01 * normal(rng, (50,))) for key, x in right.items()}

    def attend(implementation, options, inputs, cotangents):
        if inputs[0].dtype == jnp.float32:
            return right
        return usual | {name: fault(usual[name])} if implementation == "faulty" else usual

    monkeypatch.setattr(matrix, "attend", attend)
    matrix.check_attention("right", SMALL(33))
    with pytest.raises(AssertionError, match=f"{name} has a relative RMS error"):
        matrix.check_attention("faulty", SMALL(33))
