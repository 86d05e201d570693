"""The benchmark: prints figures for what is right, and refuses to time what is wrong."""

import functools
import importlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import bench, dispatch, timing
from pallas_kernels.flash_attention import workloads as flash_attention_workloads
from pallas_kernels.grouped_matmul import workloads
from pallas_kernels.grouped_matmul.workloads import Workload

api = importlib.import_module("pallas_kernels.grouped_matmul.api")


@pytest.fixture
def quick(monkeypatch):
    """A benchmark of one tiny shape and one sample."""
    monkeypatch.setattr(workloads, "QUICK", [Workload(M=8, E=2, K=4, N=4, dtype="float32")])
    monkeypatch.setattr(timing, "SAMPLES", 1)
    monkeypatch.setattr(timing, "SAMPLE_SECONDS", 0)


@pytest.fixture
def with_a_kernel(monkeypatch):
    """Puts a function before "xla" as the implementation "mosaic_gpu"."""

    def put(run, *why_not):
        kernel = dispatch.Implementation("mosaic_gpu", run, *why_not)
        monkeypatch.setattr(api, "IMPLEMENTATIONS", (kernel, *api.IMPLEMENTATIONS))

    return put


def test_prints_header_and_a_line_a_workload(quick, capsys):
    assert bench.main(["--quick", "grouped_matmul"]) == 0
    printed = capsys.readouterr().out
    for words in ("device:", "jax ", "commit", "inputs: iid normal", "grouped_matmul"):
        assert words in printed
    (line,) = [line for line in printed.splitlines() if "M8-E2" in line]
    assert line.split()[1] == "xla" and float(line.split()[2]) > 0


def test_our_kernel_is_timed_and_written_before_xla(quick, with_a_kernel, monkeypatch, tmp_path):
    """What a run leaves that is cut off while XLA is timed, and what it leaves otherwise."""
    path, measure = tmp_path / "figures.json", timing.measure
    calls = []

    def cut_off(function, arguments, floor, is_right):
        calls.append(function)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return measure(function, arguments, floor, is_right)

    with_a_kernel(api.IMPLEMENTATIONS[-1].run)
    command = ["--quick", "grouped_matmul", "--json", str(path)]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(timing, "measure", cut_off)
        bench.main(command)
    (row,) = json.loads(path.read_text())["results"]
    assert row["implementation"] == "mosaic_gpu" and row["us"] > 0

    assert bench.main(command) == 0
    ours, xla = json.loads(path.read_text())["results"]
    assert ours["times_faster_than_xla"] == pytest.approx(xla["us"] / ours["us"])


def test_a_wrong_implementation_takes_no_time(quick, with_a_kernel, monkeypatch):
    def wrong(*arguments, **options):
        return 2 * api.IMPLEMENTATIONS[-1].run(*arguments, **options)

    with_a_kernel(wrong)
    timed, queued = [], timing._queued
    monkeypatch.setattr(timing, "_queued", lambda *call: timed.append(call) or queued(*call))
    ours, xla = bench.measure("grouped_matmul", workloads.QUICK[0], ["mosaic_gpu", "xla"])
    assert ours.is_wrong and xla.us is not None and len(timed) == 1


def test_a_wrong_implementation_is_not_timed(quick, with_a_kernel, capsys):
    def wrong(*arguments, **options):
        return 1.001 * api.IMPLEMENTATIONS[-1].run(*arguments, **options)

    with_a_kernel(wrong)
    assert bench.main(["--quick", "grouped_matmul"]) == 1
    printed = capsys.readouterr().out
    (line,) = [line for line in printed.splitlines() if "mosaic_gpu" in line]
    assert line.endswith("WRONG: relative RMS error 1.0e-03")


def test_nan_counts_as_wrong():
    assert not bench._relative_rms(jnp.array([jnp.nan]), jnp.array([1.0])) <= 1


def test_an_implementation_that_cannot_run_is_skipped_with_the_reason(quick, with_a_kernel, capsys):
    with_a_kernel(jnp.dot, lambda *a, **k: "the moon is full")
    assert bench.main(["--quick", "grouped_matmul"]) == 0
    assert "skipped: grouped_matmul: implementation 'mosaic_gpu'" in capsys.readouterr().out


def test_an_implementation_that_fails_is_reported_and_the_rest_is_timed(
    quick, with_a_kernel, capsys
):
    def broken(*arguments, **options):
        raise RuntimeError("out of luck\nand more")

    with_a_kernel(broken)
    assert bench.main(["--quick", "grouped_matmul"]) == 1
    printed = capsys.readouterr().out
    assert "FAILED: RuntimeError out of luck\n" in printed
    (line,) = [line for line in printed.splitlines() if " xla " in line]
    assert float(line.split()[2]) > 0


def test_an_exception_without_words_is_named():
    assert bench.first_line(AssertionError()) == "AssertionError"


def test_json_holds_what_is_printed(quick, tmp_path):
    path = tmp_path / "new" / "figures.json"
    assert bench.main(["--quick", "grouped_matmul", "--json", str(path)]) == 0
    written = json.loads(path.read_text())
    assert written["environment"]["device"] and written["environment"]["commit"]
    (row,) = written["results"]
    assert (row["op"], row["implementation"]) == ("grouped_matmul", "xla")
    assert row["us"] > 0 and row["relative_rms_error"] <= bench.BOUNDS["float32"]


def test_only_chooses_workloads_by_name(quick, capsys):
    assert bench.main(["--quick", "--only", "E3$", "grouped_matmul"]) == 0
    assert "M8-E2" not in capsys.readouterr().out


@pytest.mark.parametrize("is_backward", [False, True], ids=["forward", "backward"])
def test_peers_are_timed_beside_ours_and_their_faults_are_not_ours(quick, is_backward):
    workload = flash_attention_workloads.Workload(
        B=1, S=8, N=2, G=2, K=4, H=4, is_backward=is_backward, dtype="float32"
    )

    def absent(workload):
        raise NotImplementedError("is not installed")

    def right(workload):
        return functools.partial(jax.nn.dot_product_attention, is_causal=workload.causal)

    def wrong(workload):
        return lambda q, k, v: 2 * right(workload)(q, k, v)

    peers = {"absent": absent, "right": right, "wrong": wrong}
    *others, xla = bench.measure("flash_attention", workload, ["xla"], peers)
    assert xla.us is not None and xla.times_faster_than_xla == 1
    absent, right, wrong = others
    assert absent.note == "skipped: is not installed"
    assert right.us is not None and right.relative_rms_error <= 1e-5
    assert wrong.us is None and wrong.note == "WRONG: relative RMS error 1.0e+00"
    assert not any(peer.is_wrong for peer in others)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_a_chunk_of_a_prefill(quick, causal):
    """T < S: the shapes, and the work of the pairs that are seen (half of one on the border)."""
    workload = flash_attention_workloads.Workload(
        B=2, T=8, S=24, N=3, G=3, K=6, H=4, causal=causal, dtype="float32"
    )
    assert "B2-T8-S24-" in workload.name
    position, key = 16 + np.arange(8)[:, None], np.arange(24)
    pairs = np.sum((key < position) + (key == position) / 2) if causal else 8 * 24
    assert workload.flops == 2 * 2 * 3 * pairs * (6 + 4)
    out = 2 * 8 * 3 * 4
    assert workload.bytes == 4 * (2 * 3 * (8 * 6 + 24 * 6 + 24 * 4) + out)
    (xla,) = bench.measure("flash_attention", workload, ["xla"])
    assert xla.us is not None
