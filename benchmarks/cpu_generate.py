"""Greedy cached decoding on a CPU: jax_mla against transformers, on one random checkpoint.

    python benchmarks/cpu_generate.py --torch-python /path/to/python/with/torch

Both sides run in their own process, pinned to the same cores, and take turns. Tokens must be
equal before anything is timed. The table goes to benchmarks/results/cpu_generate.md.
"""

import argparse
import contextlib
import datetime
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PROMPT, NEW = 128, 128
BATCHES = (1, 8)
# DeepSeek-V2-Lite at a quarter of its width, with 8 layers and 16 experts, 4 active. Latent, heads
# and the size of a head are the published ones; --heads 4 makes attention a quarter as wide too.
SHAPE = dict(
    vocab_size=25600,
    hidden_size=512,
    intermediate_size=2736,
    moe_intermediate_size=352,
    num_hidden_layers=8,
    num_attention_heads=16,
    q_lora_rank=None,
    kv_lora_rank=512,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    n_routed_experts=16,
    n_shared_experts=2,
    num_experts_per_tok=4,
    first_k_dense_replace=1,
    initializer_range=0.05,
)


def write_checkpoint(folder):
    import torch
    from transformers import DeepseekV2Config, DeepseekV2ForCausalLM

    torch.manual_seed(0)
    DeepseekV2ForCausalLM(DeepseekV2Config(**SHAPE)).float().save_pretrained(folder)


def torch_side(folder, threads):
    """Returns versions, and a function from prompts to the tokens that follow them."""
    import torch
    import transformers

    torch.set_num_threads(threads)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None  # never stops early

    def generate(prompts):
        ids = torch.tensor(prompts)
        options = dict(max_new_tokens=NEW, do_sample=False, pad_token_id=0)
        out = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        return out[:, PROMPT:].tolist()

    return f"torch {torch.__version__}, transformers {transformers.__version__}", generate


def jax_side(folder):
    """The same for jax_mla. XLA takes as many threads as the process has cores."""
    import flax
    import jax
    import jax.numpy as jnp

    import jax_mla

    params, config = jax_mla.load(folder)

    def generate(prompts):
        tokens = jnp.array(prompts, jnp.int32)
        out = jax_mla.generate(params, config, tokens, max_new_tokens=NEW, eos_token_ids=())
        return out.tokens.tolist()

    return f"jax {jax.__version__}, flax {flax.__version__}", generate


def serve(side, folder, threads):
    """The worker: a line of versions, then a timed answer for each line of prompts."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    answers, sys.stdout = sys.stdout, sys.stderr  # libraries may print; answers stay clean
    versions, generate = torch_side(folder, threads) if side == "torch" else jax_side(folder)
    print(json.dumps(versions), file=answers, flush=True)
    for line in sys.stdin:
        prompts = json.loads(line)
        start = time.perf_counter()
        tokens = generate(prompts)
        seconds = time.perf_counter() - start
        print(json.dumps({"seconds": seconds, "tokens": tokens}), file=answers, flush=True)


@contextlib.contextmanager
def worker(python, side, folder, threads):
    """A process that serves one side: yields its versions and a function that asks it."""
    env = os.environ | {"OMP_NUM_THREADS": str(threads), "JAX_PLATFORMS": "cpu"}
    command = [python, __file__, "--serve", side, folder, "--threads", str(threads)]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with subprocess.Popen(command, env=env, **pipes) as process:

        def answer():
            if not (line := process.stdout.readline()):
                raise SystemExit(f"the {side} worker ended with status {process.wait()}")
            return json.loads(line)

        def ask(prompts):
            print(json.dumps(prompts), file=process.stdin, flush=True)
            return answer()

        yield answer(), ask
        process.stdin.close()


def compare(ask, batch, runs):
    """Seconds of every run and side at one batch size, after a warm-up that compares tokens."""
    chance = random.Random(0)  # with these prompts no routing or argmax decision is a near tie
    prompts = [[chance.randrange(SHAPE["vocab_size"]) for _ in range(PROMPT)] for _ in range(batch)]
    tokens = {side: ask[side](prompts)["tokens"] for side in ask}
    if any(other != tokens["torch"] for other in tokens.values()):
        raise SystemExit(f"batch {batch}: the two sides generate different tokens; not timed")
    seconds = {side: [] for side in ask}
    for _ in range(runs):
        for side in ask:
            time.sleep(0.5)  # lets the other side's spinning threads go to sleep
            seconds[side].append(ask[side](prompts)["seconds"])
    return seconds


def cpu_name():
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((x.split(": ")[1] for x in lines if x.startswith("model name")), platform.machine())


def report(versions, threads, timed):
    """The results as a Markdown page; `timed` maps a batch size to the seconds of both sides."""
    lines = [
        "# Greedy cached decoding on a CPU: jax_mla against transformers\n",
        f"`python benchmarks/cpu_generate.py --torch-python ...` on {datetime.date.today()}; "
        f"{cpu_name()}, {threads} threads; Python {platform.python_version()}, {versions}.",
        f"Float32, prompt {PROMPT}, {NEW} new tokens, random weights and prompts, equal tokens on "
        "both sides. The shortest of the runs listed, taken in turns; other work on the machine "
        "only adds to a run, which is one `generate`, with its prefill.\n",
        f"Shape: `{json.dumps(SHAPE)}`\n",
        "| batch | transformers tokens/s | jax_mla tokens/s | ratio | seconds of each run |",
        "| --- | --- | --- | --- | --- |",
    ]
    for batch, seconds in timed.items():
        speed = {side: batch * NEW / min(seconds[side]) for side in seconds}
        theirs, ours = speed["torch"], speed.get("jax", float("nan"))
        runs = "; ".join(f"{side} {[round(s, 2) for s in seconds[side]]}" for side in seconds)
        lines.append(f"| {batch} | {theirs:.1f} | {ours:.1f} | {ours / theirs:.2f} | {runs} |")
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--torch-python", default=sys.executable, help="interpreter with torch")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--heads", type=int, default=SHAPE["num_attention_heads"])
    parser.add_argument("--runs", type=int, default=3, help="timed runs a side and batch size")
    parser.add_argument("--torch-only", action="store_true", help="print the reference's speed")
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--write", help=argparse.SUPPRESS)
    args = parser.parse_args()
    SHAPE["num_attention_heads"] = args.heads
    if args.write:
        return write_checkpoint(args.write)
    if args.serve:
        return serve(*args.serve, args.threads)

    pythons = {"torch": args.torch_python} | ({} if args.torch_only else {"jax": sys.executable})
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        write = [args.torch_python, __file__, "--write", folder, "--heads", str(args.heads)]
        subprocess.run(write, check=True)
        versions, ask = [], {}
        for side, python in pythons.items():
            found, ask[side] = stack.enter_context(worker(python, side, folder, args.threads))
            versions.append(found)
        timed = {batch: compare(ask, batch, args.runs) for batch in BATCHES}
    page = report(", ".join(versions), args.threads, timed)
    print(page)
    if not args.torch_only:
        results = Path(__file__).parent / "results"
        results.mkdir(exist_ok=True)
        (results / "cpu_generate.md").write_text(page)


if __name__ == "__main__":
    main()
