"""One safetensors file: the header, checked, and memory-mapped views of its tensors. No jax.

The layout is 8 bytes of header length, a JSON header, then the data; every byte of the data belongs
to exactly one tensor. Written here because the safetensors library has no FP8 for numpy.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jax_mla.checkpoint.files import parse_json

MAX_HEADER_BYTES = 100_000_000
FP8 = "F8_E4M3"
# The dtypes that a model can be loaded from; the others are known by their size only.
NUMPY_DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    FP8: np.dtype(ml_dtypes.float8_e4m3fn),
}
_ITEM_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E8M0": 1, "U16": 2, "I16": 2, "U32": 4, "I32": 4,
    "U64": 8, "I64": 8, "F64": 8, "C64": 8,
} | {name: dtype.itemsize for name, dtype in NUMPY_DTYPES.items()}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """Where a tensor is stored: `offset` counts bytes from the start of the file."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * _ITEM_BYTES[self.dtype]

    def read(self, split: tuple[int, ...], bounds: tuple[tuple[int, int], ...]) -> np.ndarray:
        """`bounds` of the tensor reshaped to `split`; nothing else of the file is read.

        A view of a mapping of its own, which ends with the view: resident memory does not grow.
        """
        mapped = np.memmap(self.path, NUMPY_DTYPES[self.dtype], "r", self.offset, self.shape)
        return mapped.reshape(split)[tuple(slice(start, stop) for start, stop in bounds)]


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Every tensor of the file by name. Reads the header only.

    Raises:
      ValueError: the file is truncated, its header is oversized or malformed, or the tensors
        overlap, leave gaps or do not reach the end of the file.
    """
    file_bytes = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if file_bytes < 8:
            raise ValueError(
                f"{path} is truncated: {file_bytes} bytes are not even a header length"
            )
        if length > MAX_HEADER_BYTES:
            raise ValueError(
                f"{path} has a header of {length} bytes, more than the {MAX_HEADER_BYTES} allowed"
            )
        if 8 + length > file_bytes:
            raise ValueError(
                f"{path} is truncated: its header needs {8 + length} bytes, "
                f"the file has {file_bytes}"
            )
        header = parse_json(file.read(length), f"the header of {path}")
    if not isinstance(header.pop("__metadata__", {}), dict):
        raise ValueError(f"the header of {path} has a __metadata__ that is not an object")
    tensors = {name: _tensor(path, 8 + length, name, entry) for name, entry in header.items()}
    _check_coverage(path, tensors, 8 + length, file_bytes)
    return tensors


def _tensor(path: Path, data_start: int, name: str, entry: Any) -> StoredTensor:
    """One entry of the header; its offsets must be as far apart as its shape and dtype say."""
    try:
        dtype, shape, (start, stop) = str(entry["dtype"]), entry["shape"], entry["data_offsets"]
        sizes = [*shape, start, stop]
    except (TypeError, KeyError, ValueError):
        raise ValueError(f"the header of {path} describes {name} as {entry!r:.200}") from None
    if any(type(size) is not int or size < 0 for size in sizes):
        raise ValueError(f"the header of {path} says that {name} has sizes {sizes}")
    if dtype not in _ITEM_BYTES:
        raise ValueError(f"the header of {path} says that {name} has the unknown dtype {dtype!r}")
    tensor = StoredTensor(path, dtype, tuple(shape), data_start + start)
    if stop - start != tensor.nbytes:
        raise ValueError(
            f"the header of {path} says that {name} has {stop - start} bytes, but "
            f"{dtype}{list(shape)} needs {tensor.nbytes}"
        )
    return tensor


def _check_coverage(
    path: Path, tensors: dict[str, StoredTensor], data_start: int, file_bytes: int
) -> None:
    """Each byte of data belongs to exactly one tensor."""
    position, before = data_start, "the header"
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if tensor.offset != position:
            how = "overlap" if tensor.offset < position else "leave a gap"
            raise ValueError(f"{path} is malformed: {before} and {name} {how} at byte {position}")
        position, before = tensor.offset + tensor.nbytes, name
    if position > file_bytes:
        raise ValueError(
            f"{path} is truncated: {before} ends at byte {position}, the file has {file_bytes}"
        )
    if position < file_bytes:
        raise ValueError(
            f"{path} has {file_bytes - position} trailing bytes after {before}, its last tensor"
        )
