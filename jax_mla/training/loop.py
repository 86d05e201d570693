"""The training loop: steps, reports, checkpoints, and going on where a run was stopped."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable
from typing import Any, Literal

import jax
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

# Fields of a recipe that a resumed run may have otherwise: how far it goes, how its sums are cut
# into parts, and whether a GPU adds them up in one order.
_MAY_CHANGE = {"num_steps", "num_micro_batches", "remat", "chunk_tokens", "deterministic"}


@dataclasses.dataclass(frozen=True)
class StepReport:
    """One step in numbers of Python.

    Attributes:
      step: counted from 1.
      loss: in nats a token.
      num_tokens: tokens whose prediction was counted.
      seconds: since the report before; of the first step, since it began, compilation included.
      tokens_per_second: of all tokens of the batch.
      largest_load: tokens of the busiest expert over the mean, in the worst layer; None without
        experts.
      num_dropped: (token, expert) pairs left out for want of capacity; None without a capacity.
    """

    step: int
    loss: float
    grad_norm: float
    learning_rate: float
    num_tokens: int
    is_skipped: bool
    largest_load: float | None
    num_dropped: int | None
    seconds: float
    tokens_per_second: float


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """The last state, and whether the run came to its end or was asked to stop."""

    state: TrainState
    reason: Literal["finished", "stopped"]


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
    """Trains for `recipe.num_steps` batches; a run that was interrupted goes on where it was.

    On a CPU equal calls give equal bits, interrupted or not; on a GPU the last bits may vary, see
    `Recipe.deterministic`.

    Args:
      data: batch i is that of step i.
      seed: of the initial weights.
      params: weights to start from instead; or a function that loads them, given the rules by
        which the state lies on the mesh. It is called where a run begins, not where one resumes.
      mesh: one with stages is driven as a pipeline, of `recipe.num_micro_batches`. It holds the
        state a second time when a run begins, is saved and ends, by `Pipeline.joined_rules`.
      pipeline_schedule: of its stages, `pipeline.gpipe`, `pipeline.one_f_one_b` or your own; None
        takes the second.
      checkpoints: where to save every `save_every` steps and at the end; None does not save.
      resume: goes on from the newest whole step of `checkpoints`, on any mesh; begins anew where
        there is none.
      on_begin: is called once, with the steps that are done, when everything was checked and the
        first step is about to be computed.
      on_step: is called once for every step, while the next one is computed.
      on_notice: is told from where a run resumes, and of steps that were damaged.
      should_stop: asked after every step; True in any process saves and returns.

    Raises:
      ValueError: the folder holds steps and `resume` is False; the config, recipe or data are not
        those of the saved run (both values are named); the data are not for the config or cannot
        be divided over the mesh; or the loss or the gradients' norm is not finite, in which case
        nothing is saved after the last good step.
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
    progress.save(state)
    if checkpoints is not None:
        checkpoints.wait()
    return TrainResult(state, reason)


class _Progress:
    """Reports every step while the next one is computed, and saves what was reported."""

    def __init__(self, step, record, batch_tokens, checkpoints, on_step) -> None:
        self._saved, self._record, self._batch_tokens = step, record, batch_tokens
        self._checkpoints, self._on_step = checkpoints, on_step
        self._began, self._waiting = time.perf_counter(), None

    def add(self, step: int, metrics: StepMetrics) -> None:
        """Takes note of a step that is being computed; reports the one before."""
        self.settle()
        self._waiting = step, metrics

    def settle(self) -> None:
        """Reports the step that is being computed, which waits for it."""
        if self._waiting is None:
            return
        (step, metrics), self._waiting = self._waiting, None
        report, self._began = _report(step, metrics, self._batch_tokens, self._began)
        for name, value in (("loss", report.loss), ("gradients' norm", report.grad_norm)):
            if not (math.isfinite(value) or report.is_skipped):
                raise ValueError(f"the {name} of step {step} is {value}")
        self._on_step(report)

    def save(self, state: TrainState) -> None:
        """Saves a state of the whole model, unless that was done."""
        step = int(state.step)
        if self._checkpoints is not None and step != self._saved:
            self._checkpoints.save(state, self._record | {"step": step})
            self._saved = step


def _begun(driver: Driver, seed: int, params: Params | ParamsLoader | None) -> TrainState:
    """The state before the first step."""
    placed = {"mesh": driver.mesh, "rules": driver.joined_rules}
    params = params(driver.joined_rules) if callable(params) else params
    key = jax.random.key(seed)
    return init_state(key, driver.config, recipe=driver.recipe, params=params, **placed)


def _record(config, recipe, data, seed) -> dict[str, Any]:
    """What must be equal in a run that resumes this one, as it will read back from JSON."""
    record = {
        "config": dataclasses.asdict(config),
        "recipe": dataclasses.asdict(recipe),
        "data": data.fingerprint(),
        "seed": seed,
    }
    return json.loads(json.dumps(record))


def _resumed(checkpoints, record, driver: Driver, resume: bool, on_notice) -> TrainState | None:
    """The newest state that was saved and is whole; None where none was saved."""
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
    """Name, saved and wanted value of everything in `wanted` that was saved otherwise."""
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
    largest = None if load is None else float((load.max(axis=-1) / load.mean(axis=-1)).max())
    seconds = now - began
    report = StepReport(
        step=step,
        loss=loss,
        grad_norm=float(metrics.grad_norm),
        learning_rate=float(metrics.learning_rate),
        num_tokens=int(metrics.num_tokens),
        is_skipped=bool(metrics.is_skipped),
        largest_load=largest,
        num_dropped=None if metrics.num_dropped is None else int(metrics.num_dropped),
        seconds=seconds,
        tokens_per_second=batch_tokens / seconds,
    )
    return report, now
