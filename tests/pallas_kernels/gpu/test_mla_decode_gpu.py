"""MLA decode on a GPU: FlashMLA's matrix of tests; and the same body, small, in the simulator."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_tools import flash_mla_matrix as matrix
from kernel_tools.flash_mla_matrix import Case, Data
from kernel_tools.interpreter import run_simulated

from pallas_kernels import mla_decode, mla_decode_plan
from pallas_kernels.mla_decode.workloads import IRREGULAR

MOSAIC_GPU = functools.partial(mla_decode, implementation="mosaic_gpu")
XLA = functools.partial(mla_decode, implementation="xla")
SMALL = functools.partial(Case, C=128, R=64, capacity=256, num_sms=2, filled_rows=16)


def decode(arrays, case, run=MOSAIC_GPU):
    plan = mla_decode_plan(
        arrays.lengths,
        num_rows=case.T * case.N,
        page_size=case.page_size,
        num_sms=case.num_sms,
    )
    scale = (case.C + case.R) ** -0.5
    return run(*arrays, latent_dim=case.C, scale=scale, causal=case.causal, plan=plan)


@pytest.mark.gpu
@pytest.mark.parametrize("case", matrix.CASES, ids=str)
def test_flash_mla_matrix(case):
    for data in matrix.DATA:
        matrix.check_decode(decode, case, data)


@pytest.mark.gpu
@pytest.mark.parametrize("case", matrix.CORNER_CASES, ids=str)
def test_flash_mla_corner_of_a_batch_with_half_empty_requests(case):
    matrix.check_decode(decode, case, matrix.CORNER_DATA)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "case",
    [Case(6, T, N, dtype="float16") for T in (1, 2, 4) for N in (1, 16, 63, 128)]
    + [Case(6, T, 16, page_size=128) for T in (1, 4)]
    + [
        Case(6, T, 16, C=256, R=32, dtype=dtype)
        for T in (1, 4)
        for dtype in ("bfloat16", "float16")
    ],
    ids=str,
)
def test_what_flash_mla_tests_elsewhere_or_does_not_have(case):
    """float16, pages of 128 tokens, other latents."""
    for data in (*matrix.DATA, Data(500, is_ragged=True, is_half_empty=True)):
        matrix.check_decode(decode, case, data)


@pytest.mark.gpu
@pytest.mark.parametrize("num_sms", [1, 7, 132])
def test_irregular_batch_gives_the_same_bits_every_time(num_sms):
    """Long and short requests beside each other, split in many parts: a race would show."""
    q, kv_pages, page_table, lengths, _ = IRREGULAR.arrays()
    plan = mla_decode_plan(lengths, num_rows=IRREGULAR.T * IRREGULAR.N, num_sms=num_sms)
    run = jax.jit(IRREGULAR.function("mosaic_gpu"))
    first, *others = [run(q, kv_pages, page_table, lengths, plan) for _ in range(20)]
    want = jax.jit(IRREGULAR.function("xla"))(q, kv_pages, page_table, lengths, plan)
    matrix.compare("out", first.out, want.out, matrix.OUT_ABSOLUTE, matrix.OUT_RELATIVE)
    for other in others:
        np.testing.assert_array_equal(first.out, other.out)
        np.testing.assert_array_equal(first.lse, other.lse)


@pytest.mark.kernel_sim
@pytest.mark.parametrize(
    ("case", "data"),
    [
        (SMALL(2, 2, 3), Data(100, is_ragged=True)),
        (SMALL(3, 1, 9, causal=False), Data(70, is_ragged=True, is_half_empty=True)),
    ],
    ids=str,
)
def test_the_same_body_in_the_simulator(case, data):
    from pallas_kernels.mla_decode.sm90.launch import mla_decode_sm90

    simulated = functools.partial(run_simulated, mla_decode_sm90)
    matrix.check_decode(functools.partial(decode, run=simulated), case, data)


@pytest.mark.parametrize("data", matrix.DATA[:4], ids=str)
def test_xla_passes_in_float32(data):
    """The bounds and the reference of this body, without a kernel."""
    case = SMALL(3, 2, 3, dtype="float32")
    matrix.check_decode(functools.partial(decode, run=XLA), case, data)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (lambda out, lse: (out.at[0, 0, 0, 0].add(0.01), lse), r"out: 1 of .* at \(0, 0, 0, 0\)"),
        (lambda out, lse: (out.at[0, 1, 2, 5].set(jnp.nan), lse), r"out: 1 of .*: nan should be"),
        (lambda out, lse: (out * 1.015, lse), "out: 1 - cosine"),
        (lambda out, lse: (out, lse * 1.0002), "lse: .* entries are outside"),
        (lambda out, lse: (out, lse.at[0].set(-jnp.inf)), "lse: 6 of 18 .* -inf should be"),
    ],
    ids=["entry", "nan", "all", "lse", "inf"],
)
def test_planted_faults_are_found(fault, message):
    def faulty(arrays, case):
        return fault(*decode(arrays, case, XLA))

    with pytest.raises(AssertionError, match=message):
        matrix.check_decode(faulty, SMALL(3, 2, 3, dtype="float32"), Data(140, is_ragged=True))


def test_poison_is_where_nothing_may_be_read():
    case = SMALL(3, 2, 3)
    arrays, border = matrix.make_arrays(case, Data(100, is_ragged=True, is_half_empty=True), seed=1)
    lengths, table = np.asarray(arrays.lengths), np.asarray(arrays.page_table)
    used = -(-lengths // case.page_size)
    assert 0 in lengths and lengths.max() > 0
    assert ((table == matrix.GARBAGE).sum(1) == case.capacity // case.page_size - used).all()
    finite = np.isfinite(np.asarray(arrays.kv_pages, np.float32)).all(-1)
    assert finite.sum() == lengths.sum()
    assert (border == lengths[:, None] - np.array([1, 0])).all()
