"""A few small calls of every kernel for compute-sanitizer, which makes them very slow.

Results are not looked at: that is what the tests beside this do, on more cases.

export PYTHONPATH=.:tests
compute-sanitizer --tool racecheck python tests/pallas_kernels/gpu/sanitizer_cases.py
"""

import dataclasses
import functools
import sys

import jax
from kernel_tools import flash_attention_matrix, flash_mla_matrix
from kernel_tools.cases import AttentionCase
from kernel_tools.flash_mla_matrix import Data

from pallas_kernels import mla_decode, mla_decode_plan

SHORT, LONG = Data(20, is_ragged=False), Data(140, is_ragged=True)
HALF_EMPTY = Data(140, is_ragged=True, is_half_empty=True)
DECODE = functools.partial(flash_mla_matrix.Case, capacity=512, num_sms=4)
DECODE_CASES = [
    (DECODE(1, 1, 1), SHORT),
    (DECODE(2, 1, 16), LONG),
    (DECODE(2, 2, 64), LONG),
    (DECODE(2, 1, 128), LONG),
    (DECODE(2, 4, 63), LONG),
    (DECODE(6, 2, 9, causal=False), HALF_EMPTY),
    (DECODE(6, 1, 16, dtype="float16"), HALF_EMPTY),
    (DECODE(2, 1, 16, page_size=128), LONG),
    (DECODE(2, 2, 16, C=256, R=32), LONG),
    (DECODE(1, 4, 128), Data(500, is_ragged=False)),
]
ATTENTION = functools.partial(AttentionCase, K=64, H=64)
ATTENTION_CASES = [
    dataclasses.replace(case, deterministic=deterministic)
    for case in (
        ATTENTION(300, K=192, H=128),
        ATTENTION(300, N=4, G=2, K=128, H=128, causal=False, is_ragged=True),
        ATTENTION(400, num_documents=3),
        ATTENTION(130, B=70, N=1, G=1),  # more tiles than an H200 has multiprocessors
    )
    for deterministic in (False, True)  # gradients in one kernel, and in two
] + [ATTENTION(130, K=256, H=256)]


def decode(arrays, case):
    return mla_decode(
        *arrays,
        latent_dim=case.C,
        scale=(case.C + case.R) ** -0.5,
        causal=case.causal,
        plan=mla_decode_plan(
            arrays.lengths,
            num_rows=case.T * case.N,
            page_size=case.page_size,
            num_sms=case.num_sms,
        ),
        implementation="mosaic_gpu",
    )


def main(only_lists: bool) -> None:
    for case, data in DECODE_CASES:
        if not only_lists:
            arrays, _ = flash_mla_matrix.make_arrays(case, data)
            jax.block_until_ready(decode(arrays, case))
        print(f"mla_decode {case} {data}", flush=True)
    for case in ATTENTION_CASES:
        if not only_lists:
            results = flash_attention_matrix.attend("mosaic_gpu", case.options(), *case.arrays())
            jax.block_until_ready(results)
        print(f"flash_attention {case}", flush=True)


if __name__ == "__main__":
    main(only_lists=sys.argv[1:] == ["--list"])
