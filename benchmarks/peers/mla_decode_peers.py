"""MLA decode against FlashMLA's dense decode for Hopper (PyPI: sgl-flash-mla), on the same arrays.

python benchmarks/peers/mla_decode_peers.py [--smoke]
"""

import argparse
import importlib.util
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch needs memory too

import jax
import jax.numpy as jnp

from pallas_kernels import bench, timing

OP = "mla_decode"
PEER = "sgl-flash-mla"
LARGEST_COSINE_ERROR = 1e-5  # each is within 5e-6 of float32 in FlashMLA's tests
COLUMNS = (
    f"{'workload':<40} {'ours us':>9} {'peer us':>9} {'peer / ours':>11} {'ours GB/s':>9}"
    f" {'ours TFLOP/s':>12}  timed by"
)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    bench.add_options(parser)
    options = parser.parse_args(arguments)
    workloads = bench.workloads(parser, options, [OP])[OP]
    if (reason := why_not()) is not None:
        print(f"{PEER}: skipped: {reason}")
        return 0
    about, rows = bench.environment(), []
    print(f"{bench.header(about)}\n\n{COLUMNS}")
    for workload in workloads:
        if workload.page_size == 64 and workload.dtype in ("bfloat16", "float16"):
            rows += compare(workload)
            bench.write_json(options.json, about, rows)
    return 1 if any(row.is_wrong for row in rows) else 0


def why_not() -> str | None:
    """Why the peer cannot run here, or None."""
    if jax.default_backend() != "gpu":
        return f"needs an NVIDIA GPU, got {jax.default_backend()!r}"
    if importlib.util.find_spec("torch") is None:
        return "torch is not installed"
    import torch

    if not torch.cuda.is_available():
        return f"torch {torch.__version__} finds no GPU"
    library = _library()
    if library is None:
        return "the wheel is not installed (README.md says how)"
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        return f"{library.name} does not load into torch {torch.__version__}: {error}"
    return None


def compare(workload) -> list[bench.Result]:
    """Prints and returns our time and the peer's; no times if their outputs differ."""
    sets = [workload.arrays(seed) for seed in range(timing.num_copies(workload.bytes))]
    floor = bench.floor_seconds(workload)
    ours = bench.Result(OP, workload.name, "mosaic_gpu")
    peer = bench.Result(OP, workload.name, PEER, is_ours=False)
    method, current = "", peer

    def is_right(got) -> bool:
        return _cosine_error(got.out, want) <= LARGEST_COSINE_ERROR

    try:
        calls = [_peer_call(arrays, workload) for arrays in sets]
        want = _peer_output(calls[-1])
        current = ours
        got, samples = timing.measure(workload.function("mosaic_gpu"), sets, floor, is_right)
        if samples:
            bench.fill(ours, workload, samples)
            current = peer
            samples, method = _peer_samples(calls, floor)
            bench.fill(peer, workload, samples)
        else:
            error = _cosine_error(got.out, want)
            ours.note = f"WRONG: 1 - cosine of ours and the peer's is {error:.1e}"
    except Exception as error:  # so that one failure does not take the other figures with it
        current.note = f"FAILED: {bench.first_line(error)}"
    times = [f"{row.us:9.1f}" if row.us else f"{'-':>9}" for row in (ours, peer)]
    if ours.us and peer.us:
        times.append(f"{peer.us / ours.us:11.3f} {ours.gb_per_s:9.0f} {ours.tflop_per_s:12.1f}")
    print(f"{workload.name:<40}", *times, f" {method}{ours.note or peer.note}", flush=True)
    return [ours, peer]


def _library() -> Path | None:
    spec = importlib.util.find_spec("flash_mla")
    found = list(Path(spec.origin).parent.glob("_C_legacy*.so")) if spec and spec.origin else []
    return found[0] if found else None


def _peer_call(arrays, workload):
    """A function without arguments; the schedule is made once, here, like our plan."""
    import torch

    q, kv_pages, page_table, lengths, _ = jax.block_until_ready(arrays)
    q, kv_pages, page_table, lengths = map(torch.from_dlpack, (q, kv_pages, page_table, lengths))
    scale = (workload.C + workload.R) ** -0.5
    fixed = (q, kv_pages[:, :, None], workload.C, lengths, page_table, scale, True)
    decode = torch.ops.flash_mla_legacy.dense_decode_fwd
    _, _, schedule, num_splits = decode(*fixed, None, None)
    return lambda: decode(*fixed, schedule, num_splits)


def _peer_output(call) -> jax.Array:
    import torch

    out = call()[0].contiguous()
    torch.cuda.synchronize()
    return jnp.from_dlpack(out)


def _cosine_error(a, b) -> float:
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    return float(jnp.sum((a - b) ** 2) / jnp.sum(a**2 + b**2))


def _peer_samples(calls, floor_seconds: float) -> tuple[list[float], str]:
    """Seconds per call of a CUDA graph of many calls; of queued calls if it cannot be captured."""
    import torch

    rounds = timing.calls_per_sample(2 * len(calls) * floor_seconds)

    def run_all():
        for _ in range(rounds):
            for call in calls:
                call()

    run_all()
    torch.cuda.synchronize()
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run_all()
        run, method = graph.replay, "CUDA graph"
    except RuntimeError as error:
        run, method = run_all, f"queued calls (no graph: {bench.first_line(error)[:60]})"
    run()
    torch.cuda.synchronize()
    samples = []
    while not samples or (len(samples) < timing.SAMPLES and sum(samples) < timing.TOTAL_SECONDS):
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        samples.append(time.perf_counter() - start)
    return [seconds / (rounds * len(calls)) for seconds in samples], method


if __name__ == "__main__":
    sys.exit(main())
