"""The benchmark: prints figures for what is right, and refuses to time what is wrong."""

import dataclasses
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
    timed, sample = [], timing.sample
    monkeypatch.setattr(timing, "sample", lambda *call: timed.append(call) or sample(*call))
    ours, xla = bench.measure("grouped_matmul", workloads.QUICK[0], ["mosaic_gpu", "xla"])
    assert ours.is_wrong and xla.us is not None and len(timed) == 1


def test_a_wrong_implementation_is_not_timed(quick, with_a_kernel, capsys):
    def wrong(*arguments, **options):
        return 1.001 * api.IMPLEMENTATIONS[-1].run(*arguments, **options)

    with_a_kernel(wrong)
    assert bench.main(["--quick", "grouped_matmul"]) == 1
    printed = capsys.readouterr().out
    (line,) = [line for line in printed.splitlines() if "mosaic_gpu" in line]
    assert "WRONG: relative RMS error 1.0e-03, " in line and line.endswith(" in the worst row")


def test_one_wrong_row_of_many_is_not_timed(quick, with_a_kernel, monkeypatch):
    """Though it hardly changes the error of all."""

    def wrong(*arguments, **options):
        return api.IMPLEMENTATIONS[-1].run(*arguments, **options).at[777].multiply(1.2)

    with_a_kernel(wrong)
    workload = Workload(M=4000, E=2, K=4, N=4, dtype="bfloat16")
    (ours,) = bench.measure("grouped_matmul", workload, ["mosaic_gpu"])
    assert ours.relative_rms_error < bench.BOUNDS["bfloat16"] and ours.us is None
    assert ours.is_wrong


def test_nan_counts_as_wrong_and_is_not_written(quick, with_a_kernel, tmp_path):
    def wrong(*arguments, **options):
        return api.IMPLEMENTATIONS[-1].run(*arguments, **options).at[3, 1].set(jnp.nan)

    with_a_kernel(wrong)
    path = tmp_path / "figures.json"
    assert bench.main(["--quick", "grouped_matmul", "--json", str(path)]) == 1
    ours, xla = json.loads(path.read_text(), parse_constant=pytest.fail)["results"]
    assert ours["note"] == "WRONG: relative RMS error inf, inf in the worst row"
    assert ours["us"] is None and ours["worst_row_error"] is None
    assert ours["relative_rms_error"] is None and xla["us"] > 0


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


def test_a_kernel_that_does_not_lower_is_a_failure(quick, with_a_kernel):
    """Only the dispatcher's refusal means that it was not meant to run."""

    def gap(*arguments, **options):
        raise NotImplementedError("unsupported layout")

    with_a_kernel(gap)
    (ours,) = bench.measure("grouped_matmul", workloads.QUICK[0], ["mosaic_gpu"])
    assert ours.is_wrong and ours.note == "FAILED: NotImplementedError unsupported layout"


def test_a_reference_that_fails_ends_its_workload_and_not_the_run(quick, monkeypatch, tmp_path):
    class TooLarge(Workload):
        def prepare(self, arrays, implementation):
            raise RuntimeError("out of memory")

    sizes = dict(M=8, E=2, K=4, N=4, dtype="float32")
    monkeypatch.setattr(workloads, "QUICK", [TooLarge(**sizes), Workload(**sizes)])
    path = tmp_path / "figures.json"
    assert bench.main(["--quick", "grouped_matmul", "--json", str(path)]) == 1
    failed, timed = json.loads(path.read_text())["results"]
    assert failed["note"] == "FAILED: the reference: RuntimeError out of memory"
    assert failed["us"] is None and timed["us"] > 0


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
    assert row["num_samples"] == 1


def test_only_chooses_workloads_by_name(quick, monkeypatch, capsys):
    monkeypatch.setattr(
        workloads, "QUICK", [Workload(M=8, E=E, K=4, N=4, dtype="float32") for E in (2, 3)]
    )
    assert bench.main(["--quick", "--only", "M.*E3-", "grouped_matmul"]) == 0
    printed = capsys.readouterr().out
    assert "M8-E3" in printed and "M8-E2" not in printed


@pytest.mark.parametrize(
    ("wanted", "found"),
    [([], ["mosaic_gpu", "xla"]), (["--implementation", "xla"], ["xla"])],
    ids=["all", "xla"],
)
def test_only_the_implementation_that_is_named(quick, with_a_kernel, tmp_path, wanted, found):
    with_a_kernel(api.IMPLEMENTATIONS[-1].run)
    path = tmp_path / "figures.json"
    bench.main(["--quick", "grouped_matmul", "--json", str(path), *wanted])
    assert [row["implementation"] for row in json.loads(path.read_text())["results"]] == found


def test_list_names_what_would_run(quick, capsys):
    with pytest.raises(SystemExit) as stopped:
        bench.main(["--quick", "--list", "grouped_matmul"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"{workloads.QUICK[0].name}\n"


def test_no_workload_of_that_name_is_refused(quick, capsys):
    """A misspelt regex would otherwise be a run without figures that passes."""
    with pytest.raises(SystemExit) as stopped:
        bench.main(["--quick", "--only", "E3", "grouped_matmul"])
    assert stopped.value.code == 2
    assert "'E3' is in no name of a workload of grouped_matmul" in capsys.readouterr().err


@pytest.mark.parametrize("op", bench.OPS)
def test_names_fit_into_their_column_and_are_unique(op):
    names = [
        one.name for one in importlib.import_module(f"pallas_kernels.{op}.workloads").WORKLOADS
    ]
    assert max(map(len, names)) <= bench.NAME
    assert len(set(names)) == len(names)


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
    assert wrong.us is None and wrong.note.startswith("WRONG: relative RMS error 1.0e+00")
    assert not any(peer.is_wrong for peer in others)


ATTENTION = functools.partial(
    flash_attention_workloads.Workload, B=2, S=24, N=3, G=3, K=6, H=4, dtype="float32"
)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize(
    "options",
    [{}, {"is_backward": True}, {"num_documents": 4}, {"T": 8}],
    ids=["forward", "backward", "packed", "chunk"],
)
def test_work_of_attention_is_that_of_the_pairs_that_are_seen(options, causal):
    """Counted one by one; of those on a causal border, half. And the chunk runs with its shapes."""
    workload = ATTENTION(causal=causal, **options)
    T, S = options.get("T", 24), 24
    p, s = S - T + np.arange(T)[:, None], np.arange(S)[None]
    document = np.repeat(np.arange(len(sizes := workload.document_lengths())), sizes)
    assert len(sizes) == options.get("num_documents", 1)
    pairs = np.where(s < p, 1, np.where(s == p, 0.5, 0)) if causal else np.ones((T, S))
    pairs = np.sum(pairs * (document[p] == document[s]))
    # q @ k.T, p @ v; and again q @ k.T, dout @ v.T, p.T @ dout, ds @ k, ds.T @ q
    widths = [6, 4, 4, 6, 6] if workload.is_backward else [6, 4]
    assert workload.flops == 2 * 2 * 3 * pairs * sum(widths)
    q, k, v, out = T * 6, S * 6, S * 4, T * 4
    moved = [q, k, v, out, out, q, k, v] if workload.is_backward else [q, k, v, out]
    assert workload.bytes == 4 * 2 * 3 * sum(moved)


def test_a_chunk_of_a_prefill_is_timed(quick):
    (xla,) = bench.measure("flash_attention", ATTENTION(T=8), ["xla"])
    assert "B2-T8-S24-" in xla.workload and xla.us is not None


@pytest.mark.parametrize("name", ["WORKLOADS", "SMOKE"])
def test_the_two_kinds_of_gradients_stand_side_by_side(name):
    every = getattr(flash_attention_workloads, name)
    found = [i for i, one in enumerate(every) if one.deterministic]
    assert len(found) >= 2
    for i in found:
        assert every[i - 1] == dataclasses.replace(every[i], deterministic=False)
