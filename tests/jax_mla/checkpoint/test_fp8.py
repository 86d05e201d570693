"""FP8 blocks against repeat-and-crop in plain numpy, with partial blocks and slices across them."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from jax_mla.checkpoint import fp8
from jax_mla.checkpoint.matching import Matched
from jax_mla.checkpoint.reading import read_leaf
from jax_mla.checkpoint.safetensors_file import read_header
from jax_mla.config.leaves import Leaf


def repeat_and_crop(weight, scale, block):
    grid = np.repeat(np.repeat(scale, block[0], axis=0), block[1], axis=1)
    return weight.astype(np.float32) * grid[: weight.shape[0], : weight.shape[1]]


def test_every_value():
    weight = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).reshape(2, 128)
    out = np.empty((2, 128), np.float32)
    fp8.dequantise(
        weight, np.ones((1, 1), np.float32), np.arange(2), np.arange(128), (128, 128), out
    )
    np.testing.assert_array_equal(out, weight.astype(np.float32))
    assert np.isnan(out).sum() == 2


@pytest.mark.parametrize(
    "shape, grid", [((576, 7168), (5, 56)), ((128, 128), (1, 1)), ((129, 1), (2, 1))]
)
def test_grid_counts_partial_blocks(shape, grid):
    assert fp8.grid_shape(shape, (128, 128)) == grid


def test_576_rows_take_5_scales():
    """The block is 128 rows, not 576 // 5."""
    weight = np.ones((576, 1), ml_dtypes.float8_e4m3fn)
    scale = np.arange(5, dtype=np.float32)[:, None]
    out = np.empty((576, 1), np.float32)
    fp8.dequantise(weight, scale, np.arange(576), np.arange(1), (128, 128), out)
    assert [(out == i).sum() for i in range(5)] == [128, 128, 128, 128, 64]


@st.composite
def leaf_slices(draw):
    """A leaf over an FP8 matrix [out, in] with heads in out or in, a cut, and bounds into it."""
    size = st.integers(1, 12)
    heads, width, other = draw(size), draw(size), draw(size)
    if draw(st.booleans()):
        split, order, matrix = (heads, width, other), (2, 0, 1), (heads * width, other)
    else:
        split, order, matrix = (other, heads, width), (1, 2, 0), (other, heads * width)
    start = draw(st.integers(0, split[1] - 1))
    rows = draw(st.sampled_from([None, (start, draw(st.integers(start + 1, split[1])))]))
    leaf = Leaf(("x",), "x", matrix, split, order, rows)
    bounds = []
    for n in leaf.shape:
        first = draw(st.integers(0, n - 1))
        bounds.append((first, draw(st.integers(first + 1, n))))
    return leaf, tuple(bounds), (draw(st.integers(1, 9)), draw(st.integers(1, 9)))


@given(case=leaf_slices(), seed=st.integers(0, 99))
def test_slices_take_their_part_of_the_grid(tmp_path_factory, case, seed):
    leaf, bounds, block = case
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal(leaf.published_shape).astype(ml_dtypes.float8_e4m3fn)
    grid = fp8.grid_shape(leaf.published_shape, block)
    scale = rng.random(grid, np.float32) + 0.5
    path = tmp_path_factory.mktemp("fp8") / "model.safetensors"
    save_file({"x": weight, "x_scale_inv": scale}, path)
    got = read_leaf(Matched((leaf,), read_header(path), block), leaf, bounds, np.dtype("float32"))
    whole = repeat_and_crop(weight, scale, block).reshape(leaf.split)
    cut = whole[tuple(slice(*pair) for pair in leaf.cut)].transpose(leaf.order)
    np.testing.assert_array_equal(got, cut[tuple(slice(*pair) for pair in bounds)])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_rounds_once(rng, dtype):
    weight = rng.standard_normal((200, 150)).astype(ml_dtypes.float8_e4m3fn)
    scale = rng.random((2, 2), np.float32)
    out = np.empty((200, 150), ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    fp8.dequantise(weight, scale, np.arange(200), np.arange(150), (128, 128), out)
    want = repeat_and_crop(weight, scale, (128, 128)).astype(out.dtype)
    np.testing.assert_array_equal(out, want)


@pytest.mark.parametrize(
    "quantization, block",
    [
        (None, (128, 128)),
        ({"quant_method": "fp8"}, (128, 128)),
        ({"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [64, 32]}, (64, 32)),
    ],
    ids=["absent", "default", "given"],
)
def test_block_size(quantization, block):
    assert fp8.block_of(quantization) == block


@pytest.mark.parametrize(
    "quantization, message",
    [
        ({"quant_method": "gptq"}, "quantization 'gptq'"),
        ({"quant_method": "compressed-tensors"}, "quantization 'compressed-tensors'"),
        ({"bits": 4}, "quantization None"),
        ({"quant_method": "fp8", "fmt": "e5m2"}, "fmt='e5m2'"),
        ({"quant_method": "fp8", "weight_block_size": None}, "two sizes .* got None"),
        ({"quant_method": "fp8", "weight_block_size": [128]}, r"got \[128\]"),
        ({"quant_method": "fp8", "weight_block_size": [128, 0]}, r"got \[128, 0\]"),
    ],
)
def test_refuses_other_quantization(quantization, message):
    with pytest.raises(ValueError, match=message):
        fp8.block_of(quantization)
