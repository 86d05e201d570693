"""Multimodal checkpoints: the text model is loaded, and the rest is left out with a note."""

import json
import logging

import numpy as np
import pytest
from numerics import assert_same_bits
from safetensors.numpy import save_file

import jax_mla
from jax_mla.cli.main import main
from jax_mla.config.wrappers import WRAPPERS

# The names that each publisher gives the text model, and some of what it holds beside it.
NAMES = {
    "kimi_k25": (
        {"model.": "language_model.model.", "lm_head.": "language_model.lm_head."},
        ["vision_tower.encoder.blocks.0.wqkv.weight", "mm_projector.proj.0.bias"],
    ),
    "kimi_vl": (
        {"model.": "language_model.model.", "lm_head.": "language_model.lm_head."},
        ["vision_tower.patch_embed.proj.weight", "multi_modal_projector.linear_1.bias"],
    ),
    "deepseek_vl_v2": (
        {"model.": "language.model.", "lm_head.": "language.lm_head."},
        ["vision.blocks.0.attn.qkv.weight", "projector.layers.0.bias", "image_newline",
         "view_seperator"],
    ),
}  # fmt: skip
TEXT = {"kimi_k25": "v3", "kimi_vl": "kimi_k2", "deepseek_vl_v2": "v2_lite"}
KEY = {"kimi_k25": "text_config", "kimi_vl": "text_config", "deepseek_vl_v2": "language_config"}


@pytest.fixture
def wrapped(golden, tmp_path, stored):
    """A multimodal folder around the golden model that `TEXT` names."""

    def make(model_type, text=None, rename=None, extra=(), **outside):
        source = golden / TEXT[model_type]
        inside = json.loads((source / "config.json").read_text()) | (text or {})
        inside = {key: value for key, value in inside.items() if value != "left out"}
        folder = tmp_path / model_type
        folder.mkdir()
        config = {"model_type": model_type, KEY[model_type]: inside, "vision_config": {"depth": 2}}
        (folder / "config.json").write_text(json.dumps(config | outside))
        prefixes, beside = NAMES[model_type]
        prefixes = prefixes if rename is None else rename
        tensors = {
            next(
                (new + n.removeprefix(old) for old, new in prefixes.items() if n.startswith(old)), n
            ): t
            for n, t in stored(source / "model.safetensors").items()
        }
        tensors |= {name: np.zeros((2, 3), np.float32) for name in [*beside, *extra]}
        save_file(tensors, folder / "model.safetensors")
        return folder

    return make


def test_every_wrapper_is_tested():
    assert NAMES.keys() == WRAPPERS.keys()


@pytest.mark.parametrize("model_type", NAMES)
def test_the_text_model_is_loaded_and_the_rest_is_counted(golden, wrapped, caplog, model_type):
    folder = wrapped(model_type)
    with caplog.at_level(logging.WARNING, logger="jax_mla"):
        params, config = jax_mla.load(folder)
    num = len(NAMES[model_type][1])
    assert caplog.messages == [
        f"{folder}: left out the {num} tensors that are not of the text model"
    ]
    want, want_config = jax_mla.load(golden / TEXT[model_type])
    assert_same_bits(params, want)
    assert config == want_config
    assert (
        jax_mla.DeepSeekConfig.from_hf(json.loads((folder / "config.json").read_text())) == config
    )


def test_a_text_model_is_saved_as_one(wrapped, tmp_path):
    params, config = jax_mla.load(wrapped("kimi_k25"))
    jax_mla.save(tmp_path / "out", params, config)
    assert json.loads((tmp_path / "out/config.json").read_text())["model_type"] == "deepseek_v3"
    assert_same_bits(jax_mla.load(tmp_path / "out")[0], params)


def test_names_as_transformers_writes_them(golden, wrapped):
    params, _ = jax_mla.load(wrapped("kimi_k25", rename={"model.": "model.language_model."}))
    assert_same_bits(params, jax_mla.load(golden / "v3")[0])


def test_fp8_scales_are_renamed_with_their_weights(golden, wrapped, monkeypatch):
    monkeypatch.setitem(TEXT, "kimi_k25", "v3_fp8")
    params, _ = jax_mla.load(wrapped("kimi_k25"))
    assert_same_bits(params, jax_mla.load(golden / "v3_fp8")[0])


def test_what_only_the_whole_file_says_holds_for_its_text(wrapped):
    text = {"dtype": "left out", "eos_token_id": "left out", "tie_word_embeddings": "left out"}
    folder = wrapped("kimi_k25", text, torch_dtype="float16", eos_token_id=[5, 6])
    config = jax_mla.load(folder)[1]
    assert (config.dtype, config.eos_token_id) == ("float16", (5, 6))


def test_language_config_needs_no_model_type(wrapped, golden):
    """As DeepSeek-VL2 is published."""
    folder = wrapped("deepseek_vl_v2", {"model_type": "left out"})
    assert jax_mla.load(folder)[1] == jax_mla.load(golden / "v2_lite")[1]


@pytest.mark.parametrize(
    ("model_type", "text", "outside", "message"),
    [
        ("kimi_vl", {"model_type": "kimi_linear"}, {}, "'kimi_linear' is not supported: its lin"),
        ("kimi_vl", {"model_type": "llama"}, {}, "model_type must be one of .*, got 'llama'"),
        ("kimi_k25", {"model_type": "left out"}, {}, "model_type must be one of .*, got None"),
        ("deepseek_vl_v2", {"use_mla": False}, {}, "with use_mla=False is not supported"),
        ("kimi_k25", {}, {"text_config": None}, "must have one of text_config and language_config"),
        ("kimi_k25", {}, {"text_config": 5}, "an object, got 5 and None"),
        ("kimi_k25", {}, {"language_config": {}}, "must have one of text_config and language_con"),
        (
            "kimi_k25", {"tie_word_embeddings": False}, {"tie_word_embeddings": True},
            "tie_word_embeddings of a kimi_k25 must be the same outside and inside of text_config",
        ),
        ("kimi_k25", {"dtype": "float32"}, {"dtype": "bfloat16"}, "dtype of a kimi_k25 must be"),
        (
            "kimi_k25", {}, {"quantization_config": {"quant_method": "compressed-tensors"}},
            "quantization 'compressed-tensors' with fmt='e4m3' is not supported",
        ),
    ],
    ids=lambda value: value[:25] if isinstance(value, str) else "",
)  # fmt: skip
def test_refuses_by_name(wrapped, model_type, text, outside, message):
    with pytest.raises(ValueError, match=message):
        jax_mla.load(wrapped(model_type, text, **outside))


def test_refuses_an_unknown_tensor_beside_the_text_model(wrapped):
    with pytest.raises(ValueError, match=r"unexpected \(1\): audio_tower\.weight"):
        jax_mla.load(wrapped("kimi_k25", extra=["audio_tower.weight"]))


def test_refuses_two_heads(wrapped):
    with pytest.raises(ValueError, match=r"under two names:\n  again \(1\): .*lm_head\.weight"):
        jax_mla.load(wrapped("kimi_k25", extra=["lm_head.weight"]))


def test_inspect_counts_the_rest_apart(wrapped, golden, capsys):
    assert main(["inspect", str(wrapped("deepseek_vl_v2")), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert main(["inspect", str(golden / "v2_lite"), "--json"]) == 0
    text = json.loads(capsys.readouterr().out)
    assert found["parameters"] == text["parameters"] | {"beside_the_text_model": 4 * 6}
    assert found["bytes"]["total"] == text["bytes"]["total"] + 4 * 6 * 4
    assert found["bytes"]["by_part"]["beside_the_text_model"] == {"F32": 4 * 6 * 4}


@pytest.mark.parametrize("stated", ["auto", "float8_e4m3fn"])
def test_a_dtype_that_is_none_of_ours_is_overridden(edited, capsys, stated):
    folder = edited("v3", dtype=stated)
    with pytest.raises(
        ValueError, match=f"dtype must be one of .*'{stated}'; the dtype argument of `lo"
    ):
        jax_mla.load(folder)
    params, config = jax_mla.load(folder, dtype="bfloat16")
    assert config.dtype == params["norm"]["weight"].dtype == "bfloat16"
    assert main(["inspect", str(folder)]) == 2
    assert main(["inspect", str(folder), "--dtype", "float16"]) == 0
    assert main(["verify", str(folder)]) == 0
    capsys.readouterr()
