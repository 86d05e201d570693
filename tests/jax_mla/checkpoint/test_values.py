"""Numbers that cannot be loaded: beyond the dtype, and router biases that are not finite."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import jax_mla

EMBEDDING = "model.embed_tokens.weight"
NORM = "model.norm.weight"
EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"
BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"


def put(name, value, dtype=None):
    """A change of a checkpoint: one number of one tensor, which may be of another dtype."""

    def change(tensors):
        tensor = tensors[name].astype(dtype or tensors[name].dtype)
        tensor.flat[-1] = value
        tensors[name] = tensor

    return change


@pytest.mark.parametrize("name", [EMBEDDING, NORM, EXPERT])
@pytest.mark.parametrize(
    ("file_dtype", "value", "dtype"),
    [
        (np.float32, 70000.0, "float16"),
        (np.float32, -70000.0, "float16"),
        (ml_dtypes.bfloat16, 1e20, "float16"),
        (np.float32, 3.4e38, "bfloat16"),
    ],
    ids=["f32-f16", "negative", "bf16-f16", "f32-bf16"],
)
def test_weights_beyond_the_dtype_are_refused_by_name(edited, name, file_dtype, value, dtype):
    folder = edited("v3", put(name, value, file_dtype))
    held = {1e20: "9.97277e+19"}.get(value, f"{value:g}")  # as the stored dtype rounds it
    limit = {"float16": "65504", "bfloat16": "3.38953e+38"}[dtype]
    with pytest.raises(ValueError) as refusal:
        jax_mla.load(folder, dtype=dtype)
    want = f"{name} holds {held}, beyond the largest {dtype}, {limit}: load it in another dtype"
    assert str(refusal.value) == want
    assert jnp.isfinite(jax_mla.load(folder, dtype="float32")[0]["norm"]["weight"]).all()


def test_weights_beyond_the_dtype_are_refused_on_a_mesh(edited):
    folder = edited("v3", put(EXPERT, 70000.0))
    with pytest.raises(ValueError, match=f"{EXPERT} holds 70000, beyond the largest float16"):
        jax_mla.load(folder, dtype="float16", mesh=jax_mla.make_mesh(expert=2, tensor=2))


@pytest.mark.parametrize(
    ("scale", "dtype"), [(1e3, "float16"), (1e37, "bfloat16"), (1e37, "float32")]
)
def test_fp8_times_its_scale_must_fit(edited, scale, dtype):
    def change(tensors):
        tensors[EXPERT].view(np.uint8)[...] = 0x7E  # 448, the largest
        tensors[f"{EXPERT}_scale_inv"][...] = scale

    with pytest.raises(ValueError, match=f"{EXPERT} holds 448 times its scale, beyond the larg"):
        jax_mla.load(edited("v3_fp8", change), dtype=dtype)


@pytest.mark.parametrize("value", [65504.0, -65504.0, 65519.0, 1e-30, 0.0])
def test_the_largest_numbers_fit_and_small_ones_are_rounded(edited, value):
    params, _ = jax_mla.load(edited("v3", put(NORM, value)), dtype="float16")
    assert params["norm"]["weight"][-1] == np.float16(value)


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_infinities_and_nan_of_the_file_stay_what_they_are(edited, value):
    params, _ = jax_mla.load(edited("v3", put(NORM, value)), dtype="float16")
    np.testing.assert_array_equal(params["norm"]["weight"][-1], np.float16(value))


@pytest.mark.parametrize("file_dtype", [np.float32, ml_dtypes.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_router_bias_must_be_finite(edited, value, file_dtype):
    folder = edited("v3", put(BIAS, value, file_dtype))
    with pytest.raises(ValueError, match=rf"not finite \(1\): {BIAS} holds {value}"):
        jax_mla.load(folder)


def test_all_router_biases_are_listed(edited):
    def change(tensors):
        for name in [name for name in tensors if name.endswith("bias")]:
            tensors[name][0] = np.nan

    with pytest.raises(ValueError, match=r"not finite \(2\): model\.layers\.1.*model\.layers\.2"):
        jax_mla.load(edited("v3", change))


def test_ordinary_weights_load_in_every_dtype(golden):
    for dtype in ("float32", "bfloat16", "float16"):
        params, _ = jax_mla.load(golden / "v3_fp8", dtype=dtype)
        assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(params))
