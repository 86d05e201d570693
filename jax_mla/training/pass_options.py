"""How a forward and backward pass is computed."""

from __future__ import annotations

import dataclasses
from typing import get_args

from jax_mla.checks.sizes import check_one_of
from jax_mla.layers.block import Remat
from jax_mla.training.precision import Precision


@dataclasses.dataclass(frozen=True)
class PassOptions:
    """Options of a pass that change its memory, speed and rounding, not what it computes. Hashable.

    Attributes:
      precision: None computes in the dtype of the parameters.
      remat, chunk_tokens: as in `next_token_loss`.
      deterministic: as in `Recipe`.

    Raises:
      ValueError: there is no such remat, or chunk_tokens is below 1.
    """

    precision: Precision | None = None
    remat: Remat = "none"
    chunk_tokens: int = 4096
    deterministic: bool = False

    def __post_init__(self) -> None:
        check_one_of("remat", self.remat, get_args(Remat))
        if self.chunk_tokens < 1:
            raise ValueError(f"chunk_tokens must be at least 1, got {self.chunk_tokens}")
