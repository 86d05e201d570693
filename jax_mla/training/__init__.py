"""Training: the loss and the router's load balancing."""

from jax_mla.training.loss import NextTokenLoss, next_token_loss
from jax_mla.training.router_bias import expert_load, update_router_bias

__all__ = ["NextTokenLoss", "expert_load", "next_token_loss", "update_router_bias"]
