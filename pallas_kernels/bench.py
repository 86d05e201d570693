"""`python -m pallas_kernels.bench [op ...]`: checks every op on its workloads, then times it.

An implementation that is wrong on a workload is not timed on it.
"""

import argparse
import dataclasses
import importlib
import itertools
import json
import math
import platform
import re
import statistics
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch, hardware, timing
from pallas_kernels.accuracy import BOUNDS, WORST, errors

OPS = ("mla_decode", "flash_attention", "grouped_matmul")
NAME = 75  # columns of a workload's name
COLUMNS = (
    f"{'workload':<{NAME}} {'implementation':<14} {'us':>9} {'TFLOP/s':>8} {'GB/s':>8}"
    f" {'% matmul':>8} {'% copy':>7}"
)


@dataclasses.dataclass
class Result:
    """One implementation on one workload; `note` says why there is no time.

    `us` is the median of `num_samples`, and the rates follow from it.
    """

    op: str
    workload: str
    implementation: str
    us: float | None = None
    fastest_us: float | None = None
    num_samples: int = 0
    tflop_per_s: float | None = None
    gb_per_s: float | None = None
    percent_of_matmul: float | None = None
    percent_of_copy: float | None = None
    times_faster_than_xla: float | None = None
    relative_rms_error: float | None = None
    worst_row_error: float | None = None
    note: str = ""
    is_ours: bool = True

    @property
    def is_wrong(self) -> bool:
        return self.is_ours and self.note.startswith(("WRONG", "FAILED"))

    def __str__(self) -> str:
        start = f"{self.workload:<{NAME}} {self.implementation:<14} "
        if self.us is None:
            return start + self.note
        return start + " ".join(
            f"{'-':>{width}}" if value is None else f"{value:{width}.{digits}f}"
            for value, width, digits in (
                (self.us, 9, 1),
                (self.tflop_per_s, 8, 2),
                (self.gb_per_s, 8, 1),
                (self.percent_of_matmul, 8, 1),
                (self.percent_of_copy, 7, 1),
            )
        )


def main(arguments: list[str] | None = None) -> int:
    """Prints one table per op; the exit code is 1 if any implementation was wrong."""
    parser = argparse.ArgumentParser(prog="python -m pallas_kernels.bench", description=__doc__)
    parser.add_argument("op", nargs="*", choices=[*OPS, []], help="default: every op")
    parser.add_argument(
        "--implementation", choices=dispatch.NAMES, help="only this one, and xla for the ratio"
    )
    add_options(parser)
    options = parser.parse_args(arguments)
    chosen = workloads(parser, options, options.op or OPS)
    about = environment()
    print(header(about))
    results: list[Result] = []
    for op, chosen_of_op in chosen.items():
        print(f"\n{op}\n{COLUMNS}")
        table = importlib.import_module(f"pallas_kernels.{op}.api").IMPLEMENTATIONS
        names = [one.name for one in table]
        if options.implementation is not None:
            names = [name for name in names if name in (options.implementation, "xla")]
        for workload in chosen_of_op:
            for result in measure(op, workload, names):
                results.append(result)
                write_json(options.json, about, results)
    return 1 if any(result.is_wrong for result in results) else 0


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options that choose workloads and the output file; the comparisons with peers share them."""
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="a few small shapes, for a CPU")
    size.add_argument("--smoke", action="store_true", help="a few full-sized shapes, for a GPU")
    parser.add_argument("--only", default="", help="workloads whose name has this regex")
    parser.add_argument("--list", action="store_true", help="print the workloads' names and stop")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")


def workloads(
    parser: argparse.ArgumentParser, options: argparse.Namespace, ops: Sequence[str]
) -> dict[str, list]:
    """The chosen workloads by op; ends the program after --list, or if there are none."""
    size = "QUICK" if options.quick else "SMOKE" if options.smoke else "WORKLOADS"
    chosen = {}
    for op in ops:
        every = getattr(importlib.import_module(f"pallas_kernels.{op}.workloads"), size)
        chosen[op] = [one for one in every if re.search(options.only, one.name)]
    if not any(chosen.values()):
        parser.error(f"--only {options.only!r} is in no name of a workload of {', '.join(ops)}")
    if options.list:
        print(*(one.name for of_op in chosen.values() for one in of_op), sep="\n")
        parser.exit()
    return chosen


def environment() -> dict[str, Any]:
    """The machine, the versions and the inputs that the figures belong to."""
    device = jax.devices()[0]
    is_gpu = device.platform == "gpu"
    return dict(
        device=device.device_kind,
        driver=getattr(device.client, "platform_version", "").replace("\n", " "),
        host=platform.machine(),
        jax=jax.__version__,
        python=platform.python_version(),
        commit=_commit(),
        copy_gb_per_s=timing.copy_bytes_per_second() / 1e9 if is_gpu else None,
        matmul_tflop_per_s=timing.matmul_flops_per_second() / 1e12 if is_gpu else None,
        inputs="iid normal (mla_decode: / 10)",
        timing=f"median of up to {timing.SAMPLES} samples after warm-up",
    )


def header(about: dict[str, Any]) -> str:
    """`environment()` in three lines."""
    copy, matmul = about["copy_gb_per_s"], about["matmul_tflop_per_s"]
    rates = f"copy {copy:.0f} GB/s, matmul {matmul:.0f} TFLOP/s" if copy else "not measured"
    return (
        f"device: {about['device']} ({about['driver']}); rates: {rates}; host: {about['host']}\n"
        f"jax {about['jax']}, Python {about['python']}, commit {about['commit']}\n"
        f"inputs: {about['inputs']}; {about['timing']}"
    )


def measure(
    op: str, workload, names: Sequence[str], peers: Mapping[str, Callable] = MappingProxyType({})
) -> Iterator[Result]:
    """Measures every implementation, prints a line for it and yields it; "xla" comes last.

    The other results get `times_faster_than_xla` once "xla" has been timed. If one implementation
    fails, its result says so and the next one runs.

    Args:
      names: our own implementations.
      peers: by name, a function that makes a peer's function for a workload, or raises
        NotImplementedError. If that takes arrays in its own layout, it has the attributes `arrange`
        and `restore` for arguments and results; neither is timed.
    """
    order = sorted([*names, *peers], key=lambda name: name == "xla")
    results = [Result(op, workload.name, name, is_ours=name not in peers) for name in order]
    sets, want, why_not = None, None, ""
    try:
        sets = _argument_sets(workload)
        want = _reference(workload, sets[-1])
    except Exception as error:
        why_not = f"FAILED: the reference: {first_line(error)}"
    for result in results:
        if why_not:
            result.note = why_not
        else:
            _measure_one(result, workload, peers, sets, want)
        print(result, flush=True)
        if result.implementation == "xla" and result.us:
            _compare_with_xla(results, result.us)
        yield result


def _measure_one(result: Result, workload, peers, sets, want) -> None:
    """Fills in the figures of `result`, or its note."""
    name = result.implementation
    # Our own kernels are refused only by the dispatcher: what the compiler refuses is a failure.
    refusal = dispatch.CannotRun if result.is_ours else NotImplementedError
    try:
        implementation = peers[name](workload) if name in peers else name
        errors, samples = _timed(workload, implementation, sets, want)
    except refusal as reason:
        result.note = f"skipped: {reason}"
    except Exception as error:
        result.note = f"FAILED: {first_line(error)}"
    else:
        if all(map(math.isfinite, errors)):  # JSON has no NaN
            result.relative_rms_error, result.worst_row_error = errors
        if samples:
            fill(result, workload, samples)
        else:
            whole, row = errors
            result.note = f"WRONG: relative RMS error {whole:.1e}, {row:.1e} in the worst row"


def _argument_sets(workload) -> list:
    """Arrays of a workload; where memory bounds it, more sets of them than the cache can hold."""
    is_gpu = jax.default_backend() == "gpu"
    num_sets = timing.num_copies(workload.bytes) if is_gpu and _is_memory_bound(workload) else 1
    return [workload.arrays(seed) for seed in range(num_sets)]


def _timed(workload, implementation, sets, want) -> tuple[tuple[float, float], list[float]]:
    """The errors of an implementation, and samples of seconds per call if these are in bounds."""
    arrange = getattr(implementation, "arrange", lambda arrays: arrays)
    restore = getattr(implementation, "restore", lambda result: result)

    def is_right(got) -> bool:
        whole, row = _errors(restore(got), want)
        return whole <= BOUNDS[workload.dtype] and row <= WORST * BOUNDS[workload.dtype]

    function, floor = workload.function(implementation), floor_seconds(workload)
    arguments = [workload.prepare(arrange(arrays), implementation) for arrays in sets]
    got, samples = timing.measure(function, arguments, floor, is_right)
    return _errors(restore(got), want), samples


def _compare_with_xla(results: list[Result], xla_us: float) -> None:
    """Fills in `times_faster_than_xla` of one workload's results and prints it."""
    for result in results:
        if result.us:
            result.times_faster_than_xla = ratio = xla_us / result.us
            if result.implementation != "xla":
                print(f"{result.workload:<{NAME}} {result.implementation:<14} {ratio:9.2f} x xla")


def first_line(error: Exception) -> str:
    """An exception in one line."""
    return " ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])


def write_json(path: Path | None, about: dict[str, Any], results: list[Result]) -> None:
    """Called after every result, so that an interrupted run leaves what it has."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = [dataclasses.asdict(result) for result in results]
        written = json.dumps({"environment": about, "results": rows}, indent=1, allow_nan=False)
        path.write_text(written + "\n")


def fill(result: Result, workload, samples: list[float]) -> None:
    """Fills in the figures that follow from `samples` of seconds per call."""
    seconds = statistics.median(samples)
    result.us, result.fastest_us = seconds * 1e6, min(samples) * 1e6
    result.num_samples = len(samples)
    flops, num_bytes = workload.flops / seconds, workload.bytes / seconds
    result.tflop_per_s, result.gb_per_s = flops / 1e12, num_bytes / 1e9
    if jax.default_backend() == "gpu":
        result.percent_of_matmul = 100 * flops / timing.matmul_flops_per_second()
        result.percent_of_copy = 100 * num_bytes / timing.copy_bytes_per_second()


def _reference(workload, arrays):
    """The definition of the op, in float32 on the same rounded inputs."""

    def to_float32(x):
        return x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x

    arguments = workload.prepare(jax.tree.map(to_float32, arrays), "xla")
    return jax.jit(workload.function("xla"))(*arguments)


def _errors(got, want) -> tuple[float, float]:
    """The largest `errors` of an op's results."""
    found = itertools.starmap(errors, zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True))
    whole, row = zip(*found, strict=True)
    return max(whole), max(row)


def floor_seconds(workload) -> float:
    """Least seconds by the device's data sheet; a millisecond where it is not listed."""
    peak = hardware.peak()
    if peak is None:
        return 1e-3
    return max(workload.flops / peak.bf16_flops, workload.bytes / peak.bandwidth_bytes)


def _is_memory_bound(workload) -> bool:
    peak = hardware.peak()
    if peak is None:
        return True
    return workload.bytes / peak.bandwidth_bytes > workload.flops / peak.bf16_flops


def _commit() -> str:
    """Commit of the checkout that this file is in; an installed package has none."""
    try:
        command = ["git", "rev-parse", "--short", "HEAD"]
        folder = Path(__file__).parent
        out = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
        return out.stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


if __name__ == "__main__":
    raise SystemExit(main())
