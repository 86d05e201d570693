"""Both schedules compute what one device does, and hold what the papers say."""

import functools
import types

import jax
import numpy as np
import pytest
from numerics import assert_close

import jax_mla
from jax_mla.training import Batch, Precision, Recipe
from jax_mla.training.loss import loss_sums
from jax_mla.training.pipeline import (
    Pipeline,
    gpipe,
    join_params,
    loss_and_gradients,
    one_f_one_b,
    simulate,
    split_params,
    stage_queue,
)
from jax_mla.training.step import objective

M = 6
RECIPE = Recipe(
    num_steps=100,
    num_micro_batches=M,
    z_loss=0.01,
    balance_loss=0.1,
    precision=Precision(compute="float32"),
)


def batch_of(num_rows):
    """Packed rows, of which some tokens do not count; the parts count different numbers."""
    rng = np.random.default_rng(0)
    return Batch(
        rng.integers(0, 256, (num_rows, 16)).astype(np.int32),
        np.sort(rng.integers(0, 3, (num_rows, 16)).astype(np.int32)),
        np.arange(16)[None] < np.arange(16 - num_rows, 16)[:, None],
    )


@functools.partial(jax.jit, static_argnames="config")
def on_one_device(params, config, batch):
    """The loss and the gradients of the whole batch at once."""
    num_tokens, num_rows = batch.is_counted().sum(), len(batch.tokens)

    def minimised(params):
        _, sums = loss_sums(params, config, batch, RECIPE.pass_options, rules=None)
        return objective(sums, RECIPE, num_tokens, num_rows), sums.means(num_tokens, num_rows)

    gradients, loss = jax.grad(minimised, has_aux=True)(params)
    return loss, gradients


def run(params, pipeline, batch, schedule, **options):
    return loss_and_gradients(params, pipeline, batch, recipe=RECIPE, schedule=schedule, **options)


def close(got, want):
    assert_close(got, want, "float32")


def assert_equal_to_one_device(params, config, mesh, batch, sizes=None):
    want_loss, want = on_one_device(params, config, batch)
    pipeline = Pipeline(config, mesh, layers_per_stage=sizes)
    parts = split_params(params, pipeline)
    results = [run(parts, pipeline, batch, schedule) for schedule in (gpipe, one_f_one_b)]
    for result in results:
        jax.tree.map(close, vars(result.loss), vars(want_loss))
        jax.tree.map(close, join_params(result.gradients, pipeline), jax.device_get(want))
        placed = [pipeline.param_shardings(stage) for stage in range(pipeline.num_stages)]
        for x, sharding in zip(
            jax.tree.leaves(result.gradients), jax.tree.leaves(placed), strict=True
        ):
            assert x.sharding.is_equivalent_to(sharding, x.ndim)
    a, b = (jax.device_get(result.gradients) for result in results)
    jax.tree.map(np.testing.assert_array_equal, a, b)  # both add up in the same order
    return pipeline, parts, results


def ticking(schedule):
    """A clock by which forward takes stage + 1 + i seconds of micro-batch i, and backward
    10 * (stage + 1) + i. Between two ops 1000 go by."""
    now, times = 0, []
    for stage, op in schedule.order:
        seconds = (stage + 1) * {"forward": 1, "backward": 10}[op.kind] + op.micro_batch
        times += [now, now + seconds]
        now += seconds + 1000
    return types.SimpleNamespace(perf_counter=iter(times).__next__)


def test_a_dense_model_with_a_tied_embedding_in_three_stages(
    dense_config, random_params, monkeypatch
):
    """Loss, gradients, what stages hold, and the bubble that was measured."""
    mesh, batch = jax_mla.make_mesh(stage=3), batch_of(M)
    pipeline, parts, (f_then_b, in_turns) = assert_equal_to_one_device(
        random_params(dense_config), dense_config, mesh, batch
    )
    assert f_then_b.loss.load is None
    rows = 16 * (4 + 4 + 1)
    hidden = 16 * 32 * 4
    assert f_then_b.execution.peak_held == (M, M, M)
    assert f_then_b.execution.peak_held_bytes == (M * rows, *[M * (rows + hidden)] * 2)
    held = in_turns.execution.peak_held
    assert held[0] == 3 and all(
        count <= min(3, in_turns.execution.schedule.num_held(stage) + 1)
        for stage, count in enumerate(held)
    )
    assert in_turns.execution.peak_held_bytes[1] == held[1] * (rows + hidden)

    with pytest.raises(ValueError, match="no durations were measured"):
        in_turns.execution.timeline()
    monkeypatch.setattr(stage_queue, "time", ticking(one_f_one_b(3, M)))
    measured = run(parts, pipeline, batch, one_f_one_b, measure=True).execution
    assert measured.peak_held == held
    assert measured.forward_seconds == (3.5, 4.5, 5.5)
    assert measured.backward_seconds == (12.5, 22.5, 32.5)
    timeline = simulate(one_f_one_b(3, M), forward=(3.5, 4.5, 5.5), backward=(12.5, 22.5, 32.5))
    assert measured.timeline() == timeline


@pytest.mark.slow
@pytest.mark.parametrize(
    ("axes", "sizes"),
    [
        ({"stage": 1}, None),
        ({"stage": 2, "data": 2}, (2, 1)),
        ({"stage": 3}, None),
        ({"stage": 2}, (1, 2)),
        ({"stage": 2, "fsdp": 2, "tensor": 2}, None),
        ({"stage": 2, "expert": 2, "sequence": 2}, None),
    ],
    ids=["one-stage", "data", "three-stages", "uneven", "fsdp-tensor", "expert-sequence"],
)
def test_experts(moe_config, random_params, axes, sizes):
    """Of which a smaller version is in test_step: gradients of the first step."""
    mesh, params = jax_mla.make_mesh(**axes), random_params(moe_config)
    assert_equal_to_one_device(params, moe_config, mesh, batch_of(2 * M), sizes)


@pytest.mark.parametrize(
    ("batch", "options", "message"),
    [
        (batch_of(8), {}, "8 rows cannot be divided into 6 micro-batches"),
        (batch_of(6), {}, "1 rows of a micro-batch cannot be split over 2 devices .* 'data'"),
        (
            batch_of(12),
            {"schedule": lambda P, M: gpipe(P, M - 1)},
            "for 2 stages and 5 micro-batches, the pipeline has 2 and the recipe 6",
        ),
        (
            Batch(np.full((12, 16), 320)),
            {},
            "token ids must be from 0 to 319, the vocabulary, got 320",
        ),
        (Batch(np.zeros((12, 1), int)), {}, r"at least 2 per row for a loss, got .* \(12, 1\)"),
        (
            Batch(np.zeros((12, 16), int), loss_mask=np.ones((12, 16), int)),
            {},
            "loss_mask must be bool, got dtype int",
        ),
    ],
    ids=["micro-batches", "devices", "schedule", "vocabulary", "one-token", "mask"],
)
def test_what_does_not_fit_is_refused_before_any_work(moe_config, batch, options, message):
    pipeline = Pipeline(moe_config, jax_mla.make_mesh(stage=2, data=2))
    with pytest.raises(ValueError, match=message):
        loss_and_gradients(({}, {}), pipeline, batch, recipe=RECIPE, **options)


def test_parameters_that_are_not_of_the_stages_are_refused(dense_config, random_params):
    pipeline = Pipeline(dense_config, jax_mla.make_mesh(stage=3))
    first, second, last = split_params(random_params(dense_config), pipeline)
    for parts, message in (
        ((first, second), "parameters of 2 stages were given, the pipeline has 3"),
        (
            (last, second, first),
            r"(?s)stage 0 of layers \(0, 1\): .*unexpected \(\d+\): .*norm\.weight",
        ),
        (
            (first, jax.device_put(second, pipeline.sharding(2)), last),
            r"parameters of stage 1 are on devices \[2\], the stage has \[1\]",
        ),
        ((first, jax.device_get(second), last), "stage 1 of layers .* the parameters lie on none"),
    ):
        with pytest.raises(ValueError, match=message):
            run(parts, pipeline, batch_of(M), gpipe)
