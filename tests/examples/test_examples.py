"""Examples and the README run as written, on a CPU, with the network cut off."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))

# Python imports a module of this name at startup.
NO_NETWORK = """
import socket

def refuse(self, address):
    raise OSError(f"this test allows no network, and something connects to {address}")

socket.socket.connect = socket.socket.connect_ex = refuse
"""


# These compile for eight devices: about half a minute each.
SLOW = ("pipeline", "pmap", "sharding")


@pytest.mark.parametrize(
    "example",
    [pytest.param(p, marks=pytest.mark.slow) if p.stem in SLOW else p for p in EXAMPLES],
    ids=lambda path: path.stem,
)
def test_example_runs_offline(example, tmp_path):
    assert run_offline(example, tmp_path, os.environ).strip(), "an example prints something true"


README = (ROOT / "README.md").read_text("utf-8")
# Every block of Python, and the output that is shown below it, if any.
BLOCKS = re.findall(r"```python\n(.*?)```\n(?:```text\n(.*?)```)?", README, re.DOTALL)


def test_the_readme_shows_what_its_first_blocks_print():
    shown = [bool(output) for _, output in BLOCKS]
    assert len(BLOCKS) >= 5 and sum(shown) >= 4


@pytest.mark.slow
def test_python_of_the_readme_runs(tmp_path):
    """In order, in one folder, where the bundled model is where a clone has it."""
    (tmp_path / "text.txt").write_text("In the beginning. " * 200)
    (tmp_path / "jax_mla").symlink_to(ROOT / "jax_mla")
    # What is printed is compared with what users see, whose programs XLA optimises.
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    for i, (block, output) in enumerate(BLOCKS):
        program = tmp_path / f"block_{i}.py"
        program.write_text(block.replace("num_steps=2000", "num_steps=2"))
        printed = run_offline(program, tmp_path, environment)
        assert not output or printed == output


def run_offline(program, tmp_path, environment):
    """What a program prints."""
    (tmp_path / "sitecustomize.py").write_text(NO_NETWORK)
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    environment = {**environment, "PYTHONPATH": path, "JAX_PLATFORMS": "cpu"}
    result = subprocess.run(
        [sys.executable, program],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert result.returncode == 0, result.stderr
    assert "Warning" not in result.stderr, result.stderr
    return result.stdout


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_example_is_short(example):
    text = example.read_text(encoding="utf-8")
    assert ast.get_docstring(ast.parse(text)), "an example begins with what it shows"
    assert len(text.splitlines()) < 60
