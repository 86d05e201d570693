"""What the processes of one run must do together; with a single process, nothing."""

from __future__ import annotations

import jax
import numpy as np
from jax.experimental import multihost_utils


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
