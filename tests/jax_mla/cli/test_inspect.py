"""`jax-mla inspect`: counts that were worked out by hand, and no jax."""

import dataclasses
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from golden_sets import GOLDEN, NAMES
from safetensors.numpy import save_file

import jax_mla
from jax_mla.analysis import cache_bytes_per_token
from jax_mla.checkpoint.published import published
from jax_mla.checkpoint.safetensors_file import StoredTensor
from jax_mla.cli.inspect import part_of, summary
from jax_mla.cli.main import main
from jax_mla.config.leaves import leaves_of


def inspected(capsys, folder) -> dict:
    assert main(["inspect", str(folder), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def headers_of(config) -> dict[str, StoredTensor]:
    """What the headers of a published checkpoint in bfloat16 would say."""
    return {
        name: StoredTensor(Path("none"), "BF16", fills[0][0].published_shape, 0)
        for name, fills in published(leaves_of(config)).items()
    }


def test_parts_of_a_small_v3(capsys):
    found = inspected(capsys, GOLDEN / "v3")
    D, V, N, P, R, H, C, Q, F, E = 64, 128, 4, 16, 8, 12, 32, 20, 24, 16
    attention = D * Q + Q * N * (P + R) + D * (C + R) + C * N * (P + H) + N * H * D
    parts = {
        "embedding": V * D,
        "head": V * D,
        "norms": 3 * (2 * D + Q + C) + D,
        "attention": 3 * attention,
        "router": 2 * (E * D + E),
        "shared_experts": 2 * 3 * D * F,
        "routed_experts": 2 * E * 3 * D * F,
        "dense_mlp": 3 * D * 96,
    }
    assert found["parameters"]["by_part"] == parts
    assert found["parameters"]["total"] == sum(parts.values())
    active = sum(parts.values()) - parts["embedding"] - parts["routed_experts"] * 12 // 16
    assert found["parameters"]["active_per_token"] == active
    assert found["bytes"]["by_part"] == {part: {"F32": 4 * n} for part, n in parts.items()}
    assert found["cache_bytes_per_token"] == {
        "latent": 3 * (C + R) * 4, "mha": 3 * N * (P + R + H) * 4, "ratio": 3.6, "dtype": "float32"
    }  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_every_family_adds_up(name, capsys):
    found = inspected(capsys, GOLDEN / name)
    parameters, sizes = found["parameters"], found["bytes"]
    assert "other" not in parameters["by_part"]
    assert sum(parameters["by_part"].values()) == parameters["total"]
    assert 0 < parameters["active_per_token"] <= parameters["total"]
    stored = (GOLDEN / name / "model.safetensors").stat().st_size
    total = sum(n for by_dtype in sizes["by_part"].values() for n in by_dtype.values())
    assert total == sizes["total"] < stored
    assert jax_mla.DeepSeekConfig.from_hf(found["config"]) is not None


def test_fp8_scales_are_bytes_but_no_parameters(capsys):
    found = inspected(capsys, GOLDEN / "v3_fp8")
    experts = found["parameters"]["by_part"]["routed_experts"]
    sizes = found["bytes"]["by_part"]["routed_experts"]
    assert sizes["F8_E4M3"] == experts
    assert 0 < sizes["F32"] < experts / 1000


@pytest.mark.parametrize(
    ("preset", "total", "active"),
    [
        ("v2_lite", 15.7e9, 2.4e9),
        ("v2", 236e9, 21e9),
        ("v3", 671e9, 37e9),
        ("kimi_k2", 1.03e12, 32e9),
    ],
)
def test_published_sizes(preset, total, active):
    config = getattr(jax_mla, preset)()
    found = summary(config, headers_of(config))["parameters"]
    assert math.isclose(found["total"], total, rel_tol=0.01)
    assert math.isclose(found["active_per_token"], active, rel_tol=0.03)


def test_v3_caches_70272_bytes_a_token():
    cache = cache_bytes_per_token(jax_mla.v3())
    assert cache["latent"] == 70_272
    assert cache["mha"] == 61 * 128 * (128 + 64 + 128) * 2


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("model.layers.0.self_attn.q_a_layernorm.weight", "norms"),
        ("model.norm.weight", "norms"),
        ("model.layers.1.mlp.gate.e_score_correction_bias", "router"),
        ("model.layers.1.mlp.gate_proj.weight", "dense_mlp"),
        ("model.layers.1.mlp.experts.3.down_proj.weight_scale_inv", "routed_experts"),
        ("model.layers.1.mlp.experts.gate_up_proj", "routed_experts"),
        ("model.layers.4.self_attn.o_proj.weight", "multi_token_prediction"),
        ("model.vision.weight", "other"),
    ],
)
def test_part_of(name, part):
    assert part_of(name, dataclasses.replace(jax_mla.tiny(), num_hidden_layers=4)) == part


def test_layers_of_multi_token_prediction_are_apart(tmp_path, capsys):
    config = json.loads((GOLDEN / "v3/config.json").read_text()) | {"num_nextn_predict_layers": 1}
    (tmp_path / "config.json").write_text(json.dumps(config))
    tensors = {
        "model.embed_tokens.weight": np.zeros((128, 64), np.float32),
        "model.layers.3.eh_proj.weight": np.zeros((64, 128), np.float32),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    assert main(["inspect", str(tmp_path), "--json"]) == 1  # most tensors are missing
    found = json.loads(capsys.readouterr().out)
    assert "missing (" in found["mismatch"]
    assert found["parameters"]["total"] == 128 * 64
    assert found["parameters"]["multi_token_prediction"] == 64 * 128
    assert found["bytes"]["total"] == 4 * (128 * 64 + 64 * 128)
    main(["inspect", str(tmp_path)])
    assert "multi-token prediction is not loaded" in capsys.readouterr().out


def test_tensors_of_another_config_are_named(tmp_path, capsys):
    config = json.loads((GOLDEN / "v3/config.json").read_text()) | {"kv_lora_rank": 33}
    (tmp_path / "config.json").write_text(json.dumps(config))
    shutil.copy(GOLDEN / "v3/model.safetensors", tmp_path)
    assert main(["inspect", str(tmp_path)]) == 1
    assert "kv_a_layernorm.weight is [32], expected [33]" in capsys.readouterr().out
    assert main(["inspect", str(GOLDEN / "v3")]) == 0
    assert capsys.readouterr().out.endswith("the tensors match config.json\n")


def test_text_names_every_part(capsys):
    assert main(["inspect", str(GOLDEN / "v3_fp8")]) == 0
    out = capsys.readouterr().out
    for words in ("routed experts", "F8_E4M3", "active parameters per token", "kv_lora_rank"):
        assert words in out


def test_does_not_import_jax():
    code = (
        "import sys\nfrom jax_mla.cli.main import main\n"
        f"assert main(['inspect', {str(GOLDEN / 'v3')!r}]) == 0\n"
        "assert not {'jax', 'flax'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=60)


def test_truncated_weights_are_one_error_line(tmp_path, capsys):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((GOLDEN / "v3" / name).read_bytes()[:20_000])
    assert main(["inspect", str(tmp_path)]) == 2
    assert "truncated" in capsys.readouterr().err
