"""benchmarks/gpu_check.sh with a stand-in for Python: what it reports, and when it fails."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")


def gpu_check(python, out, *arguments):
    return subprocess.run(
        ["bash", ROOT / "benchmarks/gpu_check.sh", *arguments],
        env={**os.environ, "PYTHON": str(python), "OUT": str(out)},
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


def test_a_stage_that_fails_is_reported_and_the_others_run(stand_in, tmp_path):
    done = gpu_check(stand_in, tmp_path / "out")
    report = (tmp_path / "out/gpu_check.md").read_text()
    assert done.returncode == 1
    assert "| gpu tests | FAILED: exit code 3 |" in report and "broken" in report
    for stage in ("environment", "MLA decode, first figures", "MLA decode against peers"):
        assert f"| {stage} | passed |" in report
    assert "ran -m pallas_kernels.bench mla_decode --smoke" in report
    assert report.index("first figures | passed") < report.index("gpu tests | FAILED")


def test_all_well_is_exit_code_0(tmp_path):
    assert gpu_check(shutil.which("true"), tmp_path / "out").returncode == 0


def test_unknown_arguments_are_refused(tmp_path):
    done = gpu_check(shutil.which("true"), tmp_path / "out", "--fast")
    assert done.returncode == 2 and "--dry-run" in done.stderr


@pytest.mark.slow
def test_every_command_parses(tmp_path):
    done = gpu_check(sys.executable, tmp_path / "out", "--dry-run")
    assert done.returncode == 0, done.stdout
    assert "BROKEN" not in done.stdout and not (tmp_path / "out").exists()


def test_a_command_that_does_not_parse_is_found(stand_in, tmp_path):
    done = gpu_check(stand_in, tmp_path / "out", "--dry-run")
    assert done.returncode == 1 and "BROKEN  gpu tests" in done.stdout
