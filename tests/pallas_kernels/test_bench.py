"""The benchmark: prints figures for what is right, and refuses to time what is wrong."""

import functools
import importlib
import json

import jax
import jax.numpy as jnp
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


def test_prints_header_and_a_line_a_workload(quick, capsys):
    assert bench.main(["--quick", "grouped_matmul"]) == 0
    printed = capsys.readouterr().out
    for words in ("device:", "jax ", "commit", "inputs: iid normal", "grouped_matmul"):
        assert words in printed
    (line,) = [line for line in printed.splitlines() if "M8-E2" in line]
    assert (line.split()[1], line.split()[-1]) == ("xla", "1.00")


def test_a_wrong_implementation_is_not_timed(quick, capsys, monkeypatch):
    def wrong(*arguments, **options):
        return 1.001 * api.IMPLEMENTATIONS[-1].run(*arguments, **options)

    kernel = dispatch.Implementation("mosaic_gpu", wrong)
    monkeypatch.setattr(api, "IMPLEMENTATIONS", (kernel, *api.IMPLEMENTATIONS))
    assert bench.main(["--quick", "grouped_matmul"]) == 1
    printed = capsys.readouterr().out
    (line,) = [line for line in printed.splitlines() if "mosaic_gpu" in line]
    assert line.endswith("WRONG: relative RMS error 1.0e-03")


def test_nan_counts_as_wrong():
    assert not bench._relative_rms(jnp.array([jnp.nan]), jnp.array([1.0])) <= 1


def test_an_implementation_that_cannot_run_is_skipped_with_the_reason(quick, capsys, monkeypatch):
    kernel = dispatch.Implementation("mosaic_gpu", jnp.dot, lambda *a, **k: "the moon is full")
    monkeypatch.setattr(api, "IMPLEMENTATIONS", (kernel, *api.IMPLEMENTATIONS))
    assert bench.main(["--quick", "grouped_matmul"]) == 0
    assert "skipped: grouped_matmul: implementation 'mosaic_gpu'" in capsys.readouterr().out


def test_an_implementation_that_fails_is_reported_and_the_rest_is_timed(quick, capsys, monkeypatch):
    def broken(*arguments, **options):
        raise RuntimeError("out of luck\nand more")

    kernel = dispatch.Implementation("mosaic_gpu", broken)
    monkeypatch.setattr(api, "IMPLEMENTATIONS", (kernel, *api.IMPLEMENTATIONS))
    assert bench.main(["--quick", "grouped_matmul"]) == 1
    printed = capsys.readouterr().out
    assert "FAILED: RuntimeError out of luck\n" in printed and "1.00" in printed


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
    xla, *others = bench.measure("flash_attention", workload, ["xla"], peers)
    assert xla.us is not None and xla.times_faster_than_xla == 1
    absent, right, wrong = others
    assert absent.note == "skipped: is not installed"
    assert right.us is not None and right.relative_rms_error <= 1e-5
    assert wrong.us is None and wrong.note == "WRONG: relative RMS error 1.0e+00"
    assert not any(peer.is_wrong for peer in others)
