"""Pipeline parallelism: the layers cut into stages on devices of their own, driven by the host.

A single program for all devices cannot say that one stage goes back while the next goes forward,
so each stage has programs of its own, and a `Schedule` says in which order it runs them. `gpipe`
and `one_f_one_b` both flush: all micro-batches of a step have come back before its weights change,
so that every gradient is that of one set of weights and no older versions are kept. (PipeDream,
which does not flush, keeps those that the micro-batches in flight began with.)

What a stage keeps of a micro-batch between its forward and its backward op is the stage's input.
The backward op computes the stage again from there, so 1F1B holds at most `num_stages` inputs and
GPipe those of all micro-batches.
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
