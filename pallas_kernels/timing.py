"""Device time of a function, without Python's share, and the rates that bound it.

On a GPU the calls run one after another inside one compiled loop. What is timed is all kernels of a
call and the gaps between them, but no Python and no program launch. Summing kernel times from a
profiler would leave out the gaps; calls queued from Python would measure Python where kernels are
short. Arrays that fit in the cache would still be there at the next call, which they would not be
between the layers of a model: `num_copies` says how many sets of arrays to use in turn.
"""

import functools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

SAMPLES = 20
SAMPLE_SECONDS = 0.02  # enough calls per sample to take this long, which hides its start
TOTAL_SECONDS = 1.0  # slow functions get fewer samples
CACHE_BYTES = 64 * 2**20  # more than any listed GPU's level 2
COPY_BYTES, MATMUL_SIZE = 2 * 2**30, 8192  # sizes for measuring the device's rates


def repeat(function: Callable[..., Any], num_rounds: int) -> Callable[..., Any]:
    """A program that calls `function` on every one of its argument tuples, `num_rounds` times.

    Returns what the last call returns. The optimization barrier makes the arguments of a call
    depend on the result of the one before; it costs nothing on the device.
    """

    def program(*argument_sets):
        def one_round(_, out):
            for arguments in argument_sets:
                arguments, _ = jax.lax.optimization_barrier((arguments, out))
                out = function(*arguments)
            return out

        shapes = jax.eval_shape(function, *argument_sets[0])
        nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        return jax.lax.fori_loop(0, num_rounds, one_round, nothing)

    return jax.jit(program)


def measure(
    function: Callable[..., Any],
    argument_sets: Sequence[tuple],
    floor_seconds: float,
    is_right: Callable[[Any], bool] = lambda result: True,
) -> tuple[Any, list[float]]:
    """What `function` returns for the last of `argument_sets`, and samples of seconds per call.

    Args:
      function: jittable.
      argument_sets: used in turn on a GPU; elsewhere only the last one is used.
      floor_seconds: no call is expected to be faster.
      is_right: checks the result before anything is timed; no samples are taken if it is wrong.
    """
    if jax.default_backend() != "gpu":
        compiled = jax.jit(function).lower(*argument_sets[-1]).compile()
        result = compiled(*argument_sets[-1])
        return result, _queued(compiled, argument_sets[-1]) if is_right(result) else []
    rounds = calls_per_sample(2 * len(argument_sets) * floor_seconds)
    program = repeat(function, rounds)
    result = jax.block_until_ready(program(*argument_sets))
    if not is_right(result):
        return result, []
    return result, sample(lambda: program(*argument_sets), rounds * len(argument_sets))


def num_copies(num_bytes: float) -> int:
    """Sets of arrays of `num_bytes` to use in turn, so that none is in the cache when used."""
    return max(1, math.ceil(4 * CACHE_BYTES / num_bytes)) if num_bytes < 4 * CACHE_BYTES else 1


def calls_per_sample(seconds: float) -> int:
    """Calls of a function that takes this long."""
    return min(max(1, round(SAMPLE_SECONDS / seconds)), 2000)


def sample(run: Callable[[], Any], calls: int) -> list[float]:
    """Seconds per call of the program `run`, which makes `calls` calls; it has run once before."""
    samples: list[float] = []
    while not samples or (len(samples) < SAMPLES and sum(samples) * calls < TOTAL_SECONDS):
        start = time.perf_counter()
        jax.block_until_ready(run())
        samples.append((time.perf_counter() - start) / calls)
    return samples


def _queued(function: Callable[..., Any], arguments: tuple) -> list[float]:
    """Seconds per call of calls queued from Python: good enough where they take long, on a CPU."""
    start = time.perf_counter()
    jax.block_until_ready(function(*arguments))
    calls = calls_per_sample(time.perf_counter() - start)

    def run():
        for _ in range(calls - 1):
            function(*arguments)
        return function(*arguments)

    return sample(run, calls)


@functools.cache
def copy_bytes_per_second() -> float:
    """Rate of a copy within the device's memory, reads plus writes."""
    x = jax.random.bits(jax.random.key(0), (COPY_BYTES // 4,), jnp.uint32)
    program = repeat(jnp.invert, 4)
    jax.block_until_ready(program((x,)))
    return 2 * x.nbytes / statistics.median(sample(lambda: program((x,)), 4))


@functools.cache
def matmul_flops_per_second() -> float:
    """Rate of XLA's matmul of two square bfloat16 matrices of normal numbers."""
    size = MATMUL_SIZE
    a, b = jax.random.normal(jax.random.key(0), (2, size, size), jnp.bfloat16)
    program = repeat(jnp.dot, 20)
    jax.block_until_ready(program((a, b)))
    return 2 * size**3 / statistics.median(sample(lambda: program((a, b)), 20))
