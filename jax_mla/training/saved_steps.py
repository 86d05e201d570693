"""Checkpoints of a training run: whole or absent, and never restored when damaged."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from jax_mla.checkpoint.files import flush
from jax_mla.training.manifest import find_damage, write_manifest
from jax_mla.training.processes import is_first_process, of_first_process, wait_for_all
from jax_mla.training.state import TrainState

_STEP = re.compile(r"step_(\d{8,})")
_ARRAYS, _RECORD = "arrays", "record.json"


@dataclasses.dataclass(frozen=True)
class Restored:
    """A state and the record that was saved with it.

    Attributes:
      damaged: why each newer step was skipped, newest first; only in the first process.
    """

    state: TrainState
    record: dict[str, Any]
    damaged: tuple[str, ...]


class Checkpoints:
    """The steps saved in one folder, each in `step_00000010/`: arrays, a record, a manifest.

    A step is written to a hidden folder, listed in a manifest with sizes and checksums, flushed to
    disk, and renamed to its final name: a kill at any time leaves earlier steps undamaged. Several
    processes write their shards to one folder that all of them see. Use as a context manager, or
    call `wait` before the program ends.

    Args:
      keep: how many of the newest steps to keep; 1 leaves nothing to fall back to.
      in_background: `save` returns once the arrays are copied to the host.

    Raises:
      ValueError: keep is below 1.
    """

    def __init__(
        self, folder: str | os.PathLike[str], *, keep: int = 3, in_background: bool = False
    ) -> None:
        if keep < 1:
            raise ValueError(f"keep must be at least 1, got {keep}")
        import orbax.checkpoint as ocp  # slow, and needed by nothing else here

        self.folder = Path(folder).absolute()
        self._keep, self._in_background = keep, in_background
        self._orbax = ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler())
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.wait()
        finally:
            self._orbax.close()

    def steps(self) -> list[int]:
        """Numbers of the saved steps, oldest first, damaged ones included."""
        if not self.folder.is_dir():
            return []
        matches = (_STEP.fullmatch(path.name) for path in self.folder.iterdir())
        return sorted(int(match[1]) for match in matches if match)

    def save(self, state: TrainState, record: dict[str, Any]) -> None:
        """Saves a state under its step, replacing a saved state of the same step.

        Args:
          record: JSON that is saved with the step.

        Raises:
          Exception: whatever a save in the background raised since the last call.
        """
        import orbax.checkpoint as ocp

        self.wait()
        step = int(state.step)
        partial = self.folder / f".step_{step:08}.partial"
        if is_first_process():
            self.folder.mkdir(parents=True, exist_ok=True)
            self._remove_leftovers()
            partial.mkdir()
            (partial / _RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        wait_for_all(f"step {step} has a folder")
        self._orbax.save(partial / _ARRAYS, args=ocp.args.PyTreeSave(_by_name(state)))
        self._thread = threading.Thread(target=self._finish, args=(partial, step))
        self._thread.start()
        if not self._in_background:
            self.wait()

    def wait(self) -> None:
        """Returns when the last save is on disk; raises whatever the save raised."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
            wait_for_all("the last step is saved")
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def restore(
        self, like: TrainState, *, check: Callable[[dict[str, Any]], None] = lambda record: None
    ) -> Restored:
        """Restores the newest step that is not damaged.

        Args:
          like: from `abstract_state`: shapes, dtypes and shardings to restore.
          check: takes the record before the arrays are read, and may refuse it with an exception.

        Raises:
          FileNotFoundError: the folder has no steps.
          ValueError: every step is damaged (all reasons are listed), or the newest undamaged one
            does not hold the arrays of `like`.
        """
        self.wait()
        step, damaged = self._newest_whole() if is_first_process() else (None, [])
        step = of_first_process(-1 if step is None else step)
        if step >= 0:
            path = self._path(step)
            record = json.loads((path / _RECORD).read_text(encoding="utf-8"))
            check(record)
            return Restored(self._load(path, like), record, tuple(damaged))
        if damaged:
            raise ValueError(f"no step can be restored: {'; '.join(damaged)}")
        raise FileNotFoundError(f"{self.folder} holds no whole steps")

    def _newest_whole(self) -> tuple[int | None, list[str]]:
        """The newest undamaged step, and why newer ones were skipped."""
        damaged = []
        for step in reversed(self.steps()):
            if (reason := find_damage(self._path(step))) is None:
                return step, damaged
            damaged.append(f"{self._path(step)} is damaged: {reason}")
        return None, damaged

    def _path(self, step: int) -> Path:
        return self.folder / f"step_{step:08}"

    def _load(self, path: Path, like: TrainState) -> TrainState:
        import orbax.checkpoint as ocp

        first = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        wanted = {
            name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding or first)
            for name, x in _by_name(like).items()
        }
        found: Any = self._orbax.metadata(path / _ARRAYS).item_metadata
        found = found.tree
        for name in sorted(found.keys() ^ wanted.keys()):
            if name in wanted:
                raise ValueError(f"{path} does not hold {name}, which this run's state has")
            raise ValueError(f"{path} holds {name}, which this run's state does not have")
        for name, x in wanted.items():
            if tuple(found[name].shape) != x.shape or found[name].dtype != x.dtype:
                raise ValueError(
                    f"{name} of {path} is {found[name].dtype} {list(found[name].shape)}, "
                    f"expected {x.dtype} {list(x.shape)}"
                )
        options = ocp.checkpoint_utils.construct_restore_args(wanted)
        arrays = self._orbax.restore(
            path / _ARRAYS, args=ocp.args.PyTreeRestore(item=wanted, restore_args=options)
        )
        return jax.tree.unflatten(jax.tree.structure(like), [arrays[name] for name in wanted])

    def _finish(self, partial: Path, step: int) -> None:
        try:
            self._orbax.wait_until_finished()
            if is_first_process():
                self._publish(partial, step)
        except BaseException as error:
            self._error = error

    def _publish(self, partial: Path, step: int) -> None:
        write_manifest(partial)
        if self._path(step).exists():  # saved before a fall back to an earlier step
            self._path(step).rename(self.folder / f".step_{step:08}.replaced")
        partial.rename(self._path(step))
        flush(self.folder)
        for old in self.steps()[: -self._keep]:
            # Hidden first, so that a half-deleted folder is never taken for a step.
            self._path(old).rename(self.folder / f".step_{old:08}.removed")
        self._remove_leftovers()

    def _remove_leftovers(self) -> None:
        for path in self.folder.glob(".step_*"):
            shutil.rmtree(path)


def _by_name(state: TrainState) -> dict[str, Any]:
    """The arrays of a state in a flat dict, in the order of its leaves."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path, simple=True, separator="."): x for path, x in leaves}
