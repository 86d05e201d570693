"""`jax-mla verify`: agrees with the golden data, and names the first tensor that does not."""

import json
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_sets import GOLDEN, read_golden

import jax_mla
from jax_mla.analysis import compare_with_golden
from jax_mla.analysis.parity import sorted_routing
from jax_mla.cli.main import main

FOLDER = GOLDEN / "v3"
ATOL = 5e-5


@pytest.fixture(scope="module", autouse=True)
def _precision_of_the_command():
    """So that nothing is compiled twice, by the command and by direct calls."""
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(scope="module")
def model():
    return jax_mla.load(FOLDER, dtype="float32")


@pytest.fixture
def golden():
    return read_golden("v3")


def deviating(rows) -> list[str]:
    return [row.tensor for row in rows if not row.is_ok]


def test_agrees_with_golden_data(capsys):
    assert main(["verify", str(FOLDER), "--golden", str(FOLDER / "golden.npz"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["is_ok"] and found["first_deviation"] is None
    tensors = [row["tensor"] for row in found["comparisons"]]
    layers = ["layer 0 output"]
    for layer in (1, 2):
        layers += [
            f"layer {layer} experts",
            f"layer {layer} expert weights",
            f"layer {layer} output",
        ]
    layers[-1] += ", normed"
    assert tensors == ["embedding", *layers, "logits", "cached decode logits", "greedy tokens"]


def test_agrees_with_itself(capsys):
    assert main(["verify", str(FOLDER)]) == 0
    out = capsys.readouterr().out
    assert "absorbed layer 2 experts" in out and "cached decode logits" in out
    assert out.endswith("everything agrees\n")


@pytest.mark.parametrize(
    ("key", "at", "named"),
    [
        ("hidden_states", (0, 1, 3, 5), "embedding"),
        ("hidden_states", (2, 0, 23, 63), "layer 1 output"),
        ("hidden_states", (3, 0, 0, 0), "layer 2 output, normed"),
        ("router_idx_2", (47, 0), "layer 2 experts"),
        ("router_w_1", (5, 3), "layer 1 expert weights"),
        ("logits", (1, 23, 127), "logits"),
        ("step_logits", (0, 11, 0), "cached decode logits"),
        ("gen_ids", (1, 35), "greedy tokens"),
    ],
    ids=lambda value: str(value).replace(" ", ""),
)
def test_one_wrong_number_is_found_and_named(key, at, named, model, golden):
    golden[key][at] += 1 if golden[key].dtype.kind == "i" else 1e-3
    assert deviating(compare_with_golden(*model, golden)) == [named]


def test_wrong_weights_name_the_first_layer_they_reach(model, golden):
    params, config = model
    attention = params["moe_layers"]["self_attn"]
    o_proj = attention["o_proj"]["weight"].at[1].multiply(1.01)  # of layer 2
    wrong = params | {
        "moe_layers": params["moe_layers"]
        | {"self_attn": attention | {"o_proj": {"weight": o_proj}}}
    }
    assert deviating(compare_with_golden(wrong, config, golden))[0].startswith("layer 2")


def test_nan_is_a_deviation(model, golden):
    golden["logits"][0, 0, 0] = np.nan
    assert deviating(compare_with_golden(*model, golden)) == ["logits"]


def test_order_of_the_experts_does_not_matter(model, golden):
    config = model[1]
    trace = jax_mla.forward_trace(model[0], config, jnp.asarray(golden["input_ids"], jnp.int32))
    index, weight = sorted_routing(trace, config, 1)
    np.testing.assert_array_equal(index, golden["router_idx_1"])
    np.testing.assert_allclose(weight, golden["router_w_1"], atol=ATOL)


def test_exit_code_and_first_deviation(tmp_path, golden, capsys):
    golden["hidden_states"][2] += 1e-3
    np.savez(tmp_path / "wrong.npz", **golden)
    assert main(["verify", str(FOLDER), "--golden", str(tmp_path / "wrong.npz")]) == 1
    out = capsys.readouterr().out
    assert "DEVIATES" in out and out.endswith("the first to deviate: layer 1 output\n")
    assert main(["verify", str(FOLDER), "--golden", str(tmp_path / "wrong.npz"), "--atol=1"]) == 0


IDS = np.zeros((1, 4), np.int64)
UNUSABLE = {
    "no-input": ({"logits": np.zeros(3)}, "needs input_ids"),
    "no-output": ({"input_ids": IDS}, "nothing to compare with"),
    "logits": (
        {"input_ids": IDS, "logits": np.zeros((1, 4, 3))},
        r"logits has shape \(1, 4, 128\), the golden data \(1, 4, 3\)",
    ),
    "fewer-hidden-states": (
        {"input_ids": IDS, "hidden_states": np.zeros((3, 1, 4, 64))},
        r"hidden_states has shape \(4, 1, 4, 64\), the golden data \(3, 1, 4, 64\)",
    ),
    "index-without-weight": (
        {"input_ids": IDS, "router_idx_1": np.zeros((4, 4), int)},
        "golden data has router_idx_1, but no router_w_1",
    ),
    "steps-without-ids": (
        {"input_ids": IDS, "step_logits": np.zeros((1, 2, 128))},
        "golden data has step_logits, but no gen_ids",
    ),
    "nothing-generated": (
        {"input_ids": IDS, "gen_ids": IDS},
        r"gen_ids has shape \(1, 4\), the prompts \(1, 4\) must be in front",
    ),
    "float-ids": ({"input_ids": IDS + 0.5}, "tokens must be integers, got dtype float64"),
    "text": (
        {"input_ids": IDS, "logits": np.full((1, 4, 128), "x")},
        "logits must hold numbers, the golden data has dtype <U1",
    ),
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_unusable_golden_data(case, model):
    content, message = UNUSABLE[case]
    with pytest.raises(ValueError, match=message):
        compare_with_golden(*model, content)


def test_json_has_null_for_nan(tmp_path, golden, capsys):
    golden["logits"][0, 0, 0] = np.nan
    np.savez(tmp_path / "nan.npz", input_ids=golden["input_ids"], logits=golden["logits"])
    assert main(["verify", str(FOLDER), "--golden", str(tmp_path / "nan.npz"), "--json"]) == 1
    out = capsys.readouterr().out
    assert "NaN" not in out
    assert json.loads(out)["comparisons"][-1]["error"] is None


@pytest.mark.parametrize("atol", ["-1", "nan", "inf", "x"])
def test_a_tolerance_is_a_number_of_at_least_0(atol, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["verify", str(FOLDER), f"--atol={atol}"])
    assert f"must be a number of at least 0, got '{atol}'" in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"not a zip", pickle.dumps([1])], ids=["text", "pickle"])
def test_golden_file_of_another_kind_is_refused(content, tmp_path, capsys):
    file = tmp_path / "golden.npz"
    file.write_bytes(content)
    assert main(["verify", str(FOLDER), "--golden", str(file)]) == 2
    assert capsys.readouterr().err == f"error: {file} is not an .npz file of plain arrays\n"
