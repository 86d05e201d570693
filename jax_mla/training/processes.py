"""What the processes of one run must do together; with a single process, nothing."""

from __future__ import annotations

import jax
import numpy as np
from jax.experimental import multihost_utils

from jax_mla.params import Params


def is_first_process() -> bool:
    """Whether this is the process that writes what is written once."""
    return jax.process_index() == 0


def wait_for_all(name: str) -> None:
    """Returns when every process has come here; `name` must be the same in all of them."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def any_process(flag: bool) -> bool:
    """Whether the flag is set in one of the processes: they stop together or not at all."""
    if jax.process_count() == 1:
        return flag
    return bool(multihost_utils.process_allgather(np.array(flag)).any())


def of_first_process(number: int) -> int:
    """The number that the first process has."""
    if jax.process_count() == 1:
        return number
    return int(multihost_utils.broadcast_one_to_all(np.array(number)))


def gathered(params: Params) -> Params | None:
    """All parameters in the host memory of the first process; None in the others.

    Every device holds one layer of one leaf at a time beside its own share. With a single process,
    the parameters as they are.
    """
    if jax.process_count() == 1:
        return params

    def gather(x: jax.Array) -> np.ndarray:
        if x.ndim < 3:  # leaves with fewer axes are small, or not stacked
            return multihost_utils.process_allgather(x, tiled=True)
        whole = np.empty(x.shape, x.dtype) if is_first_process() else np.empty(0)
        for layer in range(len(x)):
            part = multihost_utils.process_allgather(x[layer], tiled=True)
            if is_first_process():
                whole[layer] = part
        return whole

    host = jax.tree.map(gather, params)
    return host if is_first_process() else None
