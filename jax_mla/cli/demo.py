"""`jax-mla demo`: the bundled model continues a few prompts, offline."""

import argparse
import importlib.resources
import sys
import time
from pathlib import Path

from jax_mla.cli import report
from jax_mla.cli.arguments import positive
from jax_mla.text import Completion, complete, load_tokenizer

PROMPT = "And it came to pass"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--prompt", action="append", help=f"may be repeated; {PROMPT!r} without it")
    parser.add_argument(
        "--max-new-tokens", type=positive, default=200, metavar="N", help="default 200"
    )
    parser.add_argument("--temperature", type=float, default=0.7, help="0.7; 0 is greedy")
    parser.add_argument("--seed", type=int, default=0, help="of sampling (0)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Generates twice: the first time compiles, the second one is timed."""
    if sys.stderr.isatty():
        print("loading and compiling the model", file=sys.stderr)
    import jax

    import jax_mla
    from jax_mla.analysis import cache_bytes_per_token

    with importlib.resources.as_file(importlib.resources.files("jax_mla") / "demo/model") as path:
        params, config = jax_mla.load(path)
        tokenizer = load_tokenizer(Path(path), config)
    prompts = args.prompt or [PROMPT]
    options = {
        "max_new_tokens": args.max_new_tokens,
        "temperature": args.temperature,
        "key": args.seed,
    }

    def timed() -> tuple[list[Completion], float]:
        start = time.perf_counter()
        completions = complete(params, config, tokenizer, prompts, **options)
        return completions, time.perf_counter() - start

    _, seconds_with_compilation = timed()
    completions, seconds = timed()
    cache = cache_bytes_per_token(config)
    results = {
        "completions": [report.completion(one) for one in completions],
        "tokens_per_second": sum(len(one.tokens) for one in completions) / seconds,
        "compile_seconds": max(0.0, seconds_with_compilation - seconds),
        "cache_bytes_per_token": cache,
        "device": jax.devices()[0].device_kind,
    }
    if args.json:
        report.print_json(results)
        return 0
    for one in completions:
        print(f"{one.prompt}{one.text}\n")
    print(
        f"{results['tokens_per_second']:,.0f} tokens/s on {results['device']}, "
        f"after {results['compile_seconds']:.1f} s of compilation"
    )
    print(
        f"cache: {cache['latent']:,} bytes per token; multi-head attention with the same "
        f"{config.num_attention_heads} heads needs {cache['mha']:,}, "
        f"{cache['ratio']:.1f} times as much"
    )
    return 0
