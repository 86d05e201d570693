"""Folders that are incomplete, inconsistent or dangerous are refused before a weight is read."""

import json
import re
import shutil

import numpy as np
import pytest
from safetensors.numpy import save_file

from jax_mla.checkpoint.folder import INDEX, open_folder

SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


def test_single_file(golden):
    folder = open_folder(str(golden / "v3"))
    assert folder.config["model_type"] == "deepseek_v3"
    assert folder.tensors["model.norm.weight"].shape == (64,)


def test_shards(sharded):
    tensors = open_folder(sharded).tensors
    assert {name: tensor.path.name for name, tensor in tensors.items()} == dict(
        zip("ab", SHARDS, strict=True)
    )


def test_a_single_file_is_preferred_to_an_index(sharded):
    save_file({"c": np.zeros(1, np.float32)}, sharded / "model.safetensors")
    assert list(open_folder(sharded).tensors) == ["c"]


def test_pickles_beside_safetensors_are_not_opened(sharded):
    (sharded / "training_args.bin").write_bytes(b"never read")
    assert set(open_folder(sharded).tensors) == {"a", "b"}


def test_refuses_a_missing_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere is not a local folder"):
        open_folder(tmp_path / "nowhere")


def test_refuses_a_missing_config(sharded):
    (sharded / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"config\.json is missing"):
        open_folder(sharded)


@pytest.mark.parametrize(
    "text, message",
    [("{", "is not JSON"), ("[]", "not a JSON object but list"), ('{"a":1,"a":2}', "occurs twice")],
)
def test_refuses_a_config_that_is_not_an_object(sharded, text, message):
    (sharded / "config.json").write_text(text)
    with pytest.raises(ValueError, match=rf"config\.json {message}|{message}"):
        open_folder(sharded)


def test_refuses_a_folder_without_weights(sharded):
    for file in sharded.glob("model*"):
        file.unlink()
    with pytest.raises(
        FileNotFoundError, match=r"neither model\.safetensors nor model\.safetensors\.in"
    ):
        open_folder(sharded)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "m.pt"])
def test_refuses_pickles_with_a_hint(sharded, name):
    for file in sharded.glob("model*"):
        file.unlink()
    (sharded / name).write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(
        ValueError, match=f"pickled weights \\({re.escape(name)}\\).*convert them to safet"
    ):
        open_folder(sharded)


def test_lists_missing_shards(sharded):
    (sharded / SHARDS[1]).unlink()
    with pytest.raises(
        FileNotFoundError, match=f"lacks 1 of the 2 shards in its index: {SHARDS[1]}"
    ):
        open_folder(sharded)


def test_lists_every_damaged_shard(sharded):
    (sharded / SHARDS[0]).write_bytes(b"")
    with (sharded / SHARDS[1]).open("ab") as file:
        file.write(b"x")
    with pytest.raises(
        ValueError, match=f"(?s){SHARDS[0]} is truncated.*{SHARDS[1]} has 1 trailing"
    ):
        open_folder(sharded)


def test_lists_tensors_stored_twice(sharded):
    both = {name: np.zeros(3, np.float32) for name in "ab"}
    save_file(both, sharded / SHARDS[0])
    with pytest.raises(ValueError, match=f"stored twice .1.: b in {SHARDS[0]} and {SHARDS[1]}"):
        open_folder(sharded)


def test_lists_tensors_that_are_not_where_the_index_says(sharded):
    index = {"weight_map": {"a": SHARDS[1], "b": SHARDS[1], "c": SHARDS[0]}}
    (sharded / INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match=f"a in {SHARDS[1]}; c in {SHARDS[0]}"):
        open_folder(sharded)


@pytest.mark.parametrize(
    "name",
    [
        "../outside.safetensors", "/etc/outside.safetensors", "sub/inside.safetensors",
        "..\\outside.safetensors", "C:outside.safetensors", "..safetensors", ".", "..", "",
        ".safetensors", "nul\0.safetensors", "model.safetensors\n", "pytorch_model.bin", 7, None,
    ],
)  # fmt: skip
def test_refuses_shards_that_are_not_plain_names(sharded, tmp_path, name):
    shutil.copy(sharded / SHARDS[0], tmp_path / "outside.safetensors")
    (sharded / INDEX).write_text(json.dumps({"weight_map": {"a": SHARDS[0], "b": name}}))
    with pytest.raises(ValueError, match=r"not plain \.safetensors names") as refusal:
        open_folder(sharded)
    assert repr(str(name)) in str(refusal.value)


@pytest.mark.parametrize("index", [{}, {"weight_map": []}, {"weight_map": {}}, {"weight_map": "a"}])
def test_refuses_an_index_without_a_map(sharded, index):
    (sharded / INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match="has no weight_map object"):
        open_folder(sharded)
