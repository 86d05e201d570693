"""The loop: what it reports and saves, and how a stopped run goes on."""

import dataclasses
import shutil

import jax
import numpy as np
import pytest
from numerics import assert_close, assert_same_bits
from weights import random_params

import jax_mla
from jax_mla.sharding import layouts
from jax_mla.training import Checkpoints, Precision, Recipe, TokenRows, train
from jax_mla.training.pipeline import gpipe

RECIPE = Recipe(num_steps=6, learning_rate=1e-2, precision=Precision(compute="float32"))


@pytest.fixture(scope="module")
def data():
    run = np.random.default_rng(0).integers(0, 200, 1000).astype(np.uint16)
    return TokenRows([run], batch_rows=4, row_tokens=9, vocab_size=320)


@pytest.fixture(scope="module")
def uninterrupted(config, data):
    reports = []
    result = train(config, RECIPE, data, on_step=reports.append)
    assert result.reason == "finished"
    return result.state, reports


@pytest.fixture(scope="module")
def config(config):
    """A dense layer and a mixture of experts, one for each of two stages."""
    return dataclasses.replace(config, num_hidden_layers=2, first_k_dense_replace=1)


@pytest.fixture(scope="module")
def small_config(config):
    """One dense layer, for what does not depend on the model."""
    return dataclasses.replace(config, num_hidden_layers=1, first_k_dense_replace=1)


@pytest.fixture(scope="module")
def small_params(small_config):
    return random_params(small_config)


def stop_after(step):
    """A pair of options: the reports so far, and a stop once `step` has begun."""
    reports, calls = [], []

    def should_stop():
        calls.append(None)
        return len(calls) == step

    return reports, {"on_step": reports.append, "should_stop": should_stop}


def test_every_step_is_reported_once(uninterrupted):
    state, reports = uninterrupted
    assert [report.step for report in reports] == [1, 2, 3, 4, 5, 6] and state.step == 6
    assert reports[0].loss > reports[-1].loss > 0 and reports[0].num_tokens == 4 * 8
    for report in reports:
        assert_close(np.float64(report.tokens_per_second * report.seconds), 4 * 9, "float32")
        assert 1 <= report.largest_load <= 4


def test_a_stopped_run_goes_on_to_the_same_bits(tmp_path, config, data, uninterrupted):
    state, wanted = uninterrupted
    reports, options = stop_after(2)
    with Checkpoints(tmp_path) as store:
        result = train(config, RECIPE, data, checkpoints=store, save_every=4, **options)
        assert result.reason == "stopped" and store.steps() == [2]
        notices = []
        result = train(
            config, RECIPE, data, checkpoints=store, save_every=4, resume=True,
            on_step=reports.append, on_notice=notices.append,
        )  # fmt: skip
        assert store.steps() == [2, 4, 6] and notices == ["resuming after step 2"]
    assert_same_bits(result.state, state)
    assert [(r.step, r.loss, r.grad_norm) for r in reports] == [
        (r.step, r.loss, r.grad_norm) for r in wanted
    ]


def test_a_damaged_step_is_passed_over_with_notice(tmp_path, config, data, uninterrupted):
    notices, options = [], {"checkpoints": Checkpoints(tmp_path), "save_every": 1}
    train(config, RECIPE, data, **options, **stop_after(3)[1])
    record = tmp_path / "step_00000003" / "record.json"
    record.write_text(record.read_text().replace("0.9", "0.8"))
    result = train(config, RECIPE, data, resume=True, on_notice=notices.append, **options)
    assert len(notices) == 2 and notices[1] == "resuming after step 2"
    assert "step_00000003 is damaged: record.json has" in notices[0]
    assert_same_bits(result.state, uninterrupted[0])


def test_a_run_moves_to_a_mesh_and_back(tmp_path, config, data, uninterrupted):
    """Two steps on one device, two under ZeRO-3 on four, two on one: equal but for rounding."""
    mesh = {"mesh": jax_mla.make_mesh(data=4), "rules": layouts.zero3()}
    with Checkpoints(tmp_path) as store:
        options = {"checkpoints": store, "resume": True, "on_notice": lambda _: None}
        train(config, RECIPE, data, **options, **stop_after(2)[1])
        state = train(config, RECIPE, data, **options, **mesh, **stop_after(2)[1]).state
        assert not state.params["moe_layers"]["mlp"]["gate"]["weight"].sharding.is_fully_replicated
        state = train(config, RECIPE, data, **options).state
    assert state.step == 6
    for x, y in zip(jax.tree.leaves(state), jax.tree.leaves(uninterrupted[0]), strict=True):
        assert_close(x, y, "bfloat16")


def test_a_pipeline_goes_on_to_the_same_bits_and_then_on_one_device(
    tmp_path, config, data, uninterrupted
):
    """Four steps in two stages of two devices, the last two again, and two of `train_step`."""
    recipe = dataclasses.replace(RECIPE, num_micro_batches=2)
    staged = {"mesh": jax_mla.make_mesh(stage=2, data=2), "rules": layouts.zero1()}
    with Checkpoints(tmp_path) as store:
        options = {"checkpoints": store, "resume": True, "on_notice": lambda _: None}
        stopped = train(config, recipe, data, **options, **staged, save_every=2, **stop_after(4)[1])
        want = stopped.state
        assert store.steps() == [2, 4]
        shutil.rmtree(tmp_path / "step_00000004")
        state = train(config, recipe, data, **options, **staged, **stop_after(2)[1]).state
        assert_same_bits(state, want)
        of_stages = state.params["dense_layers"]["mlp"]["gate_proj"]["weight"].sharding
        assert "stage" in str(of_stages.spec)  # no device holds the whole model in between
        state = train(config, recipe, data, **options).state
    assert state.step == 6
    for x, y in zip(jax.tree.leaves(state), jax.tree.leaves(uninterrupted[0]), strict=True):
        assert_close(x, y, "bfloat16")


@pytest.mark.parametrize(
    ("mesh", "found"), [(None, "none"), ({"data": 2}, "one of stage=1")], ids=["none", "data"]
)
def test_a_schedule_without_stages_is_refused(config, data, mesh, found):
    mesh = mesh and jax_mla.make_mesh(**mesh)
    with pytest.raises(ValueError, match=f"needs a mesh with stage=2 or more, got {found}"):
        train(config, RECIPE, data, mesh=mesh, pipeline_schedule=gpipe)


@pytest.mark.parametrize("mesh", [None, {"stage": 2}], ids=["one-device", "stages"])
def test_data_and_weights_of_another_model_are_refused(config, data, params, mesh):
    where = {"mesh": mesh and jax_mla.make_mesh(**mesh)}
    larger = dataclasses.replace(data, vocab_size=321)
    factors = {"short_factor": (1.0,) * 4, "long_factor": (2.0,) * 4}
    scaling = jax_mla.RopeScaling("longrope", 2.0, 8, **factors)
    with pytest.raises(ValueError, match="original_max_position_embeddings=8 tokens, got 9"):
        train(dataclasses.replace(config, rope_scaling=scaling), RECIPE, data, params={}, **where)
    with pytest.raises(ValueError, match=r"vocabulary of 321 may hold .* a model of 320 does not"):
        train(config, RECIPE, larger, **where)
    fewer = {name: value for name, value in params.items() if name != "moe_layers"}
    with pytest.raises(ValueError, match=r"missing \(\d+\): moe_layers\."):
        train(config, RECIPE, data, params=fewer, **where)
    with pytest.raises(ValueError, match=r"missing \(\d+\): dense_layers\."):
        train(config, RECIPE, data, params={}, **where)


def test_a_folder_with_steps_is_not_overwritten(tmp_path, config, data):
    with Checkpoints(tmp_path) as store:
        train(config, RECIPE, data, checkpoints=store, **stop_after(1)[1])
        with pytest.raises(
            ValueError, match=r"holds step 1: resume \(--resume\), or train elsewhere"
        ):
            train(config, RECIPE, data, checkpoints=store)


@pytest.mark.parametrize(
    ("what", "change", "message"),
    [
        ("config", {"rope_theta": 5.0}, r"trained with config.rope_theta 10000.0, not 5.0"),
        ("recipe", {"learning_rate": 0.5}, "trained with recipe.learning_rate 0.01, not 0.5"),
        (
            "recipe",
            {"precision": Precision()},
            "trained with recipe.precision.compute float32, not bfloat16",
        ),
        ("data", {"seed": 5}, "trained with data.seed 0, not 5"),
        ("data", {"batch_rows": 2}, "trained with data.batch_rows 4, not 2"),
    ],
    ids=["config", "recipe", "precision", "seed", "batch"],
)
def test_another_run_is_not_resumed(tmp_path, config, data, what, change, message):
    with Checkpoints(tmp_path) as store:
        train(config, RECIPE, data, checkpoints=store, **stop_after(1)[1])
        run = {"config": config, "recipe": RECIPE, "data": data}
        run[what] = dataclasses.replace(run[what], **change)
        with pytest.raises(ValueError, match=message):
            train(**run, checkpoints=store, resume=True)


def test_a_run_of_another_length_resumes_and_says_so(tmp_path, small_config, data):
    with Checkpoints(tmp_path) as store:
        train(small_config, RECIPE, data, checkpoints=store, **stop_after(1)[1])
        longer, notices = dataclasses.replace(RECIPE, num_steps=2), []
        options = {"checkpoints": store, "resume": True, "on_notice": notices.append}
        assert train(small_config, longer, data, **options).state.step == 2
    assert notices[1:] == ["the learning rate now follows a schedule of 2 steps, not of 6"]


def test_a_loss_that_is_no_number_ends_the_run_unsaved(tmp_path, small_config, data, small_params):
    broken = jax.tree.map(lambda x: x * np.nan, small_params)
    with Checkpoints(tmp_path) as store:
        with pytest.raises(ValueError, match="the loss of step 1 is nan"):
            train(small_config, RECIPE, data, params=broken, checkpoints=store, save_every=1)
        assert store.steps() == []


def test_a_float16_loss_that_is_no_number_ends_the_run(small_config, data, small_params):
    """No loss scale could help: the forward pass overflows."""
    broken = jax.tree.map(lambda x: x * np.nan, small_params)
    recipe = dataclasses.replace(RECIPE, precision=Precision(compute="float16"))
    with pytest.raises(ValueError, match="the loss of step 1 is nan"):
        train(small_config, recipe, data, params=broken)


@pytest.mark.parametrize(
    ("num_steps", "num_reports", "message"),
    [
        (3, 3, "all 3 steps were skipped, .* the loss scale is now 8192"),
        (30, 16, "of step 17 overflow at a loss scale of 1, and 17 steps were skipped"),
    ],
    ids=["end", "scale"],
)
def test_a_run_of_skipped_steps_does_not_finish(
    tmp_path, small_config, data, small_params, num_steps, num_reports, message
):
    """Gradients of such a z-loss are beyond float16, scaled or not; the loss is a number."""
    reports, precision = [], Precision(compute="float16")
    recipe = dataclasses.replace(RECIPE, num_steps=num_steps, z_loss=1e9, precision=precision)
    options = {"params": small_params, "on_step": reports.append}
    with Checkpoints(tmp_path) as store:
        with pytest.raises(ValueError, match=message):
            train(small_config, recipe, data, checkpoints=store, **options)
        assert store.steps() == []
    assert [r.num_skipped for r in reports] == list(range(1, num_reports + 1))
    assert all(r.is_skipped and np.isfinite(r.loss) for r in reports)


def test_gradients_without_a_finite_norm_end_the_run_unsaved(
    tmp_path, small_config, data, small_params
):
    """The squares of the head's gradients overflow, and neither they nor the loss."""
    norm, head = small_params["norm"]["weight"], small_params["lm_head"]["weight"]
    steep = small_params | {"norm": {"weight": norm * 1e25}, "lm_head": {"weight": head * 1e-25}}
    with Checkpoints(tmp_path) as store:
        with pytest.raises(ValueError, match="the gradients' norm of step 1 is inf"):
            train(small_config, RECIPE, data, params=steep, checkpoints=store, save_every=1)
        assert store.steps() == []


def test_weights_may_be_given(config, data, params):
    result = train(config, RECIPE, data, params=params, **stop_after(1)[1])
    assert result.state.step == 1 and not params["lm_head"]["weight"].is_deleted()


def test_weights_are_loaded_where_a_run_begins_and_not_where_it_resumes(
    tmp_path, config, data, params
):
    asked = []
    load = lambda rules: asked.append(rules) or params  # noqa: E731
    with Checkpoints(tmp_path) as store:
        options = {"checkpoints": store, "on_notice": lambda _: None, "params": load}
        want = train(config, RECIPE, data, params=params, **stop_after(1)[1]).state
        assert_same_bits(train(config, RECIPE, data, **options, **stop_after(1)[1]).state, want)
        train(config, RECIPE, data, **options, resume=True, **stop_after(1)[1])
        assert asked == [None] and store.steps() == [1, 2]


def test_a_step_to_save_at_that_never_comes_is_refused(config, data):
    with pytest.raises(ValueError, match="save_every must be an integer of at least 1, got 0"):
        train(config, RECIPE, data, save_every=0)
