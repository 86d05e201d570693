"""Flash attention against float32 on the same rounded inputs: out, lse and all three gradients.

    check_attention("mosaic_gpu", AttentionCase(S=300, N=4, K=192))     # AssertionError if not

An error may be twice that of "xla" in the same dtype, three times for a gradient: both round to it.
Rows are also compared one by one, with twice that: a wrong one would be lost among thousands.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from kernel_tools.cases import AttentionCase

from pallas_kernels import flash_attention
from pallas_kernels.accuracy import errors

FACTOR = {"out": 2, "lse": 2, "dq": 3, "dk": 3, "dv": 3}
LSE_ROUNDING = 1e-5  # RMS relative to RMS: exponentials of a GPU are approximate
Forward = Callable[..., Any]  # q, k, v and the op's options to out and lse


def check_attention(
    implementation: str | Forward,
    case: AttentionCase,
    seed: int = 0,
    run: Callable[..., Any] = lambda function, *args: jax.jit(function)(*args),
) -> None:
    """Compares `implementation` with float32; AssertionError names the case and what is off.

    run(function, *args) calls the function; the simulator's own runs it there.
    """
    options = case.options(seed)
    inputs, cotangents = case.arrays(seed)
    want = attend("xla", options, *_cast(inputs, cotangents, "float32"))
    usual = attend("xla", options, inputs, cotangents)
    assert_accurate(attend(implementation, options, inputs, cotangents, run), usual, want, case)


def assert_accurate(got: dict, usual: dict, want: dict, case: object) -> None:
    """Compares results with those in float32, and their errors with the usual ones."""
    for name in want:
        assert got[name].dtype == usual[name].dtype, name
        found, yardsticks = errors(got[name], want[name]), errors(usual[name], want[name])
        least = LSE_ROUNDING if name == "lse" else 0
        for place, factor, error, yardstick in zip(
            ("", " in its worst row"), (1, 2), found, yardsticks, strict=True
        ):
            allowed = factor * max(FACTOR[name] * yardstick, least)
            assert error <= allowed, (
                f"{case}: {name} has a relative RMS error{place} of {error:.2e},"
                f" {allowed:.2e} is allowed"
            )


def attend(
    implementation: str | Forward,
    options: dict,
    inputs: tuple,
    cotangents: tuple,
    run: Callable[..., Any] = lambda function, *args: jax.jit(function)(*args),
) -> dict[str, jax.Array]:
    """out, lse and the gradients for these cotangents, NaN for the lse of a row without keys.

    A caller's log or division makes such a NaN, and it must reach no gradient.
    """
    forward = implementation
    if isinstance(implementation, str):
        forward = functools.partial(flash_attention, return_lse=True, implementation=implementation)

    def differentiate(inputs, cotangents):
        (out, lse), pull_back = jax.vjp(lambda *qkv: forward(*qkv, **options), *inputs)
        dout, dlse = cotangents
        gradients = pull_back((dout, jnp.where(lse == -jnp.inf, jnp.nan, dlse)))
        return dict(zip(FACTOR, (out, lse, *gradients), strict=True))

    return run(differentiate, inputs, cotangents)


def _cast(inputs, cotangents, dtype):
    dout, dlse = cotangents
    return tuple(x.astype(dtype) for x in inputs), (dout.astype(dtype), dlse)
