"""Slices of a parameter leaf, straight from the files and in our layout. No jax."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor

import ml_dtypes
import numpy as np

from jax_mla.checkpoint import fp8
from jax_mla.checkpoint.matching import Matched
from jax_mla.checkpoint.safetensors_file import FP8
from jax_mla.config.leaves import Leaf

Bounds = tuple[tuple[int, int], ...]  # half-open range of each axis


def read_leaf(matched: Matched, leaf: Leaf, bounds: Bounds, dtype: np.dtype) -> np.ndarray:
    """leaf[bounds] in `dtype`, reading those elements of the files and no others.

    The result is a transposed view of fresh memory in the published order: files are copied as
    they are, and the device transposes.

    Raises:
      ValueError: a finite number is beyond the range of `dtype`; it is named with its tensor.
    """
    num_lead = len(leaf.lead_shape)
    lead, inner = bounds[:num_lead], bounds[num_lead:]
    published = list(leaf.cut)
    for axis, (start, stop) in zip(leaf.order, inner, strict=True):
        first = leaf.cut[axis][0]
        published[axis] = (first + start, first + stop)
    lead_sizes = tuple(stop - start for start, stop in lead)
    buffer = np.empty((*lead_sizes, *(stop - start for start, stop in published)), dtype)

    def fill(index: tuple[int, ...]) -> None:
        at = tuple(start + i for (start, _), i in zip(lead, index, strict=True))
        _read_tensor(matched, leaf, leaf.name_at(at), tuple(published), buffer[index])

    with ThreadPoolExecutor() as threads:
        list(threads.map(fill, np.ndindex(*lead_sizes)))
    return buffer.transpose(*range(num_lead), *(num_lead + axis for axis in leaf.order))


def _read_tensor(matched: Matched, leaf: Leaf, name: str, bounds: Bounds, out: np.ndarray) -> None:
    """Fills `out` with `bounds` of a published tensor, reshaped to `leaf.split`."""
    stored = matched.tensors[name]
    values = stored.read(leaf.split, bounds)
    with np.errstate(over="ignore"):  # what overflows is looked for below
        if stored.dtype == FP8:
            _dequantise(matched, leaf, name, values, bounds, out)
        else:
            out[...] = values
    _refuse_overflow(name, stored.dtype, values, out)


def _refuse_overflow(name: str, dtype: str, values: np.ndarray, out: np.ndarray) -> None:
    """Raises if a finite value of the file became infinite in `out`."""
    limit = ml_dtypes.finfo(out.dtype).max
    # Scales of FP8 may be anything; other dtypes overflow only in a narrower one.
    if not (dtype == FP8 or ml_dtypes.finfo(values.dtype).max > limit):
        return
    if out.size == 0 or not _may_be_infinite(out):
        return
    overflowed = np.isinf(out) & np.isfinite(values)
    if overflowed.any():
        value = float(values[tuple(int(i[0]) for i in np.nonzero(overflowed))])
        times = " times its scale" if dtype == FP8 else ""
        raise ValueError(
            f"{name} holds {value:g}{times}, beyond the largest {out.dtype}, {float(limit):g}: "
            "load it in another dtype"
        )


def _may_be_infinite(array: np.ndarray) -> bool:
    """False if all numbers are finite; by two reductions of integers, a tenth of `np.isinf`'s cost.

    As integers, only NaN is above infinity: signed ones for +inf, unsigned ones for -inf.
    """
    unsigned = np.dtype(f"u{array.dtype.itemsize}")
    infinity, minus = np.array([np.inf, -np.inf], array.dtype).view(unsigned)
    bits = array.view(unsigned)
    return bool(bits.max() >= minus or bits.view(unsigned.name[1:]).max() >= infinity)


def _dequantise(
    matched: Matched,
    leaf: Leaf,
    name: str,
    values: np.ndarray,
    bounds: Bounds,
    out: np.ndarray,
) -> None:
    grid = matched.scale_of(name)
    scale = grid.read(grid.shape, tuple((0, size) for size in grid.shape)).astype(np.float32)
    num_out_axes = 1
    while math.prod(leaf.split[:num_out_axes]) < leaf.published_shape[0]:
        num_out_axes += 1
    rows = _positions(leaf.split[:num_out_axes], bounds[:num_out_axes])
    cols = _positions(leaf.split[num_out_axes:], bounds[num_out_axes:])
    matrix = (len(rows), len(cols))
    fp8.dequantise(values.reshape(matrix), scale, rows, cols, matched.block, out.reshape(matrix))


def _positions(shape: tuple[int, ...], bounds: Bounds) -> np.ndarray:
    """Positions in the flattened axis of the elements in `bounds` of `shape`."""
    inside = tuple(slice(start, stop) for start, stop in bounds)
    return np.arange(math.prod(shape)).reshape(shape)[inside].ravel()
