"""`jax-mla train`: trains a model on files of text or tokens, and goes on where it was stopped."""

import argparse
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jax_mla.cli import layout, processes, report
from jax_mla.cli.completion import positive
from jax_mla.cli.train_progress import Metrics
from jax_mla.config.model import DeepSeekConfig
from jax_mla.config.presets import tiny

if TYPE_CHECKING:
    from jax_mla.training import Recipe


def add_arguments(parser: argparse.ArgumentParser) -> None:
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--config", metavar="FILE", help="config.json of a new model, or `tiny`")
    model.add_argument("--model", type=Path, metavar="DIR", help="checkpoint folder to start from")
    parser.add_argument(
        "--data", type=Path, nargs="+", required=True, metavar="PATH",
        help="text files, or .npy files of uint16 or uint32 token ids",
    )  # fmt: skip
    parser.add_argument("--tokenizer", type=Path, metavar="DIR", help="folder of a tokenizer.json")
    parser.add_argument(
        "--separate-documents", action="store_true", help="tokens see their own document only"
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="checkpoints, metrics, the model"
    )
    parser.add_argument("--resume", action="store_true", help="go on from the newest whole step")
    parser.add_argument(
        "--steps", type=positive, required=True, help="of the whole run, and of its schedule"
    )
    parser.add_argument("--batch", type=positive, required=True, help="rows of a step")
    parser.add_argument("--seq", type=positive, required=True, help="tokens of a row")
    parser.add_argument(
        "--micro-batches", type=positive, default=1, metavar="N",
        help="parts of a batch that are computed one after the other (1)",
    )  # fmt: skip
    parser.add_argument("--lr", type=float, default=3e-4, help="highest learning rate (3e-4)")
    parser.add_argument("--final-lr", type=float, default=0.0, help="of the last step (0)")
    parser.add_argument(
        "--schedule", choices=("cosine", "wsd"), default="cosine",
        help="how the rate falls: along a cosine (default), or in the last steps only",
    )  # fmt: skip
    parser.add_argument("--warmup", type=int, metavar="STEPS", help="1 %% of the steps without it")
    parser.add_argument("--decay", type=int, metavar="STEPS", help="of wsd; 20 %% without it")
    parser.add_argument(
        "--optimizer", choices=("adamw", "muon"), default="adamw",
        help="adamw (default), or muon for matrices and adamw for the rest",
    )  # fmt: skip
    parser.add_argument("--weight-decay", type=float, default=0.1, help="of matrices (0.1)")
    parser.add_argument("--z-loss", type=float, default=0.0, help="its factor (0)")
    parser.add_argument("--balance-loss", type=float, default=0.0, help="its factor (0)")
    parser.add_argument("--router-bias-rate", type=float, default=1e-3, help="a step (1e-3)")
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float32", "float16"), default="bfloat16",
        help="of the computation; weights and their optimizer stay float32",
    )  # fmt: skip
    parser.add_argument(
        "--remat", choices=("none", "dots", "full"), default="none",
        help="what the backward pass computes again: nothing (default), all but matmuls, blocks",
    )  # fmt: skip
    parser.add_argument(
        "--deterministic", action="store_true",
        help="attention's gradients are the same bits every time, also on Hopper GPUs",
    )  # fmt: skip
    layout.add_arguments(parser, has_stages=True)
    parser.add_argument(
        "--pipeline", choices=("1f1b", "gpipe"),
        help="in which order the stages of --mesh stage=N take the micro-batches (1f1b)",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="of weights and order of rows (0)")
    parser.add_argument(
        "--save-every", type=positive, default=1000, metavar="STEPS", help="default 1000"
    )
    parser.add_argument("--keep", type=positive, default=3, help="saved steps to keep (3)")
    parser.add_argument(
        "--export-dtype", choices=("float32", "bfloat16"), default="float32",
        help="of the model that a finished run leaves; its router's bias stays float32",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    processes.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Trains until the end or a signal; either way the last step is saved."""
    processes.join(args)
    mesh, rules = layout.build(args)
    import jax

    from jax_mla.training import Checkpoints, TokenRows, read_tokens, train

    recipe, schedule, config = _recipe(args), _schedule(args, mesh), _config(args)
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
            params=_loader(args.model, mesh),
            mesh=mesh,
            rules=rules,
            pipeline_schedule=schedule,
            checkpoints=checkpoints,
            save_every=args.save_every,
            resume=args.resume,
            on_step=metrics.add,
            on_notice=metrics.notice,
            should_stop=signals.came,
        )
    stopped_by = signals.name or "another process"
    summary = {
        "reason": stopped_by if result.reason == "stopped" else "finished",
        "step": int(result.state.step),
        "skipped_steps": int(result.state.num_skipped),
        **metrics.summary(),
        "checkpoints": str(args.out / "checkpoints"),
        "model": None,
        "device": jax.devices()[0].device_kind,
    }
    if result.reason == "finished":
        summary["model"] = _export(result.state.params, config, args, summary["step"])
    if processes.is_first():
        _print(summary, args.json)
    return 0


def _export(params: Any, config: DeepSeekConfig, args: argparse.Namespace, step: int) -> str:
    """The folder of the trained model, which the first process writes unless it is there."""
    import jax_mla
    from jax_mla.training import Precision
    from jax_mla.training.processes import gathered, of_first_process

    folder = args.out / f"model_{step:08}"
    if not of_first_process(folder.exists()):
        params = gathered(Precision(param=args.export_dtype).to_param(params))
        if params is not None:
            jax_mla.save(folder, params, config)
    return str(folder)


class Signals:
    """Notices Ctrl-C and SIGTERM instead of dying of them; the second one is obeyed at once."""

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


def _recipe(args: argparse.Namespace) -> "Recipe":
    from jax_mla.training import Precision, Recipe

    return Recipe(
        num_steps=args.steps,
        optimizer=args.optimizer,
        schedule=args.schedule,
        learning_rate=args.lr,
        final_learning_rate=args.final_lr,
        warmup_steps=args.warmup,
        decay_steps=args.decay,
        weight_decay=args.weight_decay,
        z_loss=args.z_loss,
        balance_loss=args.balance_loss,
        router_bias_rate=args.router_bias_rate,
        num_micro_batches=args.micro_batches,
        remat=args.remat,
        deterministic=args.deterministic,
        precision=Precision(compute=args.dtype),
    )


def _loader(folder: Path | None, mesh: Any) -> Any:
    """What reads the weights of --model, for a run that begins; None without it."""
    if folder is None:
        return None
    import jax_mla

    return lambda rules: jax_mla.load(folder, mesh=mesh, rules=rules)[0]


def _schedule(args: argparse.Namespace, mesh: Any) -> Any:
    """The schedule that --pipeline names; None without it."""
    if args.pipeline is None:
        return None
    if mesh is None or mesh.shape["stage"] == 1:
        raise ValueError(f"--pipeline {args.pipeline} orders stages, and --mesh names none")
    from jax_mla.training import pipeline

    return {"1f1b": pipeline.one_f_one_b, "gpipe": pipeline.gpipe}[args.pipeline]


def _config(args: argparse.Namespace) -> DeepSeekConfig:
    from jax_mla.checkpoint.folder import open_folder, read_config, read_json

    if args.model is not None:
        # Weights that are missing are missed before the data are read, and not where a run resumes.
        found = read_config(args.model) if args.resume else open_folder(args.model).config
        return DeepSeekConfig.from_hf(found)
    if args.config == "tiny":
        return tiny()
    if not (file := Path(args.config)).is_file():
        raise FileNotFoundError(f"--config takes a config.json or `tiny`, and {file} is no file")
    return DeepSeekConfig.from_hf(read_json(file))


def _tokenizer(args: argparse.Namespace, config: DeepSeekConfig) -> Any:
    """The tokenizer of the given folder, or that of the model; None where all data are tokens."""
    from jax_mla.text.tokenizer import ByteTokenizer, load_tokenizer

    if all(path.suffix == ".npy" for path in args.data):
        return None
    if args.config == "tiny" and args.tokenizer is None:
        return ByteTokenizer()
    return load_tokenizer(args.tokenizer or args.model or Path(args.config).parent, config)


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
        print(f"saved in {summary['checkpoints']}; --resume goes on from there")
