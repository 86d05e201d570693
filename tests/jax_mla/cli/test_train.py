"""`jax-mla train` in this process: what it writes, prints and refuses."""

import argparse
import dataclasses
import json
import os
import shutil
import signal
import sys

import jax
import numpy as np
import pytest
from weights import random_params

import jax_mla
from jax_mla.analysis.flops import flops_per_token
from jax_mla.cli.arguments import config_folder, config_named
from jax_mla.cli.layout import mesh_axes
from jax_mla.cli.main import main
from jax_mla.cli.train import Signals, coverage, params_loader
from jax_mla.cli.train_flags import add_arguments, recipe_of
from jax_mla.training import TokenRows


@pytest.fixture
def small(tmp_path):
    """The arguments of a short run of a small dense model."""
    config = jax_mla.tiny().to_hf() | {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 2,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "text.txt").write_text("in the beginning was the word. " * 20)
    words = f"train --config {tmp_path}/config.json --data {tmp_path}/text.txt --out {tmp_path}/out"
    return f"{words} --steps 3 --batch 2 --seq 16 --dtype float32".split()


def test_a_run_leaves_a_model_metrics_and_checkpoints(small, tmp_path, capsys):
    assert main([*small, "--json", "--save-every", "2"]) == 0
    out, err = capsys.readouterr()
    summary = json.loads(out)
    assert err == "" and summary["reason"] == "finished" and summary["step"] == 3
    assert summary["mfu"] is None and summary["tokens_per_second"] > 0  # no peak of a CPU is known
    params, config = jax_mla.load(summary["model"])
    assert config.hidden_size == 32 and np.isfinite(params["lm_head"]["weight"]).all()
    rows = [*map(json.loads, (tmp_path / "out/metrics.jsonl").read_text().splitlines())]
    assert [row["step"] for row in rows] == [1, 2, 3] and rows[-1]["loss"] == summary["loss"]
    steps = sorted(path.name for path in (tmp_path / "out/checkpoints").iterdir())
    assert steps == ["step_00000002", "step_00000003"]

    words = ["train", "--model", summary["model"], *small[3:], "--out", str(tmp_path / "more")]
    assert main(words) == 0
    more = json.loads((tmp_path / "more/metrics.jsonl").read_text().splitlines()[0])
    assert more["loss"] < rows[-1]["loss"] and "step 1 " in capsys.readouterr().out

    assert main([*small]) == 2
    assert (
        "holds step 2, 3: resume (--resume), or train elsewhere (--out)" in capsys.readouterr().err
    )
    assert main([*small, "--resume", "--lr", "1"]) == 2
    assert "trained with recipe.learning_rate 0.0003, not 1.0" in capsys.readouterr().err
    assert main([*small, "--resume"]) == 0
    out, err = capsys.readouterr()
    assert err == "resuming after step 3\n" and "finished after step 3" in out

    shutil.rmtree(summary["model"])
    assert main([*small, "--resume", "--export-dtype", "bfloat16"]) == 0
    narrow, config = jax_mla.load(summary["model"])
    assert config.dtype == "bfloat16"
    np.testing.assert_array_equal(
        narrow["lm_head"]["weight"], params["lm_head"]["weight"].astype("bfloat16")
    )


def test_the_run_says_how_many_tokens_of_how_many_it_sees(small, tmp_path, capsys):
    """201 files, all but one shorter than a row: none is left out."""
    paths = [tmp_path / f"{i}.txt" for i in range(200)]
    for path in paths:
        path.write_text("word")  # with its begin and end: 6 tokens
    assert main([*small, "--data", str(tmp_path / "text.txt"), *map(str, paths)]) == 0
    out, err = capsys.readouterr()
    # 6 rows of 15 new tokens, and the first token of each row that does not follow another.
    line = "data: 1,822 tokens in 201 files; this run sees "
    assert err == "" and out.startswith(line) and 90 < int(out[len(line) :].split()[0]) <= 96
    words = [*small, "--out", str(tmp_path / "more"), "--steps", "4", "--json"]
    assert main([*words, "--data", *map(str, paths[:20])]) == 0
    data = json.loads(capsys.readouterr().out)["data"]
    assert data == {"files": 20, "tokens": 120, "seen": 7 * 15 + 1}


def test_coverage_says_how_often():
    data = TokenRows([np.arange(31)], batch_rows=2, row_tokens=11, vocab_size=31)
    assert coverage(data, 1) == "data: 31 tokens in 1 file; this run sees 22 of them"
    assert coverage(data, 6) == "data: 31 tokens in 1 file; this run sees 31 of them, 4.0 times"


def test_a_config_is_a_preset_a_file_or_a_folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(jax_mla.v2_lite().to_hf()))
    assert config_named("v3") == jax_mla.v3() and config_folder("v3") is None
    for word in (tmp_path, tmp_path / "config.json"):
        assert config_named(str(word)) == jax_mla.v2_lite()
        assert config_folder(str(word)) == tmp_path


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--config v2_lite", "--config v2_lite brings no tokenizer: text needs --tokenizer DIR"),
        ("--config v4", "v4 is missing, and no preset: tiny, v2_lite, v2, v3, kimi_k2"),
        ("--rules zero3", "--rules zero3 shards over a mesh and needs --mesh"),
        ("--mesh data=16", "a mesh of data=16 needs 16 devices, found 8"),
        ("--mesh data=4", "2 rows of a micro-batch cannot be split over 4 devices"),
        ("--micro-batches 3", "2 rows cannot be divided into 3 micro-batches"),
        ("--pipeline gpipe", "--pipeline gpipe orders stages, and --mesh names none"),
        ("--pipeline 1f1b --mesh data=2", "--pipeline 1f1b orders stages, and --mesh names none"),
        ("--mesh stage=2", "2 stages need as many layers, the config has 1"),
        ("--seq 10000", "a row needs 10000 tokens, all files together have 622"),
        ("--data none.txt", "none.txt is not a file"),
        ("--lr -1", "learning_rate must be a finite number of at least 0, got -1.0"),
        ("--warmup 9", "warmup_steps=9 do not fit into num_steps=3"),
    ],
)
def test_bad_input_is_one_line(small, capsys, options, message):
    assert main([*small, *options.split()]) == 2
    out, err = capsys.readouterr()
    assert out == "" and message in err and err.count("\n") == 1


def test_weights_are_read_where_the_state_will_lie(tmp_path):
    config = dataclasses.replace(jax_mla.tiny(), num_hidden_layers=1)
    params = random_params(config)
    jax_mla.save(tmp_path / "model", params, config)
    assert params_loader(None, None) is None
    mesh = jax_mla.make_mesh(stage=2)
    placed = params_loader(tmp_path / "model", mesh)(jax_mla.ShardingRules(embed=("fsdp", "stage")))
    assert placed["lm_head"]["weight"].sharding.shard_shape((192, 320)) == (96, 320)
    jax.tree.map(np.testing.assert_array_equal, placed, params)


def test_weights_are_missed_before_the_data_are_read(small, tmp_path, capsys):
    words = ["train", "--model", str(tmp_path), *small[3:], "--data", "none.txt"]
    assert main(words) == 2
    assert "holds neither model.safetensors nor" in capsys.readouterr().err
    assert main([*words, "--resume"]) == 2
    assert "none.txt is not a file" in capsys.readouterr().err


@pytest.mark.slow
def test_a_model_goes_on_in_stages(small, tmp_path):
    """From a checkpoint, of which each device reads its share."""
    config = json.loads((tmp_path / "config.json").read_text()) | {"num_hidden_layers": 2}
    (tmp_path / "config.json").write_text(json.dumps(config))
    small[small.index("--steps") + 1] = "1"
    words = ["train", "--model", str(tmp_path / "out/model_00000001"), *small[3:]]
    stages = "--mesh stage=2 --micro-batches 2 --pipeline gpipe".split()
    assert main(small) == 0
    assert main([*words, "--out", str(tmp_path / "one")]) == 0
    assert main([*words, "--out", str(tmp_path / "two"), *stages]) == 0
    first, one, two = (
        json.loads((tmp_path / name / "metrics.jsonl").read_text())
        for name in ("out", "one", "two")
    )
    assert one["loss"] < first["loss"]
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose(two[name], one[name], rtol=1e-5)


@pytest.mark.parametrize("word", ["tensr=2", "data=2,data=2", "data=0", "data"])
def test_bad_mesh_axes_are_refused(small, capsys, word):
    with pytest.raises(SystemExit, match="2"):
        main([*small, "--mesh", word])
    assert "data" in capsys.readouterr().err


def test_mesh_axes():
    assert mesh_axes("data=2,tensor=4") == {"data": 2, "tensor": 4}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda n: n.name)
def test_a_signal_is_noticed_and_the_second_obeyed(number, capsys):
    before = signal.signal(number, signal.default_int_handler)
    try:
        with Signals() as signals:
            assert not signals.came()
            os.kill(os.getpid(), number)
            assert signals.came() and signals.name == number.name
            assert f"{number.name}: saves and exits after this step" in capsys.readouterr().err
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), number)
        assert signal.getsignal(number) is signal.default_int_handler
    finally:
        signal.signal(number, before)


@pytest.mark.parametrize("words", [[], ["--deterministic"]], ids=["default", "deterministic"])
def test_deterministic_is_a_choice_of_therecipe_of(small, words):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    assert recipe_of(parser.parse_args([*small[1:], *words])).deterministic == bool(words)


def test_a_run_whose_steps_are_all_skipped_leaves_no_model(small, tmp_path, capsys):
    """Gradients of such a z-loss are beyond float16."""
    assert main([*small, "--dtype", "float16", "--z-loss", "1e9"]) == 2
    out, err = capsys.readouterr()
    assert "all 3 steps were skipped, as their float16 gradients overflowed" in err
    assert "  3 of 3 steps skipped\n" in out and "finished" not in out
    rows = [*map(json.loads, (tmp_path / "out/metrics.jsonl").read_text().splitlines())]
    assert [(row["num_skipped"], row["grad_norm"]) for row in rows] == [
        (i, None) for i in (1, 2, 3)
    ]
    assert [path.name for path in (tmp_path / "out").glob("model_*")] == []


def test_a_terminal_sees_a_bar(small, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert main(small) == 0
    out, err = capsys.readouterr()
    assert "3/3" in err and "tokens/s" in err
    assert out.startswith("finished after step 3\n")


def test_flops_count_the_weights_that_a_token_meets():
    """Of DeepSeek-V3: 37 billion active parameters, without the embedding and with a long row."""
    config = jax_mla.v3()
    short, long = (flops_per_token(config, row_tokens) for row_tokens in (0, 4096))
    assert 36.0e9 < short / 6 < 37.0e9
    assert long - short == 6 * 61 * 128 * (128 + 64 + 128) * 2048
