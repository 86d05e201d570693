"""Real processes that are killed: the run that goes on ends in the same bits."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from jax_mla.cli.main import main

NUM_STEPS = 12


def train_words(folder, out):
    """`jax-mla train` that saves every step."""
    return f"""train --config {folder}/config.json --data {folder}/text.txt --steps {NUM_STEPS}
        --batch 2 --seq 17 --lr 0.01 --dtype float32 --save-every 1 --keep 2 --resume
        --out {out}""".split()


def starter(folder, config):
    """A function that starts such a run as a process; what is compiled is kept."""
    (folder / "config.json").write_text(json.dumps(config.to_hf()))
    (folder / "text.txt").write_text("in the beginning was the word. " * 40)
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_NUM_CPU_DEVICES": str(jax.device_count()),
    }

    def start(out):
        return subprocess.Popen(
            [sys.executable, "-m", "jax_mla", *train_words(folder, out)], env=environment,
            text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    return start


@pytest.fixture(scope="module")
def command(tmp_path_factory, config):
    """Of the smallest model that has every part."""
    config = dataclasses.replace(config, num_hidden_layers=2, first_k_dense_replace=1)
    return starter(tmp_path_factory.mktemp("command"), config)


@pytest.fixture(scope="module")
def uninterrupted(command, tmp_path_factory):
    out = tmp_path_factory.mktemp("uninterrupted")
    finish(command(out))
    return out


def finish(process):
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out


def interrupt(process, how, step, delay):
    """Sends a signal some time after a step was reported; the exit code and what was printed."""
    printed = ""
    for line in process.stdout:
        printed += line
        if line.startswith("step") and int(line.split()[1]) >= step:
            break
    time.sleep(delay)
    process.send_signal(how)
    out, err = process.communicate(timeout=120)
    return process.returncode, printed + out, err


def assert_same_run(out, wanted):
    """Weights, optimizer, position in the data, and the metrics of every step once."""
    weights = f"model_{NUM_STEPS:08}/model.safetensors"
    assert (out / weights).read_bytes() == (wanted / weights).read_bytes()
    losses = []
    for folder in (out, wanted):
        rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        losses.append([(row["step"], row["loss"], row["grad_norm"]) for row in rows])
    assert losses[0] == losses[1] and [row[0] for row in losses[0]] == [*range(1, NUM_STEPS + 1)]
    assert not [path for path in (out / "checkpoints").iterdir() if path.name.startswith(".")]


def test_three_kills_of_one_run(tmp_path, config, rng):
    """A model of one dense layer, killed while it trains and saves; this process ends the run."""
    command = starter(tmp_path, dataclasses.replace(config, first_k_dense_replace=1))
    assert main(train_words(tmp_path, tmp_path / "whole")) == 0
    codes = []
    for step in (2, 5, 8):
        process = command(tmp_path / "run")
        codes.append(interrupt(process, signal.SIGKILL, step, rng.uniform(0, 0.02))[0])
        assert codes[-1] in (-signal.SIGKILL, 0)  # 0: it was faster than the signal
    assert -signal.SIGKILL in codes
    assert main(train_words(tmp_path, tmp_path / "run")) == 0
    assert_same_run(tmp_path / "run", tmp_path / "whole")


@pytest.mark.slow
def test_sigterm_saves_and_kills_lose_what_was_not_saved(tmp_path, command, uninterrupted, rng):
    """SIGTERM and three times kill -9, one after the other in the same run."""
    code, out, err = interrupt(command(tmp_path), signal.SIGTERM, 2, 0)
    assert code == 0 and "stopped by SIGTERM after step" in out, err
    codes = []
    for step in (4, 7, 10):
        process = command(tmp_path)
        codes.append(interrupt(process, signal.SIGKILL, step, rng.uniform(0, 0.2))[0])
        assert codes[-1] in (-signal.SIGKILL, 0)  # 0: it was faster than the signal
        assert (tmp_path / "checkpoints").is_dir()
    assert -signal.SIGKILL in codes
    assert f"finished after step {NUM_STEPS}" in finish(command(tmp_path))
    assert_same_run(tmp_path, uninterrupted)


@pytest.mark.slow
@pytest.mark.parametrize("run", range(10))
def test_a_kill_at_a_random_time(tmp_path, command, uninterrupted, run):
    rng = np.random.default_rng(run)
    process = command(tmp_path)
    code, *_ = interrupt(process, signal.SIGKILL, rng.integers(1, NUM_STEPS), rng.uniform(0, 0.3))
    assert code in (-signal.SIGKILL, 0)
    finish(command(tmp_path))
    assert_same_run(tmp_path, uninterrupted)
