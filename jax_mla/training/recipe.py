"""All choices of a training run in one frozen object."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Literal, get_args

from jax_mla.checks.sizes import check_one_of
from jax_mla.layers.block import Remat
from jax_mla.training.learning_rate import (
    LearningRate,
    check_lengths,
    cosine,
    warmup_stable_decay,
)
from jax_mla.training.pass_options import PassOptions
from jax_mla.training.precision import Precision

OptimizerName = Literal["adamw", "muon"]
ScheduleName = Literal["cosine", "wsd"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a model is trained. Hashable, so that a jitted step can take it as a static argument.

    Attributes:
      num_steps: of the run; the learning rate's schedule depends on it.
      optimizer: "adamw", or "muon": Muon for matrices, scaled to AdamW's update size, and AdamW for
        the embedding, the head and vectors.
      schedule: of the learning rate: "cosine", or "wsd" (`warmup_stable_decay`).
      learning_rate: the peak of the schedule.
      final_learning_rate: the end of the schedule.
      warmup_steps: None takes 1 % of the steps, at least one.
      decay_steps: of "wsd"; None takes 20 % of the steps.
      weight_decay: applies to everything but norms, biases and the router's correction bias.
      clip_norm: largest global norm of the gradients; None does not clip.
      z_loss: factor of `NextTokenLoss.z_loss`.
      balance_loss: factor of `NextTokenLoss.balance_loss`; DeepSeek-V3 takes 1e-4.
      router_bias_rate: of `update_router_bias`; 0 leaves the bias alone.
      num_micro_batches: parts of a batch, computed one after the other, whose gradients are summed.
      remat: what the backward pass recomputes, see `next_token_loss`.
      chunk_tokens: see `next_token_loss`.
      deterministic: attention's gradients have the same bits every time, which takes a second
        kernel on Hopper GPUs and nothing elsewhere. On a GPU, XLA sums other gradients (the
        embedding's, those of tokens with several experts) in no fixed order, unless it is started
        with XLA_FLAGS=--xla_gpu_exclude_nondeterministic_ops=true.

    Raises:
      ValueError: a value is out of its range.
    """

    num_steps: int
    optimizer: OptimizerName = "adamw"
    schedule: ScheduleName = "cosine"
    learning_rate: float = 3e-4
    final_learning_rate: float = 0.0
    warmup_steps: int | None = None
    decay_steps: int | None = None
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float | None = 1.0
    z_loss: float = 0.0
    balance_loss: float = 0.0
    router_bias_rate: float = 1e-3
    num_micro_batches: int = 1
    remat: Remat = "none"
    chunk_tokens: int = 4096
    deterministic: bool = False
    precision: Precision = dataclasses.field(default_factory=Precision)

    def __post_init__(self) -> None:
        self._check()

    def _check(self) -> None:
        if not isinstance(self.precision, Precision):
            raise ValueError(f"precision must be a Precision, got {self.precision!r}")
        for name, literal in (
            ("optimizer", OptimizerName),
            ("schedule", ScheduleName),
            ("remat", Remat),
        ):
            check_one_of(name, getattr(self, name), get_args(literal))
        for name in ("num_steps", "num_micro_batches", "chunk_tokens"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        for name in (
            "learning_rate", "final_learning_rate", "weight_decay", "z_loss", "balance_loss",
            "router_bias_rate",
        ):  # fmt: skip
            if not 0 <= (value := getattr(self, name)) < math.inf:
                raise ValueError(f"{name} must be a finite number of at least 0, got {value}")
        for name in ("eps", "clip_norm"):  # at 0, weights without a gradient would become 0 / 0
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} must be a finite number above 0, got {value}")
        for name in ("b1", "b2"):
            if not 0 <= (value := getattr(self, name)) < 1:
                raise ValueError(f"{name} must be at least 0 and below 1, got {value}")
        check_lengths(self.num_steps, **self._lengths())

    @functools.cached_property
    def rate(self) -> LearningRate:
        """The learning rate by step."""
        make = cosine if self.schedule == "cosine" else warmup_stable_decay
        options = {"num_steps": self.num_steps, "final": self.final_learning_rate}
        return make(self.learning_rate, **options, **self._lengths())

    @property
    def pass_options(self) -> PassOptions:
        """The fields that say how a forward and backward pass is computed."""
        return PassOptions(self.precision, self.remat, self.chunk_tokens, self.deterministic)

    def _lengths(self) -> dict[str, int]:
        """Steps of warmup, and of decay where the schedule has a phase of its own for it."""
        warmup = max(self.num_steps // 100, 1) if self.warmup_steps is None else self.warmup_steps
        if self.schedule == "cosine":
            return {"warmup_steps": warmup}
        decay = self.num_steps // 5 if self.decay_steps is None else self.decay_steps
        return {"warmup_steps": warmup, "decay_steps": decay}
