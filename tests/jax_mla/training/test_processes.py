"""Two real processes, joined by gloo: the command line trains and generates as one process does."""

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from jax.tree_util import keystr
from numerics import assert_close

import jax_mla
from jax_mla.cli.main import main
from jax_mla.training import Checkpoints, Precision, Recipe, abstract_state

KEEP_ALL = "--save-every 1 --keep 20".split()
LAYOUTS = {
    "ddp": "--mesh data=8 --rules ddp",
    "zero1": "--mesh data=8 --rules zero1",
    "zero2": "--mesh data=8 --rules zero2",
    "zero3": "--mesh data=4,fsdp=2 --rules zero3",
    "data x tensor x expert": "--mesh data=2,tensor=2,expert=2 --rules tensor_parallel",
    "experts by all-to-all": "--mesh data=2,expert=4 --rules dp_attention_ep",
    "context": "--mesh data=2,sequence=4 --rules context_parallel",
}

# A stage in both processes, and one in each.
PIPELINES = {
    "stages in both": "--mesh data=4,stage=2 --micro-batches 2 --pipeline gpipe",
    "fsdp x tensor x stages": "--mesh fsdp=2,tensor=2,stage=2 --micro-batches 4",
    "a stage each": "--mesh stage=2,sequence=4 --rules context_parallel --micro-batches 4",
    "zero2": "--mesh data=4,stage=2 --rules zero2 --micro-batches 2",
    "zero3": "--mesh data=2,fsdp=2,stage=2 --rules zero3 --micro-batches 2",
}

# What the config has otherwise, the dtype, the devices of a process, and the mesh of both.
OTHER_PIPELINES = {
    "tied embedding": ({"tie_word_embeddings": True}, "float32", 4, PIPELINES["a stage each"]),
    # Weights so large that the first gradients overflow until their scale has been halved thrice.
    "overflow": ({"initializer_range": 1.0}, "float16", 4, PIPELINES["stages in both"]),
    # The first stage in one process, the second in both, the third in the other.
    "three stages": (
        {"num_hidden_layers": 3},
        "float32",
        3,
        "--mesh stage=3,sequence=2 --rules context_parallel --micro-batches 2",
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, config):
    """A config, a text, and a place for what is compiled."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "config.json").write_text(json.dumps(config.to_hf()))
    (folder / "text.txt").write_text("in the beginning was the word. " * 40)
    return folder


def train_words(folder, steps):
    words = f"train --config {folder}/config.json --data {folder}/text.txt --steps {steps}"
    return f"{words} --batch 8 --seq 16 --lr 0.01 --dtype float32 --json".split()


def packed_words(folder, steps):
    """The same on documents of about five tokens, several in every row."""
    rng = np.random.default_rng(0)
    ids = np.where(
        rng.random(1000) < 0.2, jax_mla.tiny().eos_token_id[0], rng.integers(0, 256, 1000)
    )
    np.save(folder / "packed.npy", ids.astype(np.uint16))
    words = train_words(folder, steps)
    words[words.index(f"{folder}/text.txt")] = f"{folder}/packed.npy"
    return [*words, "--separate-documents"]


def free_port(first=0, last=0):
    """One that nothing listens on, from a range or of the system's choice."""
    for port in range(first, last + 1):
        with socket.socket() as free, contextlib.suppress(OSError):
            free.bind(("localhost", port))
            return free.getsockname()[1]
    raise OSError(f"no port from {first} to {last} is free")


def launch(words, environment):
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "4"} | environment
    return subprocess.Popen(
        [sys.executable, "-m", "jax_mla", *words], env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def start(words, num_devices=4):
    """The same command in two processes of so many devices each."""
    flags = f"--coordinator localhost:{free_port()} --num-processes 2 --process-id".split()
    devices = {"JAX_NUM_CPU_DEVICES": str(num_devices)}
    return [launch([*words, *flags, str(number)], devices) for number in range(2)]


def start_as_slurm(words):
    """The same, started as SLURM does; JAX derives the port from the number of the job."""
    job = {"SLURM_JOB_ID": str(free_port(61_440, 65_535) - 61_440), "SLURM_NTASKS": "2"}
    job |= {"SLURM_STEP_NODELIST": "localhost", "SLURM_STEP_NUM_TASKS": "2"}
    return [
        launch([*words, "--distributed"], job | {"SLURM_PROCID": n, "SLURM_LOCALID": n})
        for n in "01"
    ]


def finish(processes, code=0):
    """What the first process printed as JSON; the other one prints nothing but gloo's line."""
    results = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [code, code], results
    (printed, _), (other, _) = results
    assert "{" not in other
    return json.loads(printed[printed.index("{") :]) if code == 0 else results


def losses(out):
    """Loss and norm of the gradients of every step."""
    rows = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return np.array([(row["loss"], row["grad_norm"]) for row in rows])


def first_gradients(out, config, compute="float32", step=1):
    """Of the first step that is not skipped, clipped: (1 - b1) times them is what AdamW's mean of
    them began with."""
    only, recipe = out / "first", Recipe(num_steps=20, precision=Precision(compute=compute))
    shutil.copytree(out / f"checkpoints/step_{step:08}", only / f"step_{step:08}")
    with Checkpoints(only) as store:
        state = store.restore(abstract_state(config, recipe=recipe)).state
    shutil.rmtree(only)
    leaves = jax.tree_util.tree_leaves_with_path(state.opt_state)
    found = {keystr(path): x / 0.1 for path, x in leaves if ".mu[" in keystr(path)}
    assert len(found) == len(jax.tree.leaves(state.params)) - 1  # all but the router's bias
    return found


def assert_trained_as(alone, out, config):
    """Gradients of the first step, every loss and norm, and the weights after 20 steps."""
    of_two, of_one = (first_gradients(path, config) for path in (out, alone))
    jax.tree.map(lambda x, y: assert_close(x, y, "float32"), of_two, of_one)
    np.testing.assert_allclose(losses(out)[0], losses(alone)[0], rtol=1e-5)
    np.testing.assert_allclose(losses(out), losses(alone), rtol=1e-4)
    (of_two, _), (of_one, _) = (jax_mla.load(path / "model_00000020") for path in (out, alone))
    jax.tree.map(lambda x, y: assert_close(x, y, "float16"), of_two, of_one)


@pytest.fixture(scope="module")
def alone(folder):
    """The folder of 20 steps in this process on one device."""
    out = folder / "alone"
    assert main([*train_words(folder, 20), *KEEP_ALL, "--out", str(out)]) == 0
    return out


def test_two_processes_train_as_one(config, tmp_path):
    """The smallest case of the next tests: no experts, three steps of packed rows."""
    config = dataclasses.replace(config, num_hidden_layers=1, n_routed_experts=None)
    (tmp_path / "config.json").write_text(json.dumps(config.to_hf()))
    words, layout = packed_words(tmp_path, 3), LAYOUTS["zero3"].split()
    processes = start([*words, *layout, "--out", str(tmp_path / "two")])
    assert main([*words, "--out", str(tmp_path / "one")]) == 0
    assert finish(processes)["step"] == 3
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("layout", [pytest.param(v.split(), id=k) for k, v in LAYOUTS.items()])
def test_two_processes_train_and_generate_as_one(layout, folder, alone, config, tmp_path, capsys):
    """20 steps: gradients, every loss and norm, the weights at the end, and what these write."""
    out = tmp_path / "two"
    summary = finish(start([*train_words(folder, 20), *KEEP_ALL, *layout, "--out", str(out)]))
    assert summary["reason"] == "finished" and summary["step"] == 20
    assert_trained_as(alone, out, config)

    words = f"generate --model {alone}/model_00000020 --max-new-tokens 8 --json".split()
    for prompt in ("in", "the", "word", "was", "beginning", "t", "wo", "th"):
        words += ["--prompt", prompt]
    capsys.readouterr()
    assert main(words) == 0
    wanted = json.loads(capsys.readouterr().out)["completions"]
    assert finish(start([*words, *layout]))["completions"] == wanted


@pytest.mark.slow
@pytest.mark.parametrize("layout", [pytest.param(v.split(), id=k) for k, v in PIPELINES.items()])
def test_two_processes_run_a_pipeline_as_one_device(layout, folder, alone, config, tmp_path):
    """20 steps, and what they leave; the last two once more from a checkpoint, to the same bits."""
    out = tmp_path / "two"
    words = [*train_words(folder, 20), *KEEP_ALL, "--out", str(out)]
    assert finish(start([*words, *layout]))["step"] == 20
    assert_trained_as(alone, out, config)

    before = losses(out)
    for path in (out / "checkpoints").glob("step_000000[12]?"):
        if path.name > "step_00000018":
            path.rename(path.with_name(f"later_{path.name}"))
    shutil.rmtree(out / "model_00000020")
    assert finish(start([*words, *layout, "--resume"]))["step"] == 20
    np.testing.assert_array_equal(losses(out), before)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "dtype", "num_devices", "layout"), OTHER_PIPELINES.values(), ids=OTHER_PIPELINES
)
def test_two_processes_run_other_pipelines_as_one(
    change, dtype, num_devices, layout, folder, config, tmp_path
):
    """Five steps, as the same pipeline in one process: which are skipped, gradients, losses."""
    config, one, two = dataclasses.replace(config, **change), tmp_path / "one", tmp_path / "two"
    (tmp_path / "config.json").write_text(json.dumps(config.to_hf()))
    shutil.copy(folder / "text.txt", tmp_path)
    words = [*train_words(tmp_path, 5), *KEEP_ALL, "--dtype", dtype, *layout.split()]
    processes = start([*words, "--out", str(two)], num_devices)
    assert main([*words, "--out", str(one)]) == 0
    skipped = {"float32": 0, "float16": 3}[dtype]
    assert finish(processes)["skipped_steps"] == skipped
    of_two, of_one = (first_gradients(path, config, dtype, 1 + skipped) for path in (two, one))
    jax.tree.map(lambda x, y: assert_close(x, y, dtype), of_two, of_one)
    np.testing.assert_allclose(
        losses(two), losses(one), rtol={"float32": 1e-5, "float16": 1e-3}[dtype]
    )


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["data x tensor x expert", "experts by all-to-all", "context"])
def test_two_processes_pack_as_one(layout, folder, tmp_path):
    words = packed_words(folder, 3)
    processes = start([*words, *LAYOUTS[layout].split(), "--out", str(tmp_path / "two")])
    assert main([*words, "--out", str(tmp_path / "one")]) == 0
    finish(processes)
    packed = losses(tmp_path / "one")
    np.testing.assert_allclose(losses(tmp_path / "two"), packed, rtol=1e-5)
    words.remove("--separate-documents")
    assert main([*words, "--out", str(tmp_path / "whole")]) == 0
    assert abs(losses(tmp_path / "whole")[0, 0] - packed[0, 0]) > 1e-3 * packed[0, 0]


@pytest.mark.slow
@pytest.mark.parametrize("numbers", [(0,), (1,), (0, 1)], ids=["first", "second", "both"])
def test_sigterm_saves_in_both_and_one_process_takes_over(numbers, folder, tmp_path, capsys):
    out = tmp_path / "run"
    words = [*train_words(folder, 40), "--save-every", "1", "--out", str(out)]
    processes = start([*words, *LAYOUTS["zero3"].split()])
    while not (out / "metrics.jsonl").exists() and processes[0].poll() is None:
        time.sleep(0.05)
    for number in numbers:
        processes[number].send_signal(signal.SIGTERM)
    summary = finish(processes)
    stopped = summary["step"]
    assert summary["reason"] == ("SIGTERM" if 0 in numbers else "another process")
    assert 1 <= stopped < 40

    words[words.index("--steps") + 1] = str(stopped + 2)
    assert main([*words, "--resume"]) == 0
    assert f"resuming after step {stopped}" in capsys.readouterr().err
    assert len(losses(out)) == stopped + 2


def test_sigterm_before_training_is_obeyed():
    """JAX's own handler, which `jax.distributed` brings, would only take note of it."""
    code = """
import argparse, os, signal, sys, time
from jax_mla.cli import processes
parser = argparse.ArgumentParser()
processes.add_arguments(parser)
processes.join(parser.parse_args())
os.kill(os.getpid(), signal.SIGTERM)
time.sleep(5)
"""
    flags = f"--coordinator localhost:{free_port()} --num-processes 1 --process-id 0".split()
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", code, *flags], env=environment, timeout=60)
    assert done.returncode == -signal.SIGTERM


@pytest.mark.slow
def test_two_processes_take_over_from_one(folder, alone, tmp_path):
    """Ten steps on one device, ten more on eight: the weights of twenty on one."""
    out, layout = tmp_path / "run", LAYOUTS["data x tensor x expert"].split()
    words = [*train_words(folder, 20), "--save-every", "10", "--out", str(out)]
    assert main(words) == 0
    for path in (out / "checkpoints").glob("step_00000020*"):
        path.rename(path.with_name("later"))
    finish(start([*words, *layout, "--resume"]))
    np.testing.assert_allclose(losses(out), losses(alone), rtol=1e-4)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--coordinator h:1", "--coordinator cannot do without --process-id, --num-processes"),
        ("--process-id 0 --num-processes 2", "--num-processes cannot do without --coordinator"),
        (
            "--coordinator h:1 --process-id 2 --num-processes 2",
            "--process-id must be below --num-processes, which is 2, got 2",
        ),
        (
            "--distributed --coordinator h:1",
            "--distributed finds out what --coordinator says; take one of them",
        ),
    ],
    ids=["alone", "no address", "number", "both"],
)
@pytest.mark.parametrize("command", ["train", "generate"])
def test_flags_that_do_not_fit_are_one_line(command, flags, message, folder, tmp_path, capsys):
    words = {
        "train": [*train_words(folder, 1), "--out", str(tmp_path)],
        "generate": ["generate", "--model", str(folder), "--prompt", "a"],
    }[command]
    assert main([*words, *flags.split()]) == 2
    out, err = capsys.readouterr()
    assert out == "" and message in err and err.count("\n") == 1


@pytest.mark.parametrize("flag", ["--coordinator host", "--coordinator :1", "--process-id -1"])
def test_words_that_are_no_address_and_no_number(flag, folder, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        main([*train_words(folder, 1), "--out", str(tmp_path), *flag.split()])
    assert "must be" in capsys.readouterr().err


def test_no_cluster_is_said(folder, tmp_path, monkeypatch, capsys):
    """As in a process that nothing but a shell started."""
    monkeypatch.setattr(jax.distributed, "initialize", lambda: raise_(ValueError("no address")))
    assert main([*train_words(folder, 1), "--out", str(tmp_path), "--distributed"]) == 2
    err = capsys.readouterr().err
    assert "--distributed found no SLURM, Kubernetes or Open MPI" in err


def raise_(error):
    raise error


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "found"),
    [("", "got none"), ("--mesh data=4", "got one over 4")],
    ids=["none", "small"],
)
@pytest.mark.parametrize("started", [start, start_as_slurm], ids=["flags", "slurm"])
def test_a_process_without_a_part_is_refused(started, mesh, found, folder, tmp_path):
    words = [*train_words(folder, 1), "--out", str(tmp_path), *mesh.split()]
    for _, err in finish(started(words), code=2):
        assert f"2 processes have 8 devices and need a --mesh over all of them, {found}" in err
