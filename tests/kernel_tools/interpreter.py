"""Runs Mosaic GPU kernels on a CPU, one thread per warpgroup, and fails on data races.

    @pytest.mark.kernel_sim
    def test_decode(rng):
        out, lse = run_simulated(decode, q, kv_pages, page_table, lengths)   # jits, runs, checks

    with simulate():                                       # the same for several calls
        out = jax.block_until_ready(decode(q, kv_pages, page_table, lengths))

Every `plgpu.kernel` traced inside runs in JAX's GPU interpreter with race detection, with shared
memory full of NaN at first, and with the gaps of `interpreter_gaps.py` closed. Races, out-of-range
indices, wrong barrier counts and kernels that hang (no end after `seconds`) raise.

What it cannot see: blocks of a grid run one after another, so a race between blocks may go
unnoticed; register operands of wgmma are read at once; there are no layouts, register counts or
limits of shared memory (`aot.py` has those). About 50 block-steps take a few seconds.
"""

import contextlib
import importlib.util
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax


class RaceError(AssertionError):
    """Two threads of a kernel accessed the same memory in no defined order."""


def why_not() -> str | None:
    """Why the installed JAX cannot simulate kernels, or None. Imports nothing heavy."""
    module = "jax._src.pallas.mosaic_gpu.interpret"
    if importlib.util.find_spec(f"{module}.race_detection_state") is None:
        return f"jax {jax.__version__} has no GPU interpreter with race detection, 0.11.2 has"
    return None


@contextlib.contextmanager
def simulate(*, seconds: float = 300) -> Iterator[None]:
    """Interprets every Mosaic GPU kernel called inside; RaceError names the lines that race.

    Args:
      seconds: a kernel that takes longer counts as hanging, and fails.
    """
    from kernel_tools import interpreter_gaps as gaps  # heavy

    has_ended = threading.Event()

    def watch() -> None:
        if not has_ended.wait(seconds):
            gaps.fail_all_threads(f"no end after {seconds} s")
            while not has_ended.wait(1):  # the kernels after it
                gaps.fail_all_threads(f"no end after {seconds} s")

    gaps.reset_gpu_interpret_mode_state()
    threading.Thread(target=watch, daemon=True).start()
    races: list[str] = []
    try:
        with gaps.closed() as races, gaps.force_gpu_interpret_mode(gaps.PARAMETERS):
            yield
            jax.effects_barrier()
    except Exception:
        if not races:
            raise
    finally:
        has_ended.set()
        gaps.reset_gpu_interpret_mode_state()
    if races:
        raise RaceError(races[0])


def run_simulated(function: Callable[..., Any], *args, seconds: float = 300, **kwargs) -> Any:
    """The results of `jax.jit(function)(*args, **kwargs)`, computed inside `simulate()`."""
    with simulate(seconds=seconds):
        return jax.block_until_ready(jax.jit(lambda: function(*args, **kwargs))())
