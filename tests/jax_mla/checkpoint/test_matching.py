"""Tensors that do not fit the config: all listed in one message, and nothing half-loaded."""

import logging

import jax
import ml_dtypes
import numpy as np
import pytest

import jax_mla
from jax_mla.checkpoint import loading

Q_A = "model.layers.0.self_attn.q_a_proj.weight"


@pytest.fixture
def readers_fail(monkeypatch):
    monkeypatch.setattr(loading, "read_leaf", lambda *args, **_: pytest.fail("read a leaf"))


# A refusal comes before the first leaf is read.
reads_nothing = pytest.mark.usefixtures("readers_fail")


@reads_nothing
def test_refuses_with_everything_listed_at_once(edited):
    def change(tensors):
        del tensors["model.norm.weight"], tensors["model.layers.1.mlp.experts.3.up_proj.weight"]
        tensors["model.layers.0.self_attn.rotary.weight"] = np.zeros(2, np.float32)
        tensors["model.layers.0.input_layernorm.weight"] = np.zeros((3, 4), np.float32)
        tensors["lm_head.weight"] = np.zeros((128, 64), np.int8)

    with pytest.raises(ValueError) as refusal:
        jax_mla.load(edited("v3", change))
    assert str(refusal.value).splitlines()[1:] == [
        "  wrong shape (1): model.layers.0.input_layernorm.weight is [3, 4], expected [64]",
        "  missing (2): model.layers.1.mlp.experts.3.up_proj.weight; model.norm.weight",
        "  wrong dtype (1): lm_head.weight is I8, not F32 or F16 or BF16 or F8_E4M3",
        "  unexpected (1): model.layers.0.self_attn.rotary.weight",
    ]


@reads_nothing
def test_refuses_a_long_list_with_a_count(edited):
    def change(tensors):
        for name in [name for name in tensors if ".experts." in name]:
            del tensors[name]

    with pytest.raises(ValueError, match=r"missing \(96\): model.*; and 88 more") as refusal:
        jax_mla.load(edited("v3", change))
    assert len(str(refusal.value)) < 1000


@reads_nothing
@pytest.mark.parametrize(
    "change, message",
    [
        pytest.param(
            lambda t: t.pop(f"{Q_A}_scale_inv"),
            f"{Q_A} is FP8, but {Q_A}_scale_inv is missing",
            id="missing",
        ),
        pytest.param(
            lambda t: t.update({f"{Q_A}_scale_inv": np.ones((1, 2), np.float32)}),
            r"F32\[1, 2\], expected F32\[2, 2\] for \[144, 160\] in blocks of \[128, 128\]",
            id="shape",
        ),
        pytest.param(
            lambda t: t.update({f"{Q_A}_scale_inv": np.ones((2, 2), np.int32)}),
            r"scale_inv is I32\[2, 2\], expected F32\[2, 2\]",
            id="dtype",
        ),
        pytest.param(
            lambda t: t.update({Q_A: np.zeros((144, 160), np.float32)}),
            rf"unexpected \(1\): {Q_A}_scale_inv",
            id="without-its-weight",
        ),
        pytest.param(
            lambda t: t.update({"model.norm.weight": np.zeros(160, ml_dtypes.float8_e4m3fn)}),
            r"model\.norm\.weight is FP8 of shape \[160\], only matrices can be",
            id="vector",
        ),
    ],
)
def test_refuses_wrong_fp8_scales(edited, change, message):
    with pytest.raises(ValueError, match=message):
        jax_mla.load(edited("v3_fp8", change))


@reads_nothing
@pytest.mark.parametrize(
    "config, message",
    [
        ({"model_type": "llama"}, "model_type must be one of .*, got 'llama'"),
        ({"model_type": "deepseek_v32"}, "'deepseek_v32' is not supported"),
        ({"model_type": None}, "model_type must be one of .*, got None"),
        ({"dtype": "float64"}, "dtype must be one of float32, bfloat16, float16, got 'float64'"),
        ({"dtype": "int4_nonsense"}, "dtype must be one of .*, got 'int4_nonsense'"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization 'awq'"),
    ],
)
def test_refuses_what_the_config_asks_for(edited, config, message):
    with pytest.raises(ValueError, match=message):
        jax_mla.load(edited("v3", **config))


@reads_nothing
def test_refuses_more_layers_than_the_config_has(edited):
    """Not every layer beyond the last is one of multi-token prediction."""
    with pytest.raises(ValueError, match=r"unexpected \(\d+\): model\.layers\.2\.input_layernorm"):
        jax_mla.load(edited("v3", num_hidden_layers=2, num_nextn_predict_layers=0))


@reads_nothing
def test_refuses_a_config_of_far_more_tensors_before_naming_them(edited):
    with pytest.raises(ValueError, match=r"v3 holds 139 tensors, its config.json describes about"):
        jax_mla.load(edited("v3", num_hidden_layers=10**9))


@pytest.mark.parametrize("width", [0, 24])
def test_shared_experts_of_width_0_are_nothing(edited, width):
    """transformers writes them with no elements when there are none."""

    def change(tensors):
        for name in [name for name in tensors if ".shared_experts." in name]:
            shape = [64, width] if "down" in name else [width, 64]
            tensors[name] = np.zeros(shape, np.float32)

    folder = edited("v3", change, n_shared_experts=0)
    if width:
        with pytest.raises(ValueError, match=r"unexpected \(6\): .*mlp\.shared_experts\.down"):
            jax_mla.load(folder)
    else:
        params, _ = jax_mla.load(folder)
        assert "shared_experts" not in params["moe_layers"]["mlp"]


@pytest.mark.parametrize("announced", [0, 1])
def test_skips_multi_token_prediction_with_one_note(edited, golden, caplog, announced):
    extra = "model.layers.3."

    def change(tensors):
        tensors |= {
            name.replace("model.layers.2.", extra): value
            for name, value in tensors.items()
            if name.startswith("model.layers.2.")
        }
        tensors[f"{extra}eh_proj.weight"] = np.zeros((64, 128), np.float32)
        tensors[f"{extra}shared_head.norm.weight"] = np.zeros(64, np.float32)

    folder = edited("v3", change, num_nextn_predict_layers=announced)
    with caplog.at_level(logging.WARNING, logger="jax_mla"):
        params, _ = jax_mla.load(folder)
    assert caplog.messages == [f"{folder}: skipped the multi-token prediction of layer 3"]
    assert params["moe_layers"]["input_layernorm"]["weight"].shape == (2, 64)


def test_ignores_rotary_frequencies(edited):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    folder = edited("v3", lambda t: t.update({name: np.full(4, np.nan, np.float32)}))
    params, _ = jax_mla.load(folder)
    assert not any("rotary" in str(path) for path, _ in jax.tree.leaves_with_path(params))


def test_accepts_a_tied_head_that_equals_the_embedding(edited):
    folder = edited("youtu", lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"]}))
    params, config = jax_mla.load(folder)
    assert config.tie_word_embeddings
    assert "lm_head" not in params


@reads_nothing
@pytest.mark.parametrize("how", ["values", "shape", "dtype"])
def test_refuses_a_tied_head_that_differs(edited, how):
    def change(tensors):
        head = tensors["model.embed_tokens.weight"].copy()
        head[-1, -1] += 1
        tensors["lm_head.weight"] = {
            "values": head, "shape": head[:-1].copy(), "dtype": head.astype(np.float32)
        }[how]  # fmt: skip

    with pytest.raises(ValueError, match=r"lm_head\.weight differs .* tie_word_embeddings is true"):
        jax_mla.load(edited("youtu", change))


@reads_nothing
def test_refuses_an_untied_model_without_a_head(edited):
    with pytest.raises(ValueError, match=r"missing \(1\): lm_head\.weight"):
        jax_mla.load(edited("youtu", tie_word_embeddings=False))


def test_fused_experts_are_the_same_model(edited, golden):
    """transformers 5 holds [E, 2F, D] in memory: gate, then up."""

    def fuse(tensors):
        for layer in (1, 2):
            prefix = f"model.layers.{layer}.mlp.experts."
            gate, up, down = (
                np.stack([tensors.pop(f"{prefix}{e}.{name}_proj.weight") for e in range(16)])
                for name in ("gate", "up", "down")
            )
            tensors[f"{prefix}gate_up_proj"] = np.concatenate([gate, up], axis=1)
            tensors[f"{prefix}down_proj"] = down

    got = jax_mla.load(edited("v3", fuse))[0]["moe_layers"]["mlp"]["experts"]
    want = jax_mla.load(golden / "v3")[0]["moe_layers"]["mlp"]["experts"]
    for name, leaf in want.items():
        np.testing.assert_array_equal(got[name]["weight"], leaf["weight"])
