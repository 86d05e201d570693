"""The training loop: steps, reports, checkpoints, and resuming a run that was stopped."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable
from typing import Any, Literal

import jax
from flax.training.dynamic_scale import DynamicScale
from jax.sharding import Mesh

from jax_mla.checks.sizes import check_positive
from jax_mla.config.model import DeepSeekConfig
from jax_mla.params import Params
from jax_mla.sharding.rules import ShardingRules
from jax_mla.training.data import TokenRows
from jax_mla.training.drivers import Driver, driver_for
from jax_mla.training.pipeline.schedule import ScheduleMaker
from jax_mla.training.processes import any_process, of_first_process
from jax_mla.training.recipe import Recipe
from jax_mla.training.saved_steps import Checkpoints
from jax_mla.training.state import TrainState, abstract_state, init_state
from jax_mla.training.step import StepMetrics

ParamsLoader = Callable[[ShardingRules | None], Params]

# Fields of a recipe that may differ in a resumed run: its length, how its sums are divided, and
# whether a GPU adds them up in one order.
_MAY_CHANGE = {"num_steps", "num_micro_batches", "remat", "chunk_tokens", "deterministic"}


@dataclasses.dataclass(frozen=True)
class StepReport:
    """The metrics of one step as Python numbers.

    Attributes:
      step: counted from 1.
      loss: in nats per token.
      grad_norm: not finite if the step was skipped.
      num_tokens: tokens whose prediction was counted.
      is_skipped: float16 gradients overflowed, and only the loss scale changed.
      num_skipped: steps of the run that were skipped, this one included.
      largest_load: tokens of the busiest expert over the mean, in the worst layer; None without
        experts, or in a batch of nothing but padding.
      num_dropped: (token, expert) pairs dropped by the dispatch's capacity; None without one.
      seconds: since the previous report; for the first step, since it began, with compilation.
      tokens_per_second: of all tokens of the batch, padding included.
    """

    step: int
    loss: float
    grad_norm: float
    learning_rate: float
    num_tokens: int
    is_skipped: bool
    num_skipped: int
    largest_load: float | None
    num_dropped: int | None
    seconds: float
    tokens_per_second: float


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """The last state, whether the run finished or was asked to stop, and how many steps it skipped.

    Attributes:
      num_skipped: steps since the run began that changed nothing, as float16 gradients overflowed.
    """

    state: TrainState
    reason: Literal["finished", "stopped"]
    num_skipped: int


def train(
    config: DeepSeekConfig,
    recipe: Recipe,
    data: TokenRows,
    *,
    seed: int = 0,
    params: Params | ParamsLoader | None = None,
    mesh: Mesh | None = None,
    rules: ShardingRules | None = None,
    pipeline_schedule: ScheduleMaker | None = None,
    checkpoints: Checkpoints | None = None,
    save_every: int = 1000,
    resume: bool = False,
    on_begin: Callable[[int], None] = lambda step: None,
    on_step: Callable[[StepReport], None] = lambda report: None,
    on_notice: Callable[[str], None] = print,
    should_stop: Callable[[], bool] = lambda: False,
) -> TrainResult:
    """Trains for `recipe.num_steps` batches, or resumes a run that was interrupted.

    On a CPU equal calls give equal bits, interrupted or not; on a GPU the last bits may vary, see
    `Recipe.deterministic`.

    Args:
      data: step i reads batch i.
      seed: of the initial weights.
      params: weights to start from instead; or a function that loads them, which takes the rules
        that the state is sharded by. It is called only when a run begins, not when it resumes.
      mesh: a mesh with stage > 1 runs as a pipeline with `recipe.num_micro_batches`. A second,
        joined copy of the state exists at the start, at every save and at the end.
      pipeline_schedule: `pipeline.gpipe`, `pipeline.one_f_one_b` or your own; None takes 1F1B.
      checkpoints: where to save every `save_every` steps and at the end; None does not save.
      resume: continues from the newest undamaged step of `checkpoints`, on any mesh; starts from
        the beginning if there is none.
      on_begin: called once, with the number of steps that are done, when everything is checked and
        before the first step is computed.
      on_step: called once per step, while the next one is computed.
      on_notice: called with a sentence about the step that a run resumes from, and about damaged
        steps.
      should_stop: asked after every step; True in any process saves and returns.

    Raises:
      ValueError: the folder holds steps and `resume` is False; config, recipe or data differ from
        the saved run (both values are named); the data do not fit the config or cannot be divided
        over the mesh; the loss is not finite, or the gradients' norm, unless float16 skips the
        step; float16 gradients overflow at a loss scale of 1; or every step of the run was skipped.
        Nothing is saved after the last good step.
    """
    check_positive(save_every=save_every)
    driver = driver_for(config, recipe, mesh, rules, pipeline_schedule)
    driver.check(data)
    record = _record(config, recipe, data, seed)
    state = _resumed(checkpoints, record, driver, resume, on_notice)
    if state is None:
        state = _begun(driver, seed, params)
    step, reason = int(state.step), "finished"
    on_begin(step)
    state = driver.split(state)
    progress = _Progress(step, record, data.batch_tokens, checkpoints, on_step)
    while step < recipe.num_steps:
        state, metrics = driver.step(state, data.batch(step))
        step += 1
        progress.add(step, metrics)
        if checkpoints is not None and step % save_every == 0 and step < recipe.num_steps:
            progress.settle()
            progress.save(driver.join(state))
        if any_process(should_stop()):
            reason = "stopped"
            break
    progress.settle()
    state = driver.join(state)
    num_skipped = int(state.num_skipped)
    if reason == "finished" and num_skipped == step:
        raise ValueError(
            f"all {step} steps were skipped, as their float16 gradients overflowed; the loss scale "
            f"is now {_loss_scale(state.loss_scale)}. Train for more steps, or in bfloat16"
        )
    progress.save(state)
    if checkpoints is not None:
        checkpoints.wait()
    return TrainResult(state, reason, num_skipped)


def _loss_scale(scale: DynamicScale | None) -> str:
    return "none" if scale is None else f"{float(scale.scale):g}"


class _Progress:
    """Reports every step while the next one is computed, and saves what was reported."""

    def __init__(self, step, record, batch_tokens, checkpoints, on_step) -> None:
        self._saved, self._record, self._batch_tokens = step, record, batch_tokens
        self._checkpoints, self._on_step = checkpoints, on_step
        self._began, self._waiting = time.perf_counter(), None

    def add(self, step: int, metrics: StepMetrics) -> None:
        """Remembers a step that is being computed; reports the one before."""
        self.settle()
        self._waiting = step, metrics

    def settle(self) -> None:
        """Reports the step that is being computed, which waits for it."""
        if self._waiting is None:
            return
        (step, metrics), self._waiting = self._waiting, None
        report, self._began = _report(step, metrics, self._batch_tokens, self._began)
        _check_finite(report, metrics)
        self._on_step(report)

    def save(self, state: TrainState) -> None:
        """Saves a state of the whole model, unless that step is saved already."""
        step = int(state.step)
        if self._checkpoints is not None and step != self._saved:
            self._checkpoints.save(state, self._record | {"step": step})
            self._saved = step


def _check_finite(report: StepReport, metrics: StepMetrics) -> None:
    """Whether to continue: weights are finite, and a smaller loss scale may end an overflow."""
    if not math.isfinite(report.loss):
        raise ValueError(f"the loss of step {report.step} is {report.loss}")
    if report.is_skipped:
        assert metrics.loss_scale is not None
        if (scale := float(metrics.loss_scale)) <= 1:
            raise ValueError(
                f"the float16 gradients of step {report.step} overflow at a loss scale of "
                f"{scale:g}, and {report.num_skipped} steps were skipped: train in bfloat16"
            )
    elif not math.isfinite(report.grad_norm):
        raise ValueError(f"the gradients' norm of step {report.step} is {report.grad_norm}")


def _begun(driver: Driver, seed: int, params: Params | ParamsLoader | None) -> TrainState:
    """The state before the first step."""
    placed = {"mesh": driver.mesh, "rules": driver.joined_rules}
    params = params(driver.joined_rules) if callable(params) else params
    key = jax.random.key(seed)
    return init_state(key, driver.config, recipe=driver.recipe, params=params, **placed)


def _record(config, recipe, data, seed) -> dict[str, Any]:
    """What must be equal in a run that resumes this one, as JSON returns it."""
    record = {
        "config": dataclasses.asdict(config),
        "recipe": dataclasses.asdict(recipe),
        "data": data.fingerprint(),
        "seed": seed,
    }
    return json.loads(json.dumps(record))


def _resumed(checkpoints, record, driver: Driver, resume: bool, on_notice) -> TrainState | None:
    """The newest saved state that is not damaged; None if none was saved."""
    if checkpoints is None or not of_first_process(len(found := checkpoints.steps())):
        return None
    if not resume:
        raise ValueError(
            f"{checkpoints.folder} holds step {', '.join(map(str, found))}: resume (--resume), or "
            "train elsewhere (--out)"
        )

    def check(saved: dict[str, Any]) -> None:
        for name, found, wanted in _differences(saved, record):
            raise ValueError(f"{checkpoints.folder} was trained with {name} {found}, not {wanted}")

    placed = {"mesh": driver.mesh, "rules": driver.joined_rules}
    like = abstract_state(driver.config, recipe=driver.recipe, **placed)
    restored = checkpoints.restore(like, check=check)
    for reason in restored.damaged:
        on_notice(reason)
    on_notice(f"resuming after step {int(restored.state.step)}")
    planned, wanted = restored.record["recipe"]["num_steps"], driver.recipe.num_steps
    if planned != wanted:
        on_notice(f"the learning rate now follows a schedule of {wanted} steps, not of {planned}")
    return restored.state


def _differences(saved: Any, wanted: Any, name: str = "") -> list[tuple[str, Any, Any]]:
    """Name, saved and wanted value of everything in `wanted` that differs from what was saved."""
    if isinstance(saved, dict) and isinstance(wanted, dict):
        return [
            difference
            for key in wanted
            if f"{name}.{key}" not in {f".recipe.{field}" for field in _MAY_CHANGE}
            for difference in _differences(saved.get(key), wanted[key], f"{name}.{key}")
        ]
    return [] if saved == wanted else [(name.removeprefix("."), saved, wanted)]


def _report(
    step: int, metrics: StepMetrics, batch_tokens: int, began: float
) -> tuple[StepReport, float]:
    loss, load = float(metrics.loss), metrics.load  # waits for the step
    now = time.perf_counter()
    largest = None
    if load is not None and load.any():
        largest = float((load.max(axis=-1).astype("float32") / load.mean(axis=-1)).max())
    seconds = now - began
    report = StepReport(
        step=step,
        loss=loss,
        grad_norm=float(metrics.grad_norm),
        learning_rate=float(metrics.learning_rate),
        num_tokens=int(metrics.num_tokens),
        is_skipped=bool(metrics.is_skipped),
        num_skipped=int(metrics.num_skipped),
        largest_load=largest,
        num_dropped=None if metrics.num_dropped is None else int(metrics.num_dropped),
        seconds=seconds,
        tokens_per_second=batch_tokens / seconds,
    )
    return report, now
