"""Input checks that every op shares: sizes, and values where the host can read them."""

import jax
import numpy as np
from jax.core import Tracer

FLOATS = ("float32", "bfloat16", "float16")


def require(condition: bool | np.bool_, message: str) -> None:
    """Raises ValueError(message) unless `condition`."""
    if not condition:
        raise ValueError(message)


def require_float(op: str, **arrays) -> None:
    """Every array has the same dtype, one of FLOATS."""
    names = list(arrays)
    for name in names:
        dtype = str(arrays[name].dtype)
        require(dtype in FLOATS, f"{op}: {name} has dtype {dtype}, not one of {list(FLOATS)}")
        require(
            arrays[name].dtype == arrays[names[0]].dtype,
            f"{op}: {name} has dtype {dtype}, but {names[0]} has {arrays[names[0]].dtype}",
        )


def require_integer(op: str, **arrays) -> None:
    """Every array holds integers."""
    for name, array in arrays.items():
        require(
            np.issubdtype(array.dtype, np.integer),
            f"{op}: {name} has dtype {array.dtype}, not an integer one",
        )


def require_rank(op: str, **ranks) -> None:
    """Every (array, rank) has that rank; keyword names are the arguments' names."""
    for name, (array, rank) in ranks.items():
        require(
            hasattr(array, "shape") and hasattr(array, "dtype"),
            f"{op}: {name} must be an array, got {type(array).__name__}",
        )
        require(
            len(array.shape) == rank,
            f"{op}: {name} has shape {tuple(array.shape)}, which is not of rank {rank}",
        )


def host_values(array) -> np.ndarray | None:
    """The values where this process can read them by itself, otherwise None.

    It cannot while they are traced, nor where parts of them are on other hosts only; an array
    replicated over several hosts can be read.
    """
    if isinstance(array, Tracer):
        return None
    if isinstance(array, jax.Array) and not (
        array.is_fully_addressable or array.is_fully_replicated
    ):
        return None
    return np.asarray(array)
