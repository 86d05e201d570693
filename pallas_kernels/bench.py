"""`python -m pallas_kernels.bench [op ...]`: checks every op on its workloads, then times it.

An implementation that is wrong on a workload is not timed on it.
"""

import argparse
import importlib
import platform
import statistics
import subprocess
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import hardware

OPS = ("mla_decode", "flash_attention", "grouped_matmul")
BOUNDS = {"float32": 1e-5, "bfloat16": 5e-3, "float16": 1e-3}  # RMS error relative to RMS
SAMPLES = 20
SAMPLE_SECONDS = 0.02  # calls are queued to last this long, so that dispatch hides behind them
COLUMNS = (
    f"{'workload':<56} {'implementation':<14} {'us':>9} {'TFLOP/s':>8} {'GB/s':>8}"
    f" {'% peak':>7} {'x xla':>6}"
)


def main(arguments: list[str] | None = None) -> int:
    """Prints a table an op; the exit code is 1 if any implementation was wrong."""
    parser = argparse.ArgumentParser(prog="python -m pallas_kernels.bench", description=__doc__)
    parser.add_argument("op", nargs="*", choices=[*OPS, []], help="default: every op")
    parser.add_argument("--quick", action="store_true", help="a few small shapes, for a CPU")
    parser.add_argument("--implementation", help="only this one, and xla for the ratio")
    options = parser.parse_args(arguments)
    print(header())
    is_right = True
    for op in options.op or OPS:
        print(f"\n{op}\n{COLUMNS}")
        table = importlib.import_module(f"pallas_kernels.{op}.api").IMPLEMENTATIONS
        workloads = importlib.import_module(f"pallas_kernels.{op}.workloads")
        names = [one.name for one in table if options.implementation in (None, one.name, "xla")]
        for workload in workloads.QUICK if options.quick else workloads.WORKLOADS:
            is_right &= measure(workload, names)
    return 0 if is_right else 1


def header() -> str:
    """The machine, the versions and the inputs, without which a number means nothing."""
    device = jax.devices()[0]
    peak = hardware.peak(device)
    rates = (
        f"{peak.bf16_flops / 1e12:.0f} TFLOP/s, {peak.bandwidth_bytes / 1e9:.0f} GB/s"
        if peak
        else "unknown"
    )
    driver = getattr(device.client, "platform_version", "").replace("\n", " ")
    return (
        f"device: {device.device_kind} ({driver}); peak: {rates}; host: {platform.machine()}\n"
        f"jax {jax.__version__}, Python {platform.python_version()}, commit {_commit()}\n"
        f"inputs: iid normal (mla_decode: / 10); median of {SAMPLES} samples after warm-up"
    )


def measure(workload, names: list[str]) -> bool:
    """Prints a line for every implementation, "xla" first; False if one of them is wrong."""
    arrays = workload.arrays()
    want = _reference(workload, arrays)
    xla_seconds, is_right = None, True
    for name in sorted(names, key=lambda name: name != "xla"):
        try:
            run = jax.jit(workload.function(name)).lower(*arrays).compile()
        except NotImplementedError as reason:
            print(f"{workload.name:<56} {name:<14} skipped: {reason}")
            continue
        error = _relative_rms(run(*arrays), want)
        if not error <= BOUNDS[workload.dtype]:
            print(f"{workload.name:<56} {name:<14} WRONG: relative RMS error {error:.1e}")
            is_right = False
            continue
        seconds = _median_seconds(run, arrays)
        xla_seconds = seconds if name == "xla" else xla_seconds
        print(f"{workload.name:<56} {name:<14} {_figures(workload, seconds, xla_seconds)}")
    return is_right


def _reference(workload, arrays):
    """The definition of the op, in float32 on the same rounded inputs."""
    floats = [x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x for x in arrays]
    return jax.jit(workload.function("xla"))(*floats)


def _relative_rms(got, want) -> float:
    """The largest RMS(got - want) / RMS(want) over the results of an op."""
    errors = []
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        g, w = jnp.asarray(g, jnp.float32), jnp.asarray(w, jnp.float32)
        errors.append(float(jnp.sqrt(jnp.mean((g - w) ** 2) / jnp.mean(w**2))))
    return float(np.max(errors))  # NaN stays NaN, and is no smaller than any bound


def _median_seconds(run, arrays) -> float:
    """Seconds a call when calls are queued, so that the host's part hides behind the device's."""
    start = time.perf_counter()
    jax.block_until_ready(run(*arrays))
    calls = max(1, round(SAMPLE_SECONDS / (time.perf_counter() - start)))
    samples = []
    for _ in range(SAMPLES):
        start = time.perf_counter()
        for _ in range(calls):
            out = run(*arrays)
        jax.block_until_ready(out)
        samples.append((time.perf_counter() - start) / calls)
    return statistics.median(samples)


def _figures(workload, seconds: float, xla_seconds: float | None) -> str:
    flops, bandwidth = workload.flops / seconds, workload.bytes / seconds
    peak = hardware.peak()
    share = max(flops / peak.bf16_flops, bandwidth / peak.bandwidth_bytes) if peak else None
    percent = f"{100 * share:7.1f}" if share else f"{'-':>7}"
    ratio = f"{xla_seconds / seconds:6.2f}" if xla_seconds else f"{'-':>6}"
    return f"{seconds * 1e6:9.1f} {flops / 1e12:8.2f} {bandwidth / 1e9:8.1f} {percent} {ratio}"


def _commit() -> str:
    """Of the checkout that this file is in; an installed package has none."""
    try:
        command = ["git", "rev-parse", "--short", "HEAD"]
        folder = Path(__file__).parent
        out = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
        return out.stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


if __name__ == "__main__":
    raise SystemExit(main())
