"""Saving: the published names and bits, in shards, complete or not at all."""

import dataclasses
import errno
import json
import os
import shutil
import stat

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numerics import assert_same_bits
from safetensors import SafetensorError
from safetensors.flax import load_file as load_jax
from safetensors.numpy import load_file
from weights import random_params

import jax_mla
from jax_mla.checkpoint import files, saving

NAMES = [
    "v2_lite", "v2_group", "v3", "v3_fp8", "v3_half_noq_bias", "v3_yarn_mscale", "kimi_k2", "youtu",
    "minicpm3", "minicpm3_longrope", "minicpm3_longrope_factor", "glm4_moe_lite",
]  # fmt: skip


@pytest.mark.parametrize("max_shard_bytes", [5_000_000_000, 50_000], ids=["single", "shards"])
@pytest.mark.parametrize("name", NAMES)
def test_load_save_load(golden, tmp_path, name, max_shard_bytes):
    params, config = jax_mla.load(golden / name)
    jax_mla.save(tmp_path / "out", params, config, max_shard_bytes=max_shard_bytes)
    again, config_again = jax_mla.load(tmp_path / "out")
    assert_same_bits(again, params)
    assert config_again == config


@pytest.mark.parametrize("name", ["v2_lite", "v2_group", "v3", "v3_half_noq_bias"])
def test_the_library_reads_the_published_tensors(golden, tmp_path, name):
    jax_mla.save(tmp_path / "out", *jax_mla.load(golden / name))
    got = load_file(tmp_path / "out" / "model.safetensors")
    want = load_file(golden / name / "model.safetensors")
    assert got.keys() == want.keys()
    for tensor, value in want.items():
        np.testing.assert_array_equal(got[tensor], value)


def test_the_library_reads_bfloat16(golden, tmp_path):
    jax_mla.save(tmp_path / "out", *jax_mla.load(golden / "youtu"))
    got = load_jax(tmp_path / "out" / "model.safetensors")
    want = load_jax(golden / "youtu" / "model.safetensors")
    assert_same_bits(got, want)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtype_is_that_of_the_parameters(golden, tmp_path, dtype):
    params, config = jax_mla.load(golden / "v3", dtype=dtype)
    jax_mla.save(tmp_path / "out", params, jax_mla.load(golden / "v3")[1])
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == dtype
    again, config_again = jax_mla.load(tmp_path / "out")
    assert_same_bits(again, params)
    assert config_again == config


def test_shards_and_index(golden, tmp_path, stored):
    params, config = jax_mla.load(golden / "v3")
    jax_mla.save(tmp_path / "out", params, config, max_shard_bytes=100_000)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    shards = sorted(file.name for file in (tmp_path / "out").glob("model-*"))
    assert shards[0] == f"model-00001-of-{len(shards):05}.safetensors"
    sizes = []
    for shard in shards:
        tensors = stored(tmp_path / "out" / shard)
        assert {name for name, at in index["weight_map"].items() if at == shard} == tensors.keys()
        sizes.append(sum(tensor.nbytes for tensor in tensors.values()))
    assert max(sizes) <= 100_000
    assert index["metadata"]["total_size"] == sum(sizes)
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_a_tensor_larger_than_a_shard_has_its_own(golden, tmp_path):
    params, config = jax_mla.load(golden / "youtu")
    jax_mla.save(tmp_path / "out", params, config, max_shard_bytes=1)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = list(index["weight_map"].values())
    assert len(set(files)) == len(files)
    assert_same_bits(jax_mla.load(tmp_path / "out")[0], params)


def test_generation_config(golden, tmp_path):
    jax_mla.save(tmp_path / "out", *jax_mla.load(golden / "glm4_moe_lite"))
    got = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert got == {"_from_model_config": True, "bos_token_id": 0, "eos_token_id": [1, 3, 5]}


def test_saves_from_a_mesh(golden, tmp_path):
    mesh = jax_mla.make_mesh(tensor=2, expert=2, fsdp=2)
    params, config = jax_mla.load(golden / "v3", mesh=mesh)
    jax_mla.save(tmp_path / "out", params, config)
    assert_same_bits(jax_mla.load(tmp_path / "out")[0], jax_mla.load(golden / "v3")[0])


def test_replaces_an_empty_folder_and_makes_parents(golden, tmp_path):
    params, config = jax_mla.load(golden / "youtu")
    (tmp_path / "empty").mkdir()
    jax_mla.save(tmp_path / "empty", params, config)
    jax_mla.save(str(tmp_path / "deep" / "er" / "new"), params, config)
    files = {"config.json", "generation_config.json", "model.safetensors"}
    assert set(os.listdir(tmp_path / "empty")) == files
    assert set(os.listdir(tmp_path / "deep" / "er")) == {"new"}


@pytest.mark.parametrize("is_dangling", [False, True], ids=["empty", "dangling"])
def test_follows_a_link(golden, tmp_path, is_dangling):
    if not is_dangling:
        (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real", target_is_directory=True)
    jax_mla.save(tmp_path / "link", *jax_mla.load(golden / "youtu"))
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "model.safetensors").is_file()
    assert sorted(os.listdir(tmp_path)) == ["link", "real"]


def test_saves_a_dense_model_whose_config_mentions_experts(golden, tmp_path, edited):
    folder = edited("minicpm3", moe_intermediate_size=20, n_routed_experts=6, n_group=1)
    jax_mla.save(tmp_path / "out", *jax_mla.load(folder))
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert not {"moe_intermediate_size", "n_routed_experts", "n_group"} & written.keys()


def test_refuses_what_is_no_array(golden, tmp_path):
    params, config = jax_mla.load(golden / "youtu")
    params["embed_tokens"]["weight"] = params["embed_tokens"]["weight"].tolist()
    with pytest.raises(ValueError, match=r"not an array \(1\): embed_tokens.weight is list"):
        jax_mla.save(tmp_path / "out", params, config)


def test_files_have_ordinary_permissions(golden, tmp_path):
    jax_mla.save(tmp_path / "out", *jax_mla.load(golden / "youtu"))
    (tmp_path / "ordinary").touch()
    want = stat.S_IMODE((tmp_path / "ordinary").stat().st_mode)
    assert {stat.S_IMODE(file.stat().st_mode) for file in (tmp_path / "out").iterdir()} == {want}


@pytest.mark.parametrize("existing", ["folder", "file"])
def test_refuses_to_overwrite(golden, tmp_path, existing):
    target = tmp_path / "out"
    if existing == "folder":
        target.mkdir()
        (target / "precious").write_text("kept")
    else:
        target.write_text("kept")
    with pytest.raises(FileExistsError, match="out exists and is not an empty folder"):
        jax_mla.save(target, *jax_mla.load(golden / "youtu"))
    kept = target / "precious" if existing == "folder" else target
    assert kept.read_text() == "kept"
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("at", ["save_file", "flush"])
@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.EIO, "Input/output error"), "Input/output error"),
        (OSError(errno.ENOSPC, "No space left on device"), "No space left for .*out: it needs"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "No space left for .*out: it needs"),
        (
            SafetensorError('I/O error: Os { code: 28, kind: StorageFull, message: "..." }'),
            "No space left for .*out: it needs [0-9,]+ bytes, the disk has [0-9,]+ free; nothing",
        ),
        (KeyboardInterrupt("now"), "now"),
    ],
    ids=["broken", "full", "quota", "safetensors", "interrupted"],
)
def test_leaves_nothing_behind_when_it_fails(golden, tmp_path, monkeypatch, at, error, message):
    params, config = jax_mla.load(golden / "v3")
    calls, real = [], getattr(saving, at)

    def fail_later(*args, **kwargs):
        calls.append(args)
        if len(calls) == 4:
            raise error
        return real(*args, **kwargs)

    monkeypatch.setattr(saving, at, fail_later)
    kind = type(error) if isinstance(error, KeyboardInterrupt) else OSError
    with pytest.raises(kind, match=message):
        jax_mla.save(tmp_path / "out", params, config, max_shard_bytes=100_000)
    assert os.listdir(tmp_path) == []


def test_refuses_before_it_writes_where_the_disk_is_too_small(golden, tmp_path, monkeypatch):
    params, config = jax_mla.load(golden / "youtu")
    needed = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(saving.shutil, "disk_usage", lambda _: usage._replace(free=needed - 1))
    message = (
        f"No space left for .*out: it needs {needed:,} bytes, the disk has {needed - 1:,} free"
    )
    with pytest.raises(OSError, match=message):
        jax_mla.save(tmp_path / "deep" / "out", params, config)
    assert os.listdir(tmp_path) == []
    monkeypatch.setattr(saving.shutil, "disk_usage", lambda _: usage._replace(free=needed))
    jax_mla.save(tmp_path / "deep" / "out", params, config)


def test_progress_is_told_to_the_caller(golden, tmp_path):
    params, config = jax_mla.load(golden / "v3")
    told = []
    progress = lambda done, total: told.append((done, total))  # noqa: E731
    jax_mla.save(tmp_path / "out", params, config, max_shard_bytes=100_000, progress=progress)
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert len(told) == len(list((tmp_path / "out").glob("model-*"))) > 1
    assert told[-1] == (total, total) and {of for _, of in told} == {total}


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_refuses_a_router_bias_that_is_not_finite(golden, tmp_path, value):
    params, config = jax_mla.load(golden / "v3")
    mlp = params["moe_layers"]["mlp"]
    mlp["e_score_correction_bias"] = mlp["e_score_correction_bias"].at[1, 3].set(value)
    with pytest.raises(ValueError, match=r"not finite \(1\): moe_layers\.mlp\.e_score_correction"):
        jax_mla.save(tmp_path / "out", params, config)
    assert os.listdir(tmp_path) == []


def test_the_target_appears_only_when_complete(golden, tmp_path, monkeypatch):
    """Every file is flushed while the folder still has its hidden name."""
    params, config = jax_mla.load(golden / "v3")
    flushed, real = [], saving.flush

    def watch(path):
        assert (tmp_path / "out").exists() == (path == tmp_path)
        flushed.append(path.name)
        real(path)

    monkeypatch.setattr(saving, "flush", watch)
    monkeypatch.setattr(files, "flush", watch)
    jax_mla.save(tmp_path / "out", params, config, max_shard_bytes=100_000)
    assert set(os.listdir(tmp_path / "out")) <= set(flushed)
    assert flushed[-1] == tmp_path.name


def test_refuses_other_parameters_with_everything_listed(golden, tmp_path):
    params, config = jax_mla.load(golden / "v3")
    del params["norm"]
    params["extra"] = {"weight": jnp.zeros(3)}
    params["embed_tokens"]["weight"] = params["embed_tokens"]["weight"][:5]
    params["lm_head"]["weight"] = params["lm_head"]["weight"].astype(jnp.bfloat16)
    bias = params["moe_layers"]["mlp"]["e_score_correction_bias"]
    params["moe_layers"]["mlp"]["e_score_correction_bias"] = bias.astype(jnp.bfloat16)
    with pytest.raises(ValueError) as refusal:
        jax_mla.save(tmp_path / "out", params, config)
    assert str(refusal.value).splitlines() == [
        "the parameters are not those of the config:",
        "  missing (1): norm.weight",
        "  unexpected (1): extra.weight",
        "  wrong shape (1): embed_tokens.weight is [5, 64], expected [128, 64]",
        "  wrong dtype (2): moe_layers.mlp.e_score_correction_bias is bfloat16, expected float32; "
        "lm_head.weight is bfloat16, expected float32",
    ]
    assert os.listdir(tmp_path) == []


def test_refuses_integers_and_float64(golden, tmp_path):
    params, config = jax_mla.load(golden / "youtu")
    wide = jax.tree.map(lambda leaf: np.asarray(leaf).astype(np.float64), params)
    with pytest.raises(ValueError, match=r"embed_tokens\.weight is float64"):
        jax_mla.save(tmp_path / "out", wide, config)


@pytest.mark.parametrize("max_shard_bytes", [0, -1])
def test_refuses_empty_shards(golden, tmp_path, max_shard_bytes):
    with pytest.raises(
        ValueError, match=f"max_shard_bytes must be at least 1, got {max_shard_bytes}"
    ):
        jax_mla.save(tmp_path, *jax_mla.load(golden / "youtu"), max_shard_bytes=max_shard_bytes)


def test_refuses_a_config_that_load_would_refuse(golden, tmp_path):
    params, config = jax_mla.load(golden / "v3")
    odd = dataclasses.replace(config, scoring_func="softmax")
    with pytest.raises(ValueError, match="scoring_func='softmax' is not supported"):
        jax_mla.save(tmp_path / "out", params, odd)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rope_interleave": False}, "rope_interleave=False, its readers take True"),
        ({"norm_topk_prob": True}, "norm_topk_prob=True is not supported, only False"),
    ],
    ids=str,
)
def test_refuses_a_config_that_would_be_read_as_another(golden, tmp_path, fields, message):
    params, config = jax_mla.load(golden / "v2_lite")
    odd = dataclasses.replace(config, **fields)
    with pytest.raises(ValueError, match=message):
        jax_mla.save(tmp_path / "out", params, odd)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["v2_lite", "v3", "glm4_moe_lite"])
@pytest.mark.parametrize("says", ["no experts", "dense layers only"])
def test_a_model_without_experts_is_saved_and_loaded_back(golden, tmp_path, name, says):
    """Also one whose config still has other fields of experts."""
    config = jax_mla.load(golden / name)[1]
    if says == "no experts":
        dense = dataclasses.replace(config, n_routed_experts=None)
    else:
        layers = config.num_hidden_layers
        dense = dataclasses.replace(config, first_k_dense_replace=layers)
    params = random_params(dense)
    assert "moe_layers" not in params
    jax_mla.save(tmp_path / "out", params, dense)
    again, config_again = jax_mla.load(tmp_path / "out")
    assert_same_bits(again, params)
    assert config_again.num_moe_layers == 0
    jax_mla.save(tmp_path / "again", again, config_again)
    assert jax_mla.load(tmp_path / "again")[1] == config_again
    tokens = np.arange(6)[None] % 64
    want = jax_mla.forward(params, dense, tokens)
    np.testing.assert_array_equal(jax_mla.forward(again, config_again, tokens), want)
