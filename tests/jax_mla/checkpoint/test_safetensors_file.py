"""The header reader against the safetensors library, and every way to break a file."""

import json
import re

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jax_mla.checkpoint import safetensors_file
from jax_mla.checkpoint.safetensors_file import StoredTensor, read_header


def write(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry(start, stop, dtype="U8", shape=None):
    shape = [stop - start] if shape is None else shape
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def test_reads_what_the_library_reads(golden):
    path = golden / "v3" / "model.safetensors"
    ours, theirs = read_header(path), load_file(path)
    assert ours.keys() == theirs.keys()
    for name, want in theirs.items():
        got = ours[name].read(want.shape, tuple((0, n) for n in want.shape))
        assert got.dtype == want.dtype
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float8_e4m3fn"])
def test_reads_a_part_of_each_dtype(tmp_path, dtype):
    values = np.arange(24).reshape(6, 4).astype(ml_dtypes.bfloat16).astype(dtype)
    save_file({"odd": np.zeros(3, np.uint8), "x": values}, tmp_path / "file")
    got = read_header(tmp_path / "file")["x"].read((2, 3, 4), ((1, 2), (0, 2), (1, 3)))
    np.testing.assert_array_equal(got, values.reshape(2, 3, 4)[1:2, 0:2, 1:3])


def test_reads_tensors_at_odd_offsets(tmp_path):
    values = np.arange(4, dtype=np.float32)
    header = {"a": entry(0, 1), "b": entry(1, 17, "F32", [4])}
    path = write(tmp_path / "file", header, b"\0" + values.tobytes())
    np.testing.assert_array_equal(read_header(path)["b"].read((4,), ((0, 4),)), values)


def test_reading_maps_one_tensor_only(tmp_path, monkeypatch):
    save_file({"x": np.zeros(10, np.float32), "y": np.ones(10, np.float32)}, tmp_path / "file")
    mapped = []
    memmap = np.memmap
    monkeypatch.setattr(np, "memmap", lambda *args: mapped.append(args) or memmap(*args))
    tensor = read_header(tmp_path / "file")["y"]
    assert mapped == []
    tensor.read((10,), ((2, 4),))
    assert [(args[2], args[3:]) for args in mapped] == [("r", (tensor.offset, (10,)))]


@pytest.mark.parametrize(
    "header, data, message",
    [
        pytest.param(b"{", b"", "is not JSON", id="not-json"),
        pytest.param(b"\xff\xfe", b"", "is not JSON", id="not-text"),
        pytest.param(b"[" * 100_000, b"", "is not JSON", id="nested-too-deep"),
        pytest.param(b"[1]", b"", "is not a JSON object but list", id="not-an-object"),
        pytest.param(b'{"a": 1, "b": 2, "a": 1}', b"", "'a' occurs twice", id="name-twice"),
        pytest.param({"__metadata__": 3}, b"", "__metadata__ that is not an object", id="metadata"),
        pytest.param({"a": 3}, b"", "describes a as 3", id="entry-not-an-object"),
        pytest.param({"a": {"dtype": "U8"}}, b"", "describes a as", id="entry-incomplete"),
        pytest.param({"a": entry(0, 4, shape="ab")}, b"1234", r"sizes \['a', 'b'", id="shape-text"),
        pytest.param({"a": entry(0, 4, shape=[-4])}, b"1234", r"sizes \[-4", id="negative-size"),
        pytest.param({"a": entry(0, 1, shape=[True])}, b"1", r"sizes \[True", id="boolean-size"),
        pytest.param({"a": entry(0, 4, "F4")}, b"1234", "unknown dtype 'F4'", id="unknown-dtype"),
        pytest.param({"a": entry(0, 4, ["F4"])}, b"1234", "unknown dtype", id="dtype-not-text"),
        pytest.param(
            {"a": entry(0, 4, "F32", [2])},
            b"1234",
            r"4 bytes, but F32\[2\] needs 8",
            id="size-differs",
        ),
        pytest.param(
            {"a": entry(0, 4), "b": entry(3, 6)}, b"123456", "a and b overlap", id="overlap"
        ),
        pytest.param(
            {"a": entry(0, 4), "b": entry(0, 4)}, b"1234", "a and b overlap", id="same-bytes"
        ),
        pytest.param(
            {"a": entry(0, 2), "b": entry(3, 6)}, b"123456", "a and b leave a gap", id="gap"
        ),
        pytest.param(
            {"a": entry(1, 4)}, b"1234", "the header and a leave a gap", id="gap-at-start"
        ),
        pytest.param(
            {"a": entry(0, 4)}, b"123", "is truncated: a ends at byte", id="truncated-data"
        ),
        pytest.param(
            {"a": entry(0, 4)}, b"12345", "has 1 trailing bytes after a", id="trailing-bytes"
        ),
        pytest.param({}, b"1", "has 1 trailing bytes after the header", id="no-tensors"),
    ],
)
def test_refuses_a_broken_file(tmp_path, header, data, message):
    path = write(tmp_path / "model.safetensors", header, data)
    with pytest.raises(ValueError, match=message) as refusal:
        read_header(path)
    assert str(path) in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "truncated: 0 bytes are not even a header length"),
        (b"1234567", "truncated: 7 bytes"),
        (
            (9).to_bytes(8, "little") + b"{}",
            "truncated: its header needs 17 bytes, the file has 10",
        ),
        (
            (100_000_001).to_bytes(8, "little") + b"{}",
            "header of 100000001 bytes, more than the 100000000 allowed",
        ),
        (b"\xff" * 16, "header of 18446744073709551615 bytes"),
    ],
    ids=["empty", "no-length", "header-cut", "header-oversized", "header-absurd"],
)
def test_refuses_a_file_without_a_whole_header(tmp_path, content, message):
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(message)):
        read_header(tmp_path / "file")


def test_sizes_agree_with_numpy():
    for name, dtype in safetensors_file.NUMPY_DTYPES.items():
        assert StoredTensor(None, name, (3, 5), 0).nbytes == 15 * dtype.itemsize
