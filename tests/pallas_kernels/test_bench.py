"""The benchmark: prints figures for what is right, and refuses to time what is wrong."""

import importlib

import jax.numpy as jnp
import pytest

from pallas_kernels import bench, dispatch
from pallas_kernels.grouped_matmul import workloads
from pallas_kernels.grouped_matmul.workloads import Workload

api = importlib.import_module("pallas_kernels.grouped_matmul.api")


@pytest.fixture
def quick(monkeypatch):
    """A benchmark of one tiny shape and one sample."""
    monkeypatch.setattr(workloads, "QUICK", [Workload(M=8, E=2, K=4, N=4, dtype="float32")])
    monkeypatch.setattr(bench, "SAMPLES", 1)
    monkeypatch.setattr(bench, "SAMPLE_SECONDS", 0)


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
