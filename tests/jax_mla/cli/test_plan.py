"""`jax-mla plan`: its tables, its JSON, and what it refuses; the figures are tested in training."""

import json
import subprocess
import sys

import pytest

import jax_mla
from jax_mla.cli.main import main

MESH = ["--mesh", "data=8"]


def planned(capsys, *words):
    assert main(["plan", *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_training_lists_the_stages_of_zero(capsys):
    found = planned(capsys, "tiny", *MESH, "--train")
    assert found["mesh"] == {"data": 8} and found["devices"] == 8
    rows = found["recipes"]
    assert list(rows) == ["ddp", "zero1", "zero2", "zero3"]
    kinds = ("parameters", "gradients", "optimizer")
    for row in rows.values():
        assert row["total"] == sum(row[kind] for kind in kinds)
    whole = rows["ddp"]
    assert whole["optimizer"] == pytest.approx(2 * whole["parameters"], rel=1e-4)
    for kind, stages in zip(kinds, (1, 2, 3), strict=True):  # that split it, the last ones
        for stage in list(rows)[-stages:]:
            assert rows[stage][kind] == pytest.approx(whole[kind] / 8, rel=0.02)


def test_what_fits_is_said(capsys):
    rows = planned(capsys, "v2_lite", *MESH, "--train", "--memory-gib", "70")["recipes"]
    assert [row["fits"] for row in rows.values()] == [False, False, False, True]


def test_other_recipes_are_listed_where_they_split(capsys):
    assert list(planned(capsys, "tiny", "--train")["recipes"]) == ["ddp"]
    rows = planned(capsys, "v3", "--mesh", "data=8,expert=8")["recipes"]
    assert list(rows) == ["ddp", "zero3", "tensor_parallel", "dp_attention_ep"]


def test_serving_lists_the_context_that_fits(capsys):
    words = ["v3", "--mesh", "expert=64", "--memory-gib", "131", "--batch", "128"]
    row = planned(capsys, *words)["recipes"]["dp_attention_ep"]
    assert row["cache_per_token"] == 70_272 and row["sequences"] == 2
    room = 131 * 2**30 - row["parameters"]
    assert row["context_tokens"] == min(room // (2 * 70_272), 163_840)


def test_a_folder_is_read(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(jax_mla.tiny().to_hf()))
    of_folder = planned(capsys, str(tmp_path), "--train")["recipes"]
    assert of_folder == planned(capsys, str(tmp_path / "config.json"), "--train")["recipes"]
    assert of_folder == planned(capsys, "tiny", "--train")["recipes"]


def test_the_table_is_for_people(capsys):
    assert main(["plan", "v3", *MESH, "--train"]) == 0
    out = capsys.readouterr().out
    assert "v3 on data=8: bytes per device" in out and "10.74 TB" in out and "zero3" in out


def test_it_runs_without_jax():
    code = (
        "import sys; from jax_mla.cli.main import main; assert main(['plan', 'v3', '--train']) == 0"
        "; assert not {'jax', 'flax'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=60)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("no/such.json", "no/such.json is missing"),
        ("v4", "v4 is missing, and no preset: tiny, v2_lite, v2, v3, kimi_k2"),
        ("tiny --mesh tensor=4", "axis 'heads' of size 6 cannot be split over 4 devices"),
        ("tiny --train --mesh data=7", "cannot be split over 7 devices of mesh axis 'data+fsdp'"),
    ],
    ids=["file", "preset", "heads", "data"],
)
def test_bad_input_is_one_line(words, message, capsys):
    assert main(["plan", *words.split()]) == 2
    out, err = capsys.readouterr()
    assert out == "" and message in err and err.count("\n") == 1


@pytest.mark.parametrize("word", ["0", "-1", "inf", "x"])
def test_memory_is_a_number_above_0(word, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["plan", "tiny", f"--memory-gib={word}"])
    assert "must be a number above 0" in capsys.readouterr().err
