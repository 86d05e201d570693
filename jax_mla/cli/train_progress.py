"""Progress of a training run: a bar or lines, and a file of JSON lines."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from jax_mla.config.model import DeepSeekConfig

if TYPE_CHECKING:
    from rich.progress import Progress

    from jax_mla.training import StepReport

_NUM_LINES = 20  # per run, where the output is not a terminal


class Metrics:
    """Writes every step to `file`, and shows it: a bar on a terminal, some lines elsewhere.

    A resumed run removes the lines of the steps that it computes again from the file. Of several
    processes only the first one writes.
    """

    def __init__(
        self, file: Path, config: DeepSeekConfig, row_tokens: int, num_steps: int, is_quiet: bool
    ) -> None:
        import jax

        from jax_mla.analysis.flops import flops_per_token

        self._is_first_process = jax.process_index() == 0
        self._path, self._num_steps, self._is_quiet = file, num_steps, is_quiet
        self._flops_per_token = flops_per_token(config, row_tokens)
        self._peak = _peak_flops()
        self._rows: list[dict[str, Any]] = []
        self._file: TextIO | None = None
        self._bar: Progress | None = None

    def __enter__(self) -> Metrics:
        if sys.stderr.isatty() and self._is_first_process and not self._is_quiet:
            self._bar = _open_bar(self._num_steps)
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.live.transient = not self._rows  # a refused run leaves no bar
            self._bar.stop()
        if self._file is not None:
            self._file.close()

    def add(self, step: StepReport) -> None:
        row = dataclasses.asdict(step) | {"mfu": self._mfu(step.tokens_per_second)}
        if step.is_skipped:  # JSON has no infinity
            row["grad_norm"] = None
        self._rows.append(row)
        if not self._is_first_process:
            return
        file = self._file or self._begin(step.step)
        file.write(json.dumps(row) + "\n")
        file.flush()
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=step.step, text=_text(row))
        elif not self._is_quiet and self._is_shown(step.step):
            print(f"step {step.step:>{len(str(self._num_steps))}}  {_text(row)}", flush=True)

    def say(self, text: str) -> None:
        """Shows a line where the steps are shown, above the bar or the lines."""
        if not self._is_first_process or self._is_quiet:
            return
        if self._bar is not None:
            self._bar.console.print(text, highlight=False)
        else:
            print(text, flush=True)

    def notice(self, text: str) -> None:
        if self._is_first_process:
            print(text, file=sys.stderr, flush=True)

    def summary(self) -> dict[str, Any]:
        """The last loss, and the speed of all steps but the first, which compiles."""
        later = self._rows[1:]
        seconds = sum(row["seconds"] for row in later)
        tokens = sum(row["tokens_per_second"] * row["seconds"] for row in later)
        speed = tokens / seconds if later else None
        return {
            "loss": self._rows[-1]["loss"] if self._rows else None,
            "tokens_per_second": speed,
            "mfu": None if speed is None else self._mfu(speed),
        }

    def _begin(self, first_step: int) -> TextIO:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        lines = self._path.read_text().splitlines() if self._path.exists() else []
        kept = [line for line in lines if _step_of(line) < first_step]
        # A file of its own until it is whole, so that a kill loses no rows.
        partial = self._path.with_name(f".{self._path.name}.partial")
        partial.write_text("".join(f"{line}\n" for line in kept))
        partial.replace(self._path)
        self._file = self._path.open("a", encoding="utf-8")
        return self._file

    def _mfu(self, tokens_per_second: float) -> float | None:
        return self._flops_per_token * tokens_per_second / self._peak if self._peak else None

    def _is_shown(self, step: int) -> bool:
        return step in (1, self._num_steps) or step % max(self._num_steps // _NUM_LINES, 1) == 0


def _peak_flops() -> float | None:
    """Peak FLOP/s of all devices together; None where unknown."""
    import jax

    from pallas_kernels.hardware import peak

    found = peak()
    return None if found is None else found.bf16_flops * jax.device_count()


def _step_of(line: str) -> float:
    """The step of a line; infinity for a line that a kill left incomplete, which is not kept."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")


def _text(row: dict[str, Any]) -> str:
    mfu = "" if row["mfu"] is None else f"  {row['mfu']:.1%} MFU"
    dropped = f"  {row['num_dropped']:,} choices dropped" if row["num_dropped"] else ""
    num_skipped = row["num_skipped"]
    skipped = f"  {num_skipped:,} of {row['step']:,} steps skipped" if num_skipped else ""
    speed = f"{row['tokens_per_second']:,.0f} tokens/s"
    return f"loss {row['loss']:.4f}  {speed}{mfu}{dropped}{skipped}"


def _open_bar(num_steps: int) -> Progress:
    from rich import progress
    from rich.console import Console

    bar = progress.Progress(
        progress.TextColumn("step"),
        progress.MofNCompleteColumn(),
        progress.BarColumn(),
        progress.TextColumn("{task.fields[text]}"),
        progress.TimeRemainingColumn(),
        console=Console(stderr=True),
    )
    bar.start()
    bar.add_task("train", total=num_steps, text="compiling")
    return bar
