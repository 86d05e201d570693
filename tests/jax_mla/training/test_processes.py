"""Two real processes that train one model and write one checkpoint."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from numerics import assert_close

from jax_mla.cli.main import main

MAIN = """
import sys, jax
jax.config.update("jax_num_cpu_devices", 2)
jax.distributed.initialize(sys.argv[1], num_processes=2, process_id=int(sys.argv[2]))
from jax_mla.cli.main import main
sys.exit(main(sys.argv[3:]))
"""


@pytest.fixture
def words(tmp_path, config):
    (tmp_path / "config.json").write_text(json.dumps(config.to_hf()))
    (tmp_path / "text.txt").write_text("in the beginning was the word. " * 40)
    words = f"train --config {tmp_path}/config.json --data {tmp_path}/text.txt --steps 6"
    return f"{words} --batch 4 --seq 17 --lr 0.01 --dtype float32 --json".split()


def start(words):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    return [
        subprocess.Popen(
            [sys.executable, "-c", MAIN, address, str(number), *words],
            env=os.environ | {"JAX_PLATFORMS": "cpu"}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for number in range(2)
    ]  # fmt: skip


def losses(out):
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return np.array([json.loads(line)["loss"] for line in lines])


@pytest.mark.slow
def test_two_processes_train_as_one_and_one_takes_over(words, tmp_path, capsys):
    """ZeRO-3 over two processes of two devices; one of them gets SIGTERM, and both save and end."""
    assert main([*words, "--out", str(tmp_path / "one")]) == 0
    out = tmp_path / "two"
    mesh = ["--mesh", "data=4", "--rules", "zero3", "--save-every", "1", "--out", str(out)]
    processes = start([*words, *mesh])
    while not (out / "metrics.jsonl").exists() and processes[0].poll() is None:
        time.sleep(0.05)
    processes[1].send_signal(signal.SIGTERM)
    results = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], results
    printed, other = (out for out, _ in results)  # Gloo prints a line, too
    stopped = json.loads(printed[printed.index("{") :])["step"]
    assert "{" not in other and 1 <= stopped < 6

    capsys.readouterr()
    assert main([*words, "--resume", "--out", str(out)]) == 0
    assert f"resuming after step {stopped}" in capsys.readouterr().err
    assert len(losses(out)) == 6
    assert_close(losses(out), losses(tmp_path / "one"), "bfloat16")
