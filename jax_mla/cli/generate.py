"""`jax-mla generate`: continues prompts with the model of a folder."""

import argparse
import sys
import time
from pathlib import Path

from jax_mla.checkpoint.folder import read_model_config
from jax_mla.cli import layout, processes, report
from jax_mla.cli.arguments import positive
from jax_mla.cli.byte_progress import ByteProgress
from jax_mla.config.fields import DTYPES
from jax_mla.text import complete, load_tokenizer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", required=True, type=Path, metavar="DIR", help="checkpoint folder"
    )
    parser.add_argument("--prompt", required=True, action="append", help="may be repeated")
    parser.add_argument(
        "--max-new-tokens", type=positive, default=128, metavar="N", help="default 128"
    )
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (default) is greedy")
    parser.add_argument(
        "--top-k", type=positive, metavar="K", help="sample from the K likeliest tokens"
    )
    parser.add_argument(
        "--top-p", type=float, metavar="P", help="sample from the fewest tokens of probability P"
    )
    parser.add_argument(
        "--min-p",
        type=float,
        metavar="P",
        help="sample from tokens at least P times as likely as the first",
    )
    parser.add_argument("--seed", type=int, default=0, help="of sampling (0)")
    parser.add_argument("--dtype", choices=DTYPES, help="the config's without it")
    layout.add_arguments(parser)
    parser.add_argument("--stream", action="store_true", help="print text while it is generated")
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object; its times include compilation"
    )
    processes.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    if args.stream and args.json:
        raise ValueError("--stream and --json exclude each other")
    if args.stream and len(args.prompt) != 1:
        raise ValueError(f"streaming takes one prompt, got {len(args.prompt)}")
    tokenizer = load_tokenizer(args.model, read_model_config(args.model, args.dtype))
    processes.join(args)
    mesh, rules = layout.build(args)
    import jax_mla

    with ByteProgress("Loading") as progress:
        params, config = jax_mla.load(
            args.model, dtype=args.dtype, mesh=mesh, rules=rules, progress=progress
        )

    def show(text: str) -> None:
        if processes.is_first():
            print(text, end="", flush=True)

    if args.stream:
        show(args.prompt[0])
    start = time.perf_counter()
    completions = complete(
        params,
        config,
        tokenizer,
        args.prompt,
        stream=show if args.stream else None,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        key=args.seed,
        rules=rules,
    )
    seconds = time.perf_counter() - start
    num_tokens = sum(len(one.tokens) for one in completions)
    if not processes.is_first():
        return 0
    if args.json:
        results = {
            "completions": [report.completion(one) for one in completions],
            "seconds": seconds,
            "tokens_per_second": num_tokens / seconds,
        }
        report.print_json(results)
        return 0
    if args.stream:
        print()
    else:
        print("\n\n".join(one.prompt + one.text for one in completions))
    if sys.stderr.isatty():
        speed = f"{seconds:.1f} s, {num_tokens / seconds:,.1f} tokens/s"
        print(f"{num_tokens} tokens in {speed}, compilation included", file=sys.stderr)
    return 0
