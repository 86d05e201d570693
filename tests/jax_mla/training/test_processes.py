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
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.tree_util import keystr
from layouts import MESH_LAYOUTS
from numerics import assert_close

import jax_mla
from jax_mla.cli.main import main
from jax_mla.training import Checkpoints, Precision, Recipe, abstract_state

KEEP_ALL = "--save-every 1 --keep 20"
LAYOUTS = (
    "ddp", "zero1", "zero2", "zero3", "data_tensor_expert", "dp_attention_ep", "context",
)  # fmt: skip

# A stage in both processes, and one in each.
PIPELINES = {
    "stages in both": "--mesh data=4,stage=2 --micro-batches 2 --pipeline gpipe",
    "fsdp x tensor x stages": "--mesh fsdp=2,tensor=2,stage=2 --micro-batches 4",
    "a stage each": "--mesh stage=2,sequence=4 --rules context_parallel --micro-batches 4",
    "zero2": "--mesh data=4,stage=2 --rules zero2 --micro-batches 2",
    "zero3": "--mesh data=2,fsdp=2,stage=2 --rules zero3 --micro-batches 2",
}


@dataclasses.dataclass(frozen=True)
class PipelineCase:
    """A pipeline that the 20 steps of the others do not cover.

    Attributes:
      layout: flags.
      changes: fields of the config.
      num_devices: of one process.
      skipped_steps: how many come before the first that is not skipped.
      rtol: of losses and norms.
    """

    layout: str
    changes: dict
    dtype: str = "float32"
    num_devices: int = 4
    skipped_steps: int = 0
    rtol: float = 1e-5


OTHER_PIPELINES = {
    "tied embedding": PipelineCase(PIPELINES["a stage each"], {"tie_word_embeddings": True}),
    # Weights so large that the first gradients overflow until their scale has been halved thrice.
    "overflow": PipelineCase(
        PIPELINES["stages in both"],
        {"initializer_range": 1.0},
        dtype="float16",
        skipped_steps=3,
        rtol=1e-3,
    ),
    # The first stage in one process, the second in both, the third in the other.
    "three stages": PipelineCase(
        "--mesh stage=3,sequence=2 --rules context_parallel --micro-batches 2",
        {"num_hidden_layers": 3},
        num_devices=3,
    ),
}


@dataclasses.dataclass(frozen=True)
class TrainCommand:
    """`jax-mla train` on a config and a text of `folder`, with losses that fall in a few steps."""

    folder: Path
    out: Path
    steps: int
    data: str = "text.txt"
    dtype: str = "float32"
    layout: str = ""
    flags: str = ""

    @property
    def words(self) -> list[str]:
        files = f"--config {self.folder}/config.json --data {self.folder}/{self.data}"
        sizes = f"--steps {self.steps} --batch 8 --seq 16 --lr 0.01 --dtype {self.dtype}"
        command = f"train {files} {sizes} --json --out {self.out} {self.layout} {self.flags}"
        return command.split()


@pytest.fixture(scope="module")
def config(config):
    """One dense layer and one mixture of experts."""
    return dataclasses.replace(config, num_hidden_layers=2, first_k_dense_replace=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, config):
    """A config, a text, and a place for what is compiled."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "config.json").write_text(json.dumps(config.to_hf()))
    (folder / "text.txt").write_text("in the beginning was the word. " * 40)
    return folder


def write_documents(folder):
    """Some of about five tokens, several in every row: `packed.npy`."""
    rng = np.random.default_rng(0)
    ids = np.where(
        rng.random(1000) < 0.2, jax_mla.tiny().eos_token_id[0], rng.integers(0, 256, 1000)
    )
    np.save(folder / "packed.npy", ids.astype(np.uint16))


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
    assert main(TrainCommand(folder, out, 20, flags=KEEP_ALL).words) == 0
    return out


def test_two_processes_train_as_one(config, tmp_path):
    """The smallest case of the next tests: no experts, three steps of packed rows."""
    config = dataclasses.replace(config, num_hidden_layers=1, n_routed_experts=None)
    (tmp_path / "config.json").write_text(json.dumps(config.to_hf()))
    write_documents(tmp_path)
    one = TrainCommand(
        tmp_path, tmp_path / "one", 3, data="packed.npy", flags="--separate-documents"
    )
    two = dataclasses.replace(one, out=tmp_path / "two", layout=MESH_LAYOUTS["zero3"].flags())
    processes = start(two.words)
    assert main(one.words) == 0
    assert finish(processes)["step"] == 3
    np.testing.assert_allclose(losses(two.out), losses(one.out), rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_two_processes_train_and_generate_as_one(name, folder, alone, config, tmp_path, capsys):
    """20 steps: gradients, every loss and norm, the weights at the end, and what these write."""
    out, layout = tmp_path / "two", MESH_LAYOUTS[name].flags()
    summary = finish(start(TrainCommand(folder, out, 20, layout=layout, flags=KEEP_ALL).words))
    assert summary["reason"] == "finished" and summary["step"] == 20
    assert_trained_as(alone, out, config)

    words = f"generate --model {alone}/model_00000020 --max-new-tokens 8 --json".split()
    for prompt in ("in", "the", "word", "was", "beginning", "t", "wo", "th"):
        words += ["--prompt", prompt]
    capsys.readouterr()
    assert main(words) == 0
    wanted = json.loads(capsys.readouterr().out)["completions"]
    assert finish(start([*words, *layout.split()]))["completions"] == wanted


@pytest.mark.slow
@pytest.mark.parametrize("layout", PIPELINES.values(), ids=PIPELINES)
def test_two_processes_run_a_pipeline_as_one_device(layout, folder, alone, config, tmp_path):
    """20 steps, and what they leave; the last two once more from a checkpoint, to the same bits."""
    out = tmp_path / "two"
    command = TrainCommand(folder, out, 20, layout=layout, flags=KEEP_ALL)
    assert finish(start(command.words))["step"] == 20
    assert_trained_as(alone, out, config)

    before = losses(out)
    for path in (out / "checkpoints").glob("step_000000[12]?"):
        if path.name > "step_00000018":
            path.rename(path.with_name(f"later_{path.name}"))
    shutil.rmtree(out / "model_00000020")
    assert finish(start([*command.words, "--resume"]))["step"] == 20
    np.testing.assert_array_equal(losses(out), before)


@pytest.mark.slow
@pytest.mark.parametrize("case", OTHER_PIPELINES.values(), ids=OTHER_PIPELINES)
def test_two_processes_run_other_pipelines_as_one(case, folder, config, tmp_path):
    """Five steps, as the same pipeline in one process: which are skipped, gradients, losses."""
    config = dataclasses.replace(config, **case.changes)
    (tmp_path / "config.json").write_text(json.dumps(config.to_hf()))
    shutil.copy(folder / "text.txt", tmp_path)
    one, two = (
        TrainCommand(
            tmp_path, tmp_path / name, 5, dtype=case.dtype, layout=case.layout, flags=KEEP_ALL
        )
        for name in ("one", "two")
    )
    processes = start(two.words, case.num_devices)
    assert main(one.words) == 0
    assert finish(processes)["skipped_steps"] == case.skipped_steps
    of_two, of_one = (
        first_gradients(command.out, config, case.dtype, 1 + case.skipped_steps)
        for command in (two, one)
    )
    jax.tree.map(lambda x, y: assert_close(x, y, case.dtype), of_two, of_one)
    np.testing.assert_allclose(losses(two.out), losses(one.out), rtol=case.rtol)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["data_tensor_expert", "dp_attention_ep", "context"])
def test_two_processes_pack_as_one(name, folder, tmp_path):
    write_documents(folder)
    whole = TrainCommand(folder, tmp_path / "whole", 3, data="packed.npy")
    one = dataclasses.replace(whole, out=tmp_path / "one", flags="--separate-documents")
    two = dataclasses.replace(one, out=tmp_path / "two", layout=MESH_LAYOUTS[name].flags())
    processes = start(two.words)
    assert main(one.words) == 0
    finish(processes)
    packed = losses(one.out)
    np.testing.assert_allclose(losses(two.out), packed, rtol=1e-5)
    assert main(whole.words) == 0
    assert abs(losses(whole.out)[0, 0] - packed[0, 0]) > 1e-3 * packed[0, 0]


@pytest.mark.slow
@pytest.mark.parametrize("numbers", [(0,), (1,), (0, 1)], ids=["first", "second", "both"])
def test_sigterm_saves_in_both_and_one_process_takes_over(numbers, folder, tmp_path, capsys):
    out = tmp_path / "run"
    alone = TrainCommand(folder, out, 40, flags="--save-every 1")
    processes = start(dataclasses.replace(alone, layout=MESH_LAYOUTS["zero3"].flags()).words)
    while not (out / "metrics.jsonl").exists() and processes[0].poll() is None:
        time.sleep(0.05)
    for number in numbers:
        processes[number].send_signal(signal.SIGTERM)
    summary = finish(processes)
    stopped = summary["step"]
    assert summary["reason"] == ("SIGTERM" if 0 in numbers else "another process")
    assert 1 <= stopped < 40

    two_more = dataclasses.replace(alone, steps=stopped + 2)
    assert main([*two_more.words, "--resume"]) == 0
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
    out = tmp_path / "run"
    command = TrainCommand(folder, out, 20, flags="--save-every 10")
    assert main(command.words) == 0
    for path in (out / "checkpoints").glob("step_00000020*"):
        path.rename(path.with_name("later"))
    eight = dataclasses.replace(command, layout=MESH_LAYOUTS["data_tensor_expert"].flags())
    finish(start([*eight.words, "--resume"]))
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
        "train": TrainCommand(folder, tmp_path, 1).words,
        "generate": ["generate", "--model", str(folder), "--prompt", "a"],
    }[command]
    assert main([*words, *flags.split()]) == 2
    out, err = capsys.readouterr()
    assert out == "" and message in err and err.count("\n") == 1


@pytest.mark.parametrize("flag", ["--coordinator host", "--coordinator :1", "--process-id -1"])
def test_words_that_are_no_address_and_no_number(flag, folder, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(TrainCommand(folder, tmp_path, 1, flags=flag).words)
    assert "must be" in capsys.readouterr().err


def test_no_cluster_is_said(folder, tmp_path, monkeypatch, capsys):
    """As in a process that nothing but a shell started."""
    monkeypatch.setattr(jax.distributed, "initialize", lambda: raise_(ValueError("no address")))
    assert main(TrainCommand(folder, tmp_path, 1, flags="--distributed").words) == 2
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
    command = TrainCommand(folder, tmp_path, 1, layout=mesh)
    for _, err in finish(started(command.words), code=2):
        assert f"2 processes have 8 devices and need a --mesh over all of them, {found}" in err
