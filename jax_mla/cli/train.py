"""`jax-mla train`: trains a model on files of text or tokens, and resumes where it was stopped."""

import argparse
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jax_mla.checkpoint.folder import open_folder, read_model_config
from jax_mla.cli import layout, processes, report
from jax_mla.cli.arguments import config_folder, config_named
from jax_mla.cli.byte_progress import ByteProgress
from jax_mla.cli.train_flags import add_arguments, recipe_of
from jax_mla.cli.train_progress import Metrics
from jax_mla.config.model import DeepSeekConfig
from jax_mla.text import ByteTokenizer, load_tokenizer

if TYPE_CHECKING:
    from jax_mla.training import TokenRows

__all__ = ["add_arguments", "run"]


def run(args: argparse.Namespace) -> int:
    """Trains until the last step or a signal, and saves the step it ends with."""
    processes.join(args)
    mesh, rules = layout.build(args)
    import jax

    from jax_mla.training import Checkpoints, TokenRows, read_tokens, train

    recipe, schedule, config = recipe_of(args), _schedule(args, mesh), _config(args)
    tokenizer = _tokenizer(args, config)
    data = TokenRows(
        [read_tokens(path, config, tokenizer) for path in args.data],
        batch_rows=args.batch,
        row_tokens=args.seq,
        vocab_size=config.vocab_size,
        seed=args.seed,
        separator=_separator(args, config),
    )
    args.out.mkdir(parents=True, exist_ok=True)  # before anything takes long
    with (
        Checkpoints(args.out / "checkpoints", keep=args.keep, in_background=True) as checkpoints,
        Metrics(args.out / "metrics.jsonl", config, args.seq, args.steps, args.json) as metrics,
        Signals() as signals,
    ):
        result = train(
            config,
            recipe,
            data,
            seed=args.seed,
            params=params_loader(args.model, mesh),
            mesh=mesh,
            rules=rules,
            pipeline_schedule=schedule,
            checkpoints=checkpoints,
            save_every=args.save_every,
            resume=args.resume,
            on_begin=lambda _: metrics.say(coverage(data, args.steps)),
            on_step=metrics.add,
            on_notice=metrics.notice,
            should_stop=signals.came,
        )
    stopped_by = signals.name or "another process"
    summary = {
        "reason": stopped_by if result.reason == "stopped" else "finished",
        "step": int(result.state.step),
        "skipped_steps": result.num_skipped,
        **metrics.summary(),
        "data": {
            "files": len(data.files),
            "tokens": data.total_tokens,
            "seen": data.seen_tokens(args.steps),
        },
        "checkpoints": str(args.out / "checkpoints"),
        "model": None,
        "device": jax.devices()[0].device_kind,
    }
    if result.reason == "finished":
        summary["model"] = _export(result.state.params, config, args, summary["step"])
    if processes.is_first():
        _print(summary, args.json)
    return 0


def coverage(data: "TokenRows", num_steps: int) -> str:
    """One line on how many tokens of how many a run sees, and how often."""
    seen, passes = data.seen_tokens(num_steps), num_steps * data.batch_rows / data.num_rows
    often = f", {passes:,.1f} times" if passes > 1 else ""
    files = "1 file" if len(data.files) == 1 else f"{len(data.files):,} files"
    return f"data: {data.total_tokens:,} tokens in {files}; this run sees {seen:,} of them{often}"


def _export(params: Any, config: DeepSeekConfig, args: argparse.Namespace, step: int) -> str:
    """The folder of the trained model, which the first process writes unless it exists."""
    import jax_mla
    from jax_mla.training import Precision
    from jax_mla.training.processes import gathered, of_first_process

    folder = args.out / f"model_{step:08}"
    if not of_first_process(folder.exists()):
        params = gathered(Precision(param=args.export_dtype).to_param(params))
        if params is not None:
            with ByteProgress("Saving") as progress:
                jax_mla.save(folder, params, config, progress=progress)
    return str(folder)


class Signals:
    """Records the first Ctrl-C or SIGTERM, for the loop to stop; the second one acts at once."""

    def __init__(self) -> None:
        self.name: str | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Signals":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._notice)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def came(self) -> bool:
        return self.name is not None

    def _notice(self, number: int, _: object) -> None:
        self.name = signal.Signals(number).name
        signal.signal(number, self._before[number])
        print(f"{self.name}: saves and exits after this step; once more: at once", file=sys.stderr)


def params_loader(folder: Path | None, mesh: Any) -> Any:
    """A function that reads the weights of --model, for a new run; None without the flag."""
    if folder is None:
        return None
    import jax_mla

    def load(rules: Any) -> Any:
        with ByteProgress("Loading") as progress:
            return jax_mla.load(folder, mesh=mesh, rules=rules, progress=progress)[0]

    return load


def _schedule(args: argparse.Namespace, mesh: Any) -> Any:
    """The pipeline schedule that --pipeline names; None without the flag."""
    if args.pipeline is None:
        return None
    if mesh is None or mesh.shape["stage"] == 1:
        raise ValueError(f"--pipeline {args.pipeline} orders stages, and --mesh names none")
    from jax_mla.training import pipeline

    return {"1f1b": pipeline.one_f_one_b, "gpipe": pipeline.gpipe}[args.pipeline]


def _config(args: argparse.Namespace) -> DeepSeekConfig:
    if args.model is None:
        return config_named(args.config)
    if not args.resume:
        # Opened now so that missing weights fail before the data are read; a resumed run does not
        # need them.
        open_folder(args.model)
    return read_model_config(args.model)


def _tokenizer(args: argparse.Namespace, config: DeepSeekConfig) -> Any:
    """The tokenizer of --tokenizer or of the model's folder; None if all data are tokens."""
    if all(path.suffix == ".npy" for path in args.data):
        return None
    if args.config == "tiny" and args.tokenizer is None:
        return ByteTokenizer()
    folder = args.tokenizer or args.model or config_folder(args.config)
    if folder is None:
        raise ValueError(f"--config {args.config} brings no tokenizer: text needs --tokenizer DIR")
    return load_tokenizer(folder, config)


def _separator(args: argparse.Namespace, config: DeepSeekConfig) -> int | None:
    if not args.separate_documents:
        return None
    if not config.eos_token_id:
        raise ValueError("--separate-documents needs an eos_token_id, and the config has none")
    return config.eos_token_id[0]


def _print(summary: dict[str, Any], as_json: bool) -> None:
    if as_json:
        report.print_json(summary)
        return
    by = {"SIGINT": "Ctrl-C", "another process": "a signal to another process"}
    reason = summary["reason"]
    how = reason if reason == "finished" else f"stopped by {by.get(reason, reason)}"
    print(f"{how} after step {summary['step']}")
    if summary["model"]:
        print(f"model: {summary['model']}")
    else:
        print(f"saved in {summary['checkpoints']}; --resume continues from there")
