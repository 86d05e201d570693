"""Loading: values, dtypes, slices onto a mesh, host memory."""

import json
import math
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from numerics import assert_same_bits

import jax_mla
from jax_mla.checkpoint import loading
from jax_mla.checkpoint.folder import open_folder
from jax_mla.checkpoint.matching import match
from jax_mla.checkpoint.published import published
from jax_mla.checkpoint.reading import read_leaf
from jax_mla.checkpoint.safetensors_file import StoredTensor, read_header
from jax_mla.config.leaves import leaves_of


@pytest.fixture
def bytes_read(monkeypatch):
    """How many bytes of weights (not of FP8 scales) have been asked of files."""
    asked = []
    read = StoredTensor.read

    def count(tensor, split, bounds):
        part = read(tensor, split, bounds)
        asked.append(part.nbytes)
        return part

    monkeypatch.setattr(StoredTensor, "read", count)
    return asked


@pytest.fixture
def by_layer(monkeypatch):
    """Tiny leaves take the path of large ones."""
    monkeypatch.setattr(loading, "WHOLE_BYTES", 0)


def flat(tree):
    return {jax.tree_util.keystr(p): leaf for p, leaf in jax.tree_util.tree_leaves_with_path(tree)}


@pytest.mark.parametrize("name", ["v3_fp8", "v3_half_noq_bias"])
def test_whole_and_by_layer_are_the_same(golden, monkeypatch, name):
    whole, config = jax_mla.load(golden / name)
    monkeypatch.setattr(loading, "WHOLE_BYTES", 0)
    assert_same_bits(jax_mla.load(golden / name)[0], whole)
    assert config == jax_mla.DeepSeekConfig.from_hf(open_folder(golden / name).config)


def test_leaves_are_not_committed_to_a_device(golden, by_layer):
    """Like those of `init`: they may be used together with arrays on any mesh."""
    params, _ = jax_mla.load(golden / "v3")
    other = jax.device_put(jnp.zeros(()), jax.devices()[3])
    assert all((leaf + other).device == jax.devices()[3] for leaf in jax.tree.leaves(params))


def test_result_does_not_depend_on_the_file(edited, stored):
    folder = edited("v3")
    params, _ = jax_mla.load(folder)
    want = stored(folder / "model.safetensors")["model.embed_tokens.weight"]
    (folder / "model.safetensors").write_bytes(b"")
    np.testing.assert_array_equal(params["embed_tokens"]["weight"], want)


@pytest.mark.parametrize("dtype", ["float32", jnp.bfloat16, np.dtype("float16")], ids=str)
@pytest.mark.parametrize("name", ["v3", "v3_fp8", "youtu"])
def test_dtype_casts_all_but_the_correction_bias(golden, name, dtype):
    exact, _ = jax_mla.load(golden / name, dtype="float32")
    params, config = jax_mla.load(golden / name, dtype=dtype)
    assert config.dtype == jnp.dtype(dtype).name
    for path, leaf in flat(params).items():
        want = flat(exact)[path]
        if "e_score_correction_bias" not in path:
            want = np.asarray(want).astype(dtype)
        assert leaf.dtype == want.dtype
        np.testing.assert_array_equal(leaf, want)


@pytest.mark.parametrize("dtype", ["float64", "int8", "float8_e4m3fn", "no_such_dtype"])
def test_refuses_other_dtypes(golden, dtype):
    with pytest.raises(
        ValueError, match=f"dtype must be one of float32, bfloat16, float16, got '{dtype}'"
    ):
        jax_mla.load(golden / "v3", dtype=dtype)


def test_fp8_by_hand(golden, stored):
    raw = stored(golden / "v3_fp8" / "model.safetensors")
    params, _ = jax_mla.load(golden / "v3_fp8")
    for expert in range(16):
        name = f"model.layers.1.mlp.experts.{expert}.gate_proj.weight"
        weight, scale = raw[name].astype(np.float32), raw[f"{name}_scale_inv"]
        assert weight.shape == (136, 160)
        for row in range(2):
            for col in range(2):
                block = np.s_[128 * row : 128 * (row + 1), 128 * col : 128 * (col + 1)]
                weight[block] *= scale[row, col]
        got = params["moe_layers"]["mlp"]["experts"]["gate_proj"]["weight"][0, expert]
        np.testing.assert_array_equal(got, weight.T)


@pytest.mark.parametrize(
    "name, axes, whole_bytes",
    [
        ("v3", {"tensor": 2, "expert": 4}, 2**20),
        ("v3", {"tensor": 2, "expert": 4}, 0),
        ("v3_fp8", {"tensor": 2, "fsdp": 2, "expert": 2}, 2**20),
        ("v3_fp8", {"tensor": 2, "fsdp": 2, "expert": 2}, 0),
        ("v3_half_noq_bias", {"fsdp": 4, "data": 2}, 2**20),
        ("v2_lite", {"data": 2, "tensor": 4}, 0),
        ("youtu", {"tensor": 2}, 0),
    ],
    ids=lambda value: {0: "by-layer", 2**20: "whole"}.get(value) if type(value) is int else None,
)
def test_mesh_holds_the_same_values_where_the_rules_say(
    golden, monkeypatch, bytes_read, name, axes, whole_bytes
):
    want, config = jax_mla.load(golden / name)
    mesh = jax_mla.make_mesh(**axes)
    monkeypatch.setattr(loading, "WHOLE_BYTES", whole_bytes)
    del bytes_read[:]
    params, _ = jax_mla.load(golden / name, mesh=mesh)
    assert_same_bits(params, want)
    shardings = flat(jax_mla.param_shardings(config, mesh))
    for path, leaf in flat(params).items():
        assert leaf.sharding.is_equivalent_to(shardings[path], leaf.ndim), path
    if name != "v3_fp8":  # its scales are read for each slice
        tensors = read_header(golden / name / "model.safetensors").values()
        biases = sum(leaf.nbytes for path, leaf in flat(params).items() if "correction" in path)
        assert sum(bytes_read) == sum(tensor.nbytes for tensor in tensors) + biases  # looked at


def test_rules_decide(golden):
    rules = jax_mla.ShardingRules(vocab=None, embed="tensor", mlp=None, heads=None)
    mesh = jax_mla.make_mesh(tensor=2)
    params, _ = jax_mla.load(golden / "v3", mesh=mesh, rules=rules)
    assert params["embed_tokens"]["weight"].sharding.shard_shape((128, 64)) == (128, 32)


def test_refuses_rules_without_a_mesh(golden):
    with pytest.raises(ValueError, match=r"got mesh=None and ShardingRules\("):
        jax_mla.load(golden / "v3", rules=jax_mla.ShardingRules())


def test_layers_may_be_split_over_stages(tmp_path, rng, by_layer):
    config = jax_mla.DeepSeekConfig(
        vocab_size=8, hidden_size=4, intermediate_size=6, moe_intermediate_size=2,
        num_hidden_layers=4, first_k_dense_replace=2, num_attention_heads=2, q_lora_rank=None,
        kv_lora_rank=4, qk_nope_head_dim=2, qk_rope_head_dim=2, v_head_dim=3, n_routed_experts=2,
        num_experts_per_tok=1, n_shared_experts=1, n_group=1, topk_group=1, dtype="float32",
    )  # fmt: skip
    want = {}
    for leaf in leaves_of(config):
        node = want
        for key in leaf.path[:-1]:
            node = node.setdefault(key, {})
        node[leaf.path[-1]] = rng.random(leaf.shape, np.float32)
    jax_mla.save(tmp_path / "saved", want, config)
    rules, mesh = jax_mla.ShardingRules(layers="stage"), jax_mla.make_mesh(stage=2)
    params, _ = jax_mla.load(tmp_path / "saved", mesh=mesh, rules=rules)
    assert params["moe_layers"]["mlp"]["gate"]["weight"].sharding.shard_shape((2, 4, 2)) == (
        1,
        4,
        2,
    )
    assert_same_bits(params, want)


@pytest.mark.parametrize("name", ["v3", "v3_fp8"])
def test_a_device_reads_only_its_slice(golden, bytes_read, name):
    """An eighth of every large leaf is an eighth of its bytes, whichever axes are split."""
    folder = open_folder(golden / name)
    config = jax_mla.DeepSeekConfig.from_hf(folder.config)
    matched = match(folder, config)
    for leaf in matched.leaves:
        if len(leaf.shape) < 3:
            continue
        bounds = [(0, size) for size in leaf.shape]
        parts = 1
        for axis in (-1, -2):
            size = leaf.shape[axis]
            bounds[axis] = (size // 4, size // 2)
            parts *= size / (size // 2 - size // 4)
        del bytes_read[:]
        read_leaf(matched, leaf, tuple(bounds), np.dtype("float32"))
        tensors = [matched.tensors[leaf.name_at(lead)] for lead in np.ndindex(leaf.lead_shape)]
        scales = [
            matched.scale_of(leaf.name_at(lead)).nbytes
            for lead, tensor in zip(np.ndindex(leaf.lead_shape), tensors, strict=True)
            if tensor.dtype == "F8_E4M3"
        ]
        taken = math.prod(stop - start for start, stop in leaf.cut) / math.prod(leaf.split)
        want = sum(tensor.nbytes for tensor in tensors) * taken / parts
        assert sum(bytes_read) == pytest.approx(want + sum(scales)), leaf.path


MEASURE = """
import sys, jax, jax_mla
from pathlib import Path
def kib(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key))
jax_mla.load(sys.argv[1])  # compiles what writes the layers
for folder in sys.argv[1:]:
    before = kib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # restarts the high-water mark
    params, _ = jax_mla.load(folder)
    print(kib("VmHWM") - before, sum(leaf.nbytes for leaf in jax.tree.leaves(params)) // 1024)
    del params
"""


def write_sparse(folder, config, expert_dtype):
    """A checkpoint of zeros that takes no disk."""
    header, position = {}, 0

    def add(name, dtype, shape):
        nonlocal position
        nbytes = StoredTensor(folder, dtype, tuple(shape), 0).nbytes
        offsets = [position, position + nbytes]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        position += nbytes

    for name, parts in published(leaves_of(config)).items():
        shape = parts[0][0].published_shape
        add(name, expert_dtype if ".experts." in name else "BF16", shape)
        if header[name]["dtype"] == "F8_E4M3":
            add(f"{name}_scale_inv", "F32", [math.ceil(size / 128) for size in shape])
    text = json.dumps(header).encode()
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config.to_hf()))
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + position)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_host_memory_is_the_result_and_about_one_layer(tmp_path):
    """On the CPU the result lies in host memory too."""
    config = jax_mla.DeepSeekConfig(
        vocab_size=256, hidden_size=768, intermediate_size=512, moe_intermediate_size=512,
        num_hidden_layers=12, num_attention_heads=4, q_lora_rank=64, kv_lora_rank=64,
        qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32, n_routed_experts=8,
        num_experts_per_tok=2, n_shared_experts=1, n_group=1, topk_group=1, dtype="bfloat16",
    )  # fmt: skip
    for dtype in ("BF16", "F8_E4M3"):
        write_sparse(tmp_path / dtype, config, dtype)
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "BF16"), str(tmp_path / "F8_E4M3")]
    # So that freed buffers go back to the system at once and do not blur the measurement.
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "JAX_PLATFORMS": "cpu"}
    out = subprocess.run(command, check=True, capture_output=True, text=True, env=env).stdout
    experts_of_a_layer = 3 * 8 * 768 * 512 * 2 // 1024
    for line in out.splitlines():
        peak, result = map(int, line.split())
        assert result > 250_000
        assert peak < result + experts_of_a_layer, out


def test_progress_is_told_to_the_caller_and_drawn_nowhere(golden, by_layer, capfd):
    told = []
    params, _ = jax_mla.load(golden / "v3", progress=lambda done, total: told.append((done, total)))
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert {of for _, of in told} == {total} and told[-1][0] == total
    assert [done for done, _ in told] == sorted({done for done, _ in told})
    assert capfd.readouterr() == ("", "")


def test_bfloat16_is_copied_bit_by_bit(edited):
    """Through float32 and back would be the same, except for the payload of a NaN."""
    odd_nan = np.array([0x7F81], np.uint16).view(ml_dtypes.bfloat16)
    folder = edited("youtu", lambda t: t["model.norm.weight"].__setitem__(slice(0, 1), odd_nan))
    got = np.asarray(jax_mla.load(folder)[0]["norm"]["weight"])[:1]
    assert got.view(np.uint16) == 0x7F81
