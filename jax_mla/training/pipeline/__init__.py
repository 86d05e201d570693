"""Pipeline parallelism: layers are divided into stages on separate devices, driven by the host.

A single program for all devices cannot run one stage backward while the next runs forward, so each
stage has its own programs, and a `Schedule` gives the order in which it runs them. `gpipe` and
`one_f_one_b` both flush: all micro-batches of a step are done before its weights change, so every
gradient belongs to one set of weights and no older versions are kept. (PipeDream, which does not
flush, keeps the versions that the micro-batches in flight began with.)

Between the forward and the backward op of a micro-batch a stage keeps only its input. The backward
op recomputes the stage from it, so 1F1B holds at most `num_stages` inputs, and GPipe those of all
micro-batches.
"""

from jax_mla.training.pipeline.execute import Execution, PipelinedGradients, loss_and_gradients
from jax_mla.training.pipeline.joining import (
    join_params,
    join_state,
    split_params,
    split_state,
)
from jax_mla.training.pipeline.plot import plot_timeline
from jax_mla.training.pipeline.schedule import Op, Schedule, gpipe, one_f_one_b
from jax_mla.training.pipeline.stages import Pipeline
from jax_mla.training.pipeline.step import pipeline_train_step
from jax_mla.training.pipeline.timeline import Span, Timeline, ideal_bubble, simulate

__all__ = [
    "Execution",
    "Op",
    "Pipeline",
    "PipelinedGradients",
    "Schedule",
    "Span",
    "Timeline",
    "gpipe",
    "ideal_bubble",
    "join_params",
    "join_state",
    "loss_and_gradients",
    "one_f_one_b",
    "pipeline_train_step",
    "plot_timeline",
    "simulate",
    "split_params",
    "split_state",
]
