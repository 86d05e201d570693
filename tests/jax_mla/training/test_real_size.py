"""DeepSeek-V3 at its real size for 64 devices: compiled from shapes, never run."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import jax_mla
from jax_mla.analysis import memory
from jax_mla.sharding import layouts

PROGRAM = Path(__file__).resolve().parents[3] / "benchmarks" / "compile_v3_mesh.py"
SLOW, AOT = pytest.mark.slow, pytest.mark.kernel_aot


@pytest.mark.parametrize(
    ("program", "platform"),
    [
        ("decode", "cpu"),
        pytest.param("train-bfloat16", "cpu", marks=SLOW),
        pytest.param("decode", "cuda", marks=[SLOW, AOT]),
        pytest.param("train-bfloat16", "cuda", marks=[SLOW, AOT]),
    ],
)
def test_v3_compiles_for_64_devices(program, platform):
    """Its arguments are what was planned, and between H200s its attention is our kernels."""
    words = [sys.executable, PROGRAM, "--only", program, "--platform", platform]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    held = found["held_bytes"]
    assert 0 <= found["argument_bytes"] - sum(held.values()) < 1e6  # tokens, lengths, counts
    assert (found["kernels"] > 0) == (platform == "cuda")
    if program == "decode":
        rules = layouts.dp_attention_ep()
        planned = memory.serving_bytes(jax_mla.v3(), {"expert": 64}, rules, batch=1024)
        assert held["weights"] == planned.parameters
        assert found["collectives"].keys() == {"all-to-all"}
        rows = planned.sequences * 16_384 * planned.cache_per_token
        assert 0 <= held["cache"] - rows < 1e6
    else:  # weights and two moments in bfloat16
        assert held["moments"] == pytest.approx(2 * held["weights"], rel=1e-3)
        assert {"all-gather", "all-to-all"} <= found["collectives"].keys()
        assert ("reduce-scatter" in found["collectives"]) or platform == "cpu"
