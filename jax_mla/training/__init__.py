"""Training: loss, recipe, state and step; data, checkpoints and the loop that joins them."""

from jax_mla.layers.moe.load import expert_load, sequence_balance
from jax_mla.training.batch import Batch, place_batch
from jax_mla.training.data import TokenRows, read_tokens
from jax_mla.training.learning_rate import cosine, warmup_stable_decay
from jax_mla.training.loop import StepReport, TrainResult, train
from jax_mla.training.loss import NextTokenLoss, next_token_loss
from jax_mla.training.optimizer import make_optimizer, trainable_mask
from jax_mla.training.precision import Precision
from jax_mla.training.recipe import Recipe
from jax_mla.training.router_bias import update_router_bias
from jax_mla.training.saved_steps import Checkpoints, Restored
from jax_mla.training.state import TrainState, abstract_state, init_state, state_shardings
from jax_mla.training.step import StepMetrics, train_step

__all__ = [
    "Batch",
    "Checkpoints",
    "NextTokenLoss",
    "Precision",
    "Recipe",
    "Restored",
    "StepMetrics",
    "StepReport",
    "TokenRows",
    "TrainResult",
    "TrainState",
    "abstract_state",
    "cosine",
    "expert_load",
    "init_state",
    "make_optimizer",
    "next_token_loss",
    "place_batch",
    "read_tokens",
    "sequence_balance",
    "state_shardings",
    "train",
    "train_step",
    "trainable_mask",
    "update_router_bias",
    "warmup_stable_decay",
]
