"""Prompts in, continuations out: what `demo` and `generate` share."""

import argparse
import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

from jax_mla.config.model import DeepSeekConfig
from jax_mla.text.tokenizer import TextStream, Tokenizer


@dataclasses.dataclass(frozen=True)
class Completion:
    """One continued prompt."""

    prompt: str
    text: str
    num_prompt_tokens: int
    num_tokens: int  # generated, the end token included


@dataclasses.dataclass(frozen=True)
class Run:
    """The completions of one batch and the wall time that they took, compilation included."""

    completions: list[Completion]
    seconds: float

    @property
    def num_tokens(self) -> int:
        return sum(one.num_tokens for one in self.completions)

    @property
    def tokens_per_second(self) -> float:
        return self.num_tokens / self.seconds


def complete(
    params: Any,
    config: DeepSeekConfig,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    show: Callable[[str], None] | None = None,
    **options: Any,
) -> Run:
    """Continues `prompts` as one batch.

    Args:
      show: receives the only prompt and then its text piece by piece, while it is generated.
      **options: of jax_mla.generate.

    Raises:
      ValueError: a prompt without tokens, one for which the model has too few positions, or `show`
        with several prompts.
    """
    import jax.numpy as jnp
    import numpy as np

    import jax_mla

    if show is not None and len(prompts) != 1:
        raise ValueError(f"streaming takes one prompt, got {len(prompts)}")
    for prompt in prompts:
        if any("\ud800" <= letter <= "\udfff" for letter in prompt):
            raise ValueError(f"the prompt {prompt!r} is not UTF-8")
    ids = [tokenizer.encode(prompt) for prompt in prompts]
    for prompt, row in zip(prompts, ids, strict=True):
        if not row:
            raise ValueError(f"the prompt {prompt!r} has no tokens")
    lengths = np.array([len(row) for row in ids], np.int32)
    if lengths.max() + max_new_tokens > config.max_position_embeddings:
        raise ValueError(
            f"a prompt of {lengths.max()} tokens and {max_new_tokens} new ones are more than the "
            f"{config.max_position_embeddings} positions that the model has"
        )
    tokens = np.zeros((len(ids), int(lengths.max())), np.int32)
    for row, values in zip(tokens, ids, strict=True):
        row[: len(values)] = values

    text = TextStream(tokenizer)
    stream = None if show is None else lambda step: show(text.feed(int(step[0])))
    if show is not None:
        show(prompts[0])
    start = time.perf_counter()
    options |= {"lengths": jnp.asarray(lengths), "max_new_tokens": max_new_tokens}
    out = jax_mla.generate(params, config, jnp.asarray(tokens), stream=stream, **options)
    new_tokens, new_lengths = np.asarray(out.tokens), np.asarray(out.lengths)
    seconds = time.perf_counter() - start
    if show is not None:
        show(text.end())
    return Run(
        [
            Completion(
                prompt=prompt,
                text=tokenizer.decode(new[:length].tolist()),
                num_prompt_tokens=len(row),
                num_tokens=int(length),
            )
            for prompt, row, new, length in zip(prompts, ids, new_tokens, new_lengths, strict=True)
        ],
        seconds,
    )


def positive(word: str) -> int:
    """An argparse type: an integer of at least 1."""
    if not word.isdecimal() or int(word) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer of at least 1, got {word!r}")
    return int(word)
