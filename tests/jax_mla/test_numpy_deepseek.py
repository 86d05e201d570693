"""The independent numpy model reproduces what the torch reference wrote, set by set."""

import json

import ml_dtypes
import numpy as np
import numpy_deepseek
import pytest
from golden_sets import GOLDEN, NAMES, read_golden, sets_with

FORMS = ["expanded", "absorbed"]
BOUND = 2e-5  # float32 rounding of the reference on logits of size about 5


def test_there_are_golden_sets_of_every_family():
    families = {numpy_deepseek.read_folder(GOLDEN / name)[1]["model_type"] for name in NAMES}
    assert families == {
        "deepseek_v2",
        "deepseek_v3",
        "kimi_k2",
        "youtu",
        "minicpm3",
        "glm4_moe_lite",
    }


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", NAMES)
def test_forward_matches_reference(name, form):
    golden, model = read_golden(name), numpy_deepseek.load(GOLDEN / name, form)
    logits, hidden_states = model(golden["input_ids"])
    np.testing.assert_allclose(logits, golden["logits"], rtol=0, atol=BOUND)
    if "hidden_states" in golden:
        np.testing.assert_allclose(hidden_states, golden["hidden_states"], rtol=0, atol=BOUND)
    for layer, (expert_index, expert_weight) in model.routed.items():
        if f"router_idx_{layer}" in golden:
            np.testing.assert_array_equal(expert_index, golden[f"router_idx_{layer}"])
            np.testing.assert_allclose(expert_weight, golden[f"router_w_{layer}"], rtol=1e-5)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", sets_with("gen_ids"))
def test_cached_steps_match_reference(name, form):
    golden, model = read_golden(name), numpy_deepseek.load(GOLDEN / name, form)
    prompt, steps = golden["input_ids"].shape[1], golden["step_logits"].shape[1]
    logits, _ = model(golden["gen_ids"][:, :prompt])
    for step in range(steps):
        np.testing.assert_allclose(
            logits[:, -1], golden["step_logits"][:, step], rtol=0, atol=BOUND
        )
        token = golden["gen_ids"][:, prompt + step, None]
        np.testing.assert_array_equal(logits[:, -1].argmax(-1)[:, None], token)
        logits, _ = model(token)


@pytest.mark.parametrize("name", [name for name in NAMES if "pad_ids" in read_golden(name)])
def test_left_padding_matches_reference(name):
    golden, model = read_golden(name), numpy_deepseek.load(GOLDEN / name)
    logits, _ = model(golden["pad_ids"], golden["pad_mask"])
    real = golden["pad_mask"] == 1
    np.testing.assert_allclose(logits[real], golden["pad_logits"][real], rtol=0, atol=BOUND)


def test_loss_is_the_mean_over_predicted_tokens():
    golden, model = read_golden("v3"), numpy_deepseek.load(GOLDEN / "v3")
    logits, _ = model(golden["input_ids"])
    probability = numpy_deepseek.softmax(logits[:, :-1])
    of_next = np.take_along_axis(probability, golden["input_ids"][:, 1:, None], -1)
    np.testing.assert_allclose(-np.log(of_next).mean(), golden["loss"], rtol=1e-6)


def without_inner_eps(model, monkeypatch):
    monkeypatch.setattr(numpy_deepseek, "INNER_EPS", model.config["rms_norm_eps"])


def without_score_mscale(model, monkeypatch):
    head_dim = model.config["qk_nope_head_dim"] + model.config["qk_rope_head_dim"]
    monkeypatch.setattr(model, "attention_scale", lambda: head_dim**-0.5)


def without_rope_amplitude(model, monkeypatch):
    frequency, _ = numpy_deepseek.rope_frequencies(model.config)
    monkeypatch.setattr(numpy_deepseek, "rope_frequencies", lambda config: (frequency, 1.0))


def without_correction_bias(model, monkeypatch):
    for name in model.weights:
        if name.endswith("e_score_correction_bias"):
            monkeypatch.setitem(model.weights, name, 0 * model.weights[name])


def with_other_rope_layout(model, monkeypatch):
    monkeypatch.setitem(model.config, "rope_interleave", False)


@pytest.mark.parametrize(
    "mistake",
    [
        without_inner_eps,
        without_score_mscale,
        without_rope_amplitude,
        without_correction_bias,
        with_other_rope_layout,
    ],
)
def test_golden_set_would_show_a_mistake(mistake, monkeypatch):
    golden, model = read_golden("v3_yarn_mscale"), numpy_deepseek.load(GOLDEN / "v3_yarn_mscale")
    mistake(model, monkeypatch)
    logits, _ = model(golden["input_ids"])
    assert abs(logits - golden["logits"]).max() > 0.1


def test_partial_fp8_blocks_take_the_scale_of_their_block():
    name = "model.layers.0.self_attn.kv_a_proj_with_mqa.weight"
    weights, _ = numpy_deepseek.read_folder(GOLDEN / "v3_fp8")
    data = (GOLDEN / "v3_fp8" / "model.safetensors").read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])

    def tensor(key, dtype):
        start, end = (8 + size + offset for offset in header[key]["data_offsets"])
        return np.frombuffer(data[start:end], dtype).reshape(header[key]["shape"])

    quantised = tensor(name, ml_dtypes.float8_e4m3fn).astype(np.float64)
    scale = tensor(f"{name}_scale_inv", np.float32)
    assert quantised.shape == (144, 160) and scale.shape == (2, 2)
    for row, column in [(0, 0), (127, 128), (128, 127), (143, 159)]:
        expected = quantised[row, column] * scale[row // 128, column // 128]
        assert weights[name][row, column] == expected
