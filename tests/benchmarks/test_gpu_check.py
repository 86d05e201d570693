"""benchmarks/gpu_check.sh with a stand-in for Python: what it reports, and when it fails."""

import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")


def gpu_check(python, out, *arguments, **environment):
    return subprocess.run(
        ["bash", ROOT / "benchmarks/gpu_check.sh", *arguments],
        env={**os.environ, "PYTHON": str(python), "OUT": str(out), **environment},
        capture_output=True,
        text=True,
    )


@pytest.fixture
def stand_in(tmp_path):
    """A `python` that fails in the gpu tests, and prints its arguments everywhere else."""
    path = tmp_path / "python"
    path.write_text(
        '#!/bin/sh\ncase "$*" in "-m pytest"*) echo broken; exit 3;; esac\necho "ran $*"\n'
    )
    path.chmod(0o755)
    return path


BY_WORTH = [
    "gpu tests, a case a kernel",
    "MLA decode, first figures",
    "flash attention, first figures",
    "MLA decode against peers",
    "gpu tests",
    "flash attention against peers",
    "grouped matmul, first figures",
]


def test_a_stage_that_fails_is_reported_and_the_others_run(stand_in, tmp_path):
    done = gpu_check(stand_in, tmp_path / "out")
    report = (tmp_path / "out/gpu_check.md").read_text()
    assert done.returncode == 1
    assert "| gpu tests | FAILED: exit code 3 |" in report and "broken" in report
    for stage in ("environment", "MLA decode, first figures", "flash attention against peers"):
        assert f"| {stage} | passed |" in report
    assert "ran -m pallas_kernels.bench mla_decode --smoke" in report
    stages = re.findall("^## (.*)$", report, re.MULTILINE)
    assert stages[1:] == sorted(stages[1:], key=BY_WORTH.index) and len(stages) == 8
    assert "-o minversion=8" in report


@pytest.mark.parametrize(
    ("group", "wanted", "unwanted"),
    [
        ("tests", "gpu tests", "figures"),
        ("bench", "MLA decode against peers", "gpu tests"),
        ("sanitizer", "sanitizer", "gpu tests"),
    ],
)
def test_a_group_alone(tmp_path, group, wanted, unwanted):
    assert gpu_check(shutil.which("true"), tmp_path, group).returncode == 0
    report = (tmp_path / f"gpu_check_{group}.md").read_text()
    assert f"gpu_check.sh {group}` on" in report
    assert f"| {wanted}" in report and unwanted not in report


@pytest.mark.parametrize("group", ["tests", "bench", "sanitizer"])
def test_the_stages_of_a_group_alone_fit_into_its_time(tmp_path, group):
    done = gpu_check(shutil.which("true"), tmp_path / "out", "--dry-run", group)
    limits = [int(limit) for limit in re.findall(r"^ok .*\(at most (\d+) s\)", done.stdout, re.M)]
    assert len(limits) > 1 and sum(limits) <= 530
    assert f"at most {sum(limits)} s, and is stopped after 530 s" in done.stdout


SLOW = """#!/bin/sh
case "$*" in
"-m pytest"*) exec {python} -c 'import time
try: time.sleep(60)
except KeyboardInterrupt: print("2 passed")';;
esac
"""


def test_a_stage_without_enough_time_says_what_it_had_and_where_more_is(tmp_path):
    """The first stage of tests is stopped as by ^C; nothing is left for those behind it."""
    path = tmp_path / "python"
    path.write_text(SLOW.format(python=sys.executable))
    path.chmod(0o755)
    done = gpu_check(path, tmp_path / "out", "--seconds", "2", "tests")
    report = (tmp_path / "out/gpu_check_tests.md").read_text()
    first, second = re.findall(r"^\| gpu tests.*?\| (.*?) \|", report, re.M)
    assert re.fullmatch(r"FAILED: out of time after [12] s of 90 \(gpu_check.sh tests, .*\)", first)
    assert re.fullmatch(r"FAILED: no time was left of 400 \(gpu_check.sh tests, .*\)", second)
    assert "2 passed" in report and "2 s at most" in report and done.returncode == 1


SANITIZER = """#!/bin/sh
case "$*" in *--help*) exit;; esac
echo "========= COMPUTE-SANITIZER, allocator $XLA_PYTHON_CLIENT_ALLOCATOR"
echo "========= {says}"
exit {code}
"""


@pytest.mark.parametrize(
    ("code", "says", "result"),
    [
        (0, "ERROR SUMMARY: 0 errors", "passed"),
        (9, "Invalid __shared__ read of size 4", "FAILED: exit code 9"),
        (1, "Error: Device not supported. See", "did not run: Error: Device not supported. See"),
    ],
    ids=["passes", "finds", "refuses"],
)
def test_what_the_sanitizer_says(tmp_path, code, says, result):
    path = tmp_path / "compute-sanitizer"
    path.write_text(SANITIZER.format(code=code, says=says))
    path.chmod(0o755)
    search = f"{tmp_path}:{os.environ['PATH']}"
    done = gpu_check(shutil.which("true"), tmp_path / "out", "sanitizer", PATH=search)
    report = (tmp_path / "out/gpu_check_sanitizer.md").read_text()
    for tool in ("memcheck", "racecheck"):
        assert f"| sanitizer {tool} | {result} |" in report
    assert "allocator platform" in report
    assert done.returncode == result.startswith("FAILED")


def test_all_well_is_exit_code_0(tmp_path):
    assert gpu_check(shutil.which("true"), tmp_path / "out").returncode == 0


@pytest.mark.parametrize("arguments", [["--fast"], ["--seconds"], ["--seconds", "bench"]], ids=str)
def test_unknown_arguments_are_refused(tmp_path, arguments):
    done = gpu_check(shutil.which("true"), tmp_path / "out", *arguments)
    assert done.returncode == 2 and "--dry-run" in done.stderr and not (tmp_path / "out").exists()


TWO_TESTS = """
import pathlib, time

def test_first():
    assert "this" == "that"

def test_second():
    while not pathlib.Path("go_on").exists():
        time.sleep(0.01)
"""


@pytest.mark.parametrize("workers", ["-n0", "-n1"], ids=["one process", "xdist"])
def test_a_failure_is_printed_while_the_next_test_runs(tmp_path, workers):
    shutil.copy(ROOT / "tests/conftest.py", tmp_path)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    (tmp_path / "test_two.py").write_text(TWO_TESTS)
    command = [sys.executable, "-m", "pytest", "-q", workers, "--failures-at-once"]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    with subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True
    ) as run:
        watchdog = threading.Timer(60, run.kill)
        watchdog.start()
        printed = ""
        while 'assert "this" == "that"' not in printed and (line := run.stdout.readline()):
            printed += line
        assert run.poll() is None, printed
        (tmp_path / "go_on").touch()
        rest = run.stdout.read()
        watchdog.cancel()
    assert "FAILED in call: test_two.py::test_first" in printed
    assert "1 failed, 1 passed" in rest


def test_the_first_cases_are_there(tmp_path):
    """Of every kernel: they are named here, and parametrized elsewhere."""
    printed = gpu_check(shutil.which("true"), tmp_path, "--dry-run", "tests").stdout
    names = re.findall(r"tests/\S+::\S+", printed)
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", *names]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert len(names) == 3 and "3 tests collected" in done.stdout, done.stdout


@pytest.mark.parametrize("groups", [["bench"], pytest.param([], marks=pytest.mark.slow)], ids=str)
def test_every_command_parses(tmp_path, groups):
    """And names workloads and tests that are there."""
    done = gpu_check(sys.executable, tmp_path / "out", "--dry-run", *groups)
    assert done.returncode == 0, done.stdout
    assert "BROKEN" not in done.stdout and not (tmp_path / "out").exists()


def test_a_command_that_does_not_parse_is_found(stand_in, tmp_path):
    done = gpu_check(stand_in, tmp_path / "out", "--dry-run")
    assert done.returncode == 1 and "BROKEN  gpu tests" in done.stdout
